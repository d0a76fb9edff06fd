"""The demo's scenes: short clips of moving shapes with one-frame flashes, and questions with known answers.

A clip is a function of (seed, index). NumPy and PIL only; sfexport/demo/clip.py writes the files.
Overview questions can be answered from a few averaged frames. Detail questions ask about events that last one
frame: the fast path never sees half of them (its sampling stride skips every second frame).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

SIZE, FRAMES = 48, 16  # pixels, frames
UPSCALE = 4  # a clip's file shows every pixel as 4 x 4
FPS = 4  # of a clip's file
# The shipped model was trained on clips of these seeds: no benchmark may use them.
TRAINING_SEEDS = range(1_000_000, 1_000_100)

COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 215, 45),
    "purple": (165, 60, 205),
    "cyan": (50, 205, 215),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
DIGITS = ("1", "2", "3", "4", "5", "6", "7", "8")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two", "three")
OVERVIEW = ("colour", "shape", "count", "direction", "colour_direction")
DETAIL = ("digit", "corner", "flash_colour", "digit_corner")
# Segments of a seven-segment digit: top, upper left, upper right, middle, lower left, lower right, bottom.
_SEGMENTS = ("1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111")
_DIGIT_WIDTH, _DIGIT_HEIGHT, _STROKE = 12, 20, 3
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


@dataclass(frozen=True)
class MovingShape:
    """A shape that moves over the whole clip.

    Attributes:
        start: its centre in the first frame, (x, y) in pixels.
        end: its centre in the last frame.
    """

    shape: str
    colour: str
    direction: str
    radius: float
    start: tuple[float, float]
    end: tuple[float, float]


@dataclass(frozen=True)
class Flash:
    """One frame with a coloured background and a digit in a corner."""

    frame: int
    colour: str
    digit: str
    corner: str


@dataclass(frozen=True)
class Question:
    """`kind` is one of OVERVIEW or DETAIL; `frame` is the flash a detail question asks about."""

    kind: str
    text: str
    answer: str
    frame: int | None = None


@dataclass(frozen=True)
class Scene:
    """The moving shapes and the flashes of a clip.

    The shapes and their colours are distinct, and so are the flashes' colours and digits. No shape stays hidden
    behind another.
    """

    shapes: tuple[MovingShape, ...]
    flashes: tuple[Flash, ...]

    def questions(self) -> list[Question]:
        """Return all questions about the clip."""
        out = [Question("count", "How many shapes are there?", NUMBERS[len(self.shapes) - 1])]
        for s in self.shapes:
            out += [
                Question("colour", f"What colour is the {s.shape}?", s.colour),
                Question("shape", f"Which shape is {s.colour}?", s.shape),
                Question("direction", f"Where does the {s.shape} move?", s.direction),
                Question("colour_direction", f"Describe the {s.shape}.", f"{s.colour} {s.direction}"),
            ]
        for f in self.flashes:
            out += [
                Question("digit", f"Which digit is in the {f.colour} flash?", f.digit, f.frame),
                Question("corner", f"In which corner is the {f.colour} flash?", f.corner, f.frame),
                Question("flash_colour", f"Which colour flashes with the {f.digit}?", f.colour, f.frame),
                Question("digit_corner", f"Describe the {f.colour} flash.", f"{f.digit} {f.corner}", f.frame),
            ]
        return out


def make_scene(seed: int, index: int) -> Scene:
    """Draw the scene of clip `index` of a seed."""
    rng = np.random.default_rng([seed, index, 1])
    count = int(rng.integers(1, 4))
    names = rng.permutation(SHAPES)[:count]
    colours = rng.permutation(list(COLOURS))[:count]
    shapes = _make_shapes(rng, names, colours)
    # The questions about a shape that stays behind another have no answer in the clip.
    while not _all_seen(shapes):
        shapes = _make_shapes(rng, names, colours)
    events = int(rng.integers(1, 4))
    columns = (
        rng.permutation(FRAMES)[:events],
        rng.permutation(list(COLOURS))[:events],
        rng.permutation(DIGITS)[:events],
        rng.choice(CORNERS, events),
    )
    flashes = (Flash(int(f), str(c), str(d), str(k)) for f, c, d, k in zip(*columns, strict=True))
    return Scene(shapes, tuple(sorted(flashes, key=lambda flash: flash.frame)))


def _make_shapes(rng: np.random.Generator, names: np.ndarray, colours: np.ndarray) -> tuple[MovingShape, ...]:
    return tuple(_make_shape(rng, str(n), str(c)) for n, c in zip(names, colours, strict=True))


def _all_seen(shapes: tuple[MovingShape, ...]) -> bool:
    """Return whether more than 60 % of every shape is uncovered in at least half of the frames.

    Later shapes are drawn on top.
    """
    above = np.zeros((FRAMES, SIZE, SIZE), dtype=bool)
    for moving in reversed(shapes):
        cover = _cover(moving)
        seen = (cover & ~above).sum((1, 2)) > 0.6 * cover.sum((1, 2))
        if seen.mean() < 0.5:
            return False
        above |= cover
    return True


def _make_shape(rng: np.random.Generator, shape: str, colour: str) -> MovingShape:
    direction = str(rng.choice(list(DIRECTIONS)))
    radius, way = float(rng.uniform(7, 9.5)), float(rng.uniform(20, 27))
    dx, dy = DIRECTIONS[direction]
    low, high = radius + 1, SIZE - 3 - radius
    # The whole path lies inside the frame: the start leaves room for the length of the path.
    along, across = float(rng.uniform(low, max(low, high - way))), float(rng.uniform(low, high))
    start, end = (along, along + way) if dx + dy > 0 else (along + way, along)
    if dx:
        return MovingShape(shape, colour, direction, radius, (start, across), (end, across))
    return MovingShape(shape, colour, direction, radius, (across, start), (across, end))


def render(scene: Scene, seed: int, index: int) -> np.ndarray:
    """Draw the clip's frames, uint8 [FRAMES, SIZE, SIZE, 3]."""
    rng = np.random.default_rng([seed, index, 2])
    frames = rng.normal(rng.uniform(95, 135), 9, (FRAMES, SIZE, SIZE, 1)).astype(np.float32)
    frames = np.repeat(frames, 3, axis=3)
    for flash in scene.flashes:
        frames[flash.frame] = 0.85 * np.array(COLOURS[flash.colour], np.float32) + 0.15 * frames[flash.frame]
    for moving in scene.shapes:
        frames[_cover(moving)] = COLOURS[moving.colour]
    for flash in scene.flashes:
        _draw_digit(frames[flash.frame], flash)
    frames[:, -2:] = 30
    for t in range(FRAMES):
        frames[t, -2:, : round((t + 1) * SIZE / FRAMES)] = 245
    return frames.clip(0, 255).astype(np.uint8)


def positions(moving: MovingShape) -> np.ndarray:
    """Return the shape's centre in each frame, float32 [FRAMES, 2]."""
    steps = np.linspace(0, 1, FRAMES, dtype=np.float32)[:, None]
    start, end = np.array(moving.start, np.float32), np.array(moving.end, np.float32)
    centres: np.ndarray = start * (1 - steps) + end * steps
    return centres


def _cover(moving: MovingShape) -> np.ndarray:
    """Return the pixels of the shape in each frame, bool [FRAMES, SIZE, SIZE]."""
    centre, r = positions(moving), moving.radius
    dx, dy = _X - centre[:, 0, None, None], _Y - centre[:, 1, None, None]
    if moving.shape == "circle":
        covered: np.ndarray = dx * dx + dy * dy <= r * r
    elif moving.shape == "square":
        far = np.maximum(np.abs(dx), np.abs(dy))
        covered = (far <= r * 0.9) & (far > r * 0.9 - 3)
    else:
        covered = (np.abs(dx) <= (dy + r) * 0.55) & (dy <= r * 0.85)
    return covered


@cache
def _digit_mask(digit: str) -> np.ndarray:
    w, h, s = _DIGIT_WIDTH, _DIGIT_HEIGHT, _STROKE
    mask, half = np.zeros((h, w), dtype=bool), h // 2
    spots = (
        np.s_[:s, :],
        np.s_[: half + 1, :s],
        np.s_[: half + 1, -s:],
        np.s_[half - 1 : half + s - 1, :],
        np.s_[half:, :s],
        np.s_[half:, -s:],
        np.s_[-s:, :],
    )
    for lit, spot in zip(_SEGMENTS[int(digit)], spots, strict=True):
        if lit == "1":
            mask[spot] = True
    return mask


def _draw_digit(frame: np.ndarray, flash: Flash) -> None:
    vertical, horizontal = flash.corner.split()
    y = 2 if vertical == "top" else SIZE - 4 - _DIGIT_HEIGHT
    x = 2 if horizontal == "left" else SIZE - 2 - _DIGIT_WIDTH
    area = frame[y : y + _DIGIT_HEIGHT, x : x + _DIGIT_WIDTH]
    area[_digit_mask(flash.digit)] = 15


@cache
def camera_matrix() -> np.ndarray:
    """Return the matrix, float32 [SIZE, SIZE], of upscaling a row or a column and resizing it back bicubically."""
    rows = np.repeat(np.eye(SIZE, dtype=np.float32), UPSCALE, axis=1)
    back = Image.fromarray(rows).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(back, dtype=np.float32).T.copy()


def through_camera(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Imitate a way through a video file: float32 [FRAMES, SIZE, SIZE, 3], 0..255, slightly noisy."""
    m = camera_matrix()
    out: np.ndarray = np.einsum("ij,tjkc,lk->tilc", m, frames.astype(np.float32), m, optimize=True)
    out += rng.normal(0, rng.uniform(0, 4), (FRAMES, SIZE, SIZE, 1)).astype(np.float32)
    return out.clip(0, 255)


def video_frames(seed: int, index: int) -> Iterator[np.ndarray]:
    """Yield the clip's frames for its video file: uint8 [UPSCALE * SIZE, UPSCALE * SIZE, 3]."""
    for frame in render(make_scene(seed, index), seed, index):
        yield frame.repeat(UPSCALE, axis=0).repeat(UPSCALE, axis=1)


def is_sampled(frame: int) -> bool:
    """Return whether the fast path (sampling stride 2) sees this frame."""
    return frame % 2 == 0
