"""A clip for tests: coloured shapes that drift and bounce over a grey background, drawn with NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sfexport.demo.clip import write_frames

COLOURS = {
    "red": (214, 48, 49),
    "green": (39, 174, 96),
    "blue": (41, 98, 217),
    "yellow": (241, 196, 15),
    "purple": (142, 68, 173),
    "orange": (230, 126, 34),
}
KINDS = ("circle", "square", "triangle")


@dataclass(frozen=True)
class _Shape:
    """Centre and velocity as parts of the picture (x, y; per second), radius in pixels."""

    kind: str
    colour: tuple[int, int, int]
    centre: np.ndarray
    velocity: np.ndarray
    radius: float


def write_clip(
    path: Path, seconds: float = 4.0, fps: int = 24, size: tuple[int, int] = (320, 240), seed: int = 0
) -> None:
    """A video file of `seconds * fps` frames of `size` = (width, height) pixels."""
    write_frames(path, draw_frames(round(seconds * fps), fps, size, seed), fps, size)


def draw_frames(count: int, fps: int, size: tuple[int, int], seed: int = 0) -> Iterator[np.ndarray]:
    """`count` pictures, uint8 [height, width, 3] RGB."""
    rng = np.random.default_rng(seed)
    background = _background(size, rng)
    shapes = _shapes(size, rng)
    for i in range(count):
        yield _draw(background, shapes, i / fps)


def _background(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Grey with soft patches of about 32 pixels and a little grain, float32 [height, width, 1]."""
    width, height = size
    coarse = rng.normal(0.0, 12.0, (height // 32 + 2, width // 32 + 2))
    rows = _stretch(coarse, height)
    soft = _stretch(rows.T, width).T
    grain = rng.normal(0.0, 3.0, (height, width))
    return (150.0 + soft + grain).astype(np.float32)[..., None]


def _stretch(values: np.ndarray, length: int) -> np.ndarray:
    """Linear interpolation of the first axis to `length` rows."""
    place = np.linspace(0.0, len(values) - 1.0, length)
    low = np.minimum(place.astype(int), len(values) - 2)
    part = (place - low)[:, None]
    return values[low] * (1 - part) + values[low + 1] * part


def _shapes(size: tuple[int, int], rng: np.random.Generator) -> list[_Shape]:
    colours = rng.permutation(list(COLOURS))
    turn = rng.uniform(0, 2 * np.pi)
    radius = 0.12 * min(size)
    shapes = []
    for i, (kind, colour) in enumerate(zip(KINDS, colours, strict=False)):
        # Each from its own third and in its own direction, so that they do not cover each other all the time.
        centre = np.array([(i + rng.uniform(0.2, 0.8)) / len(KINDS), rng.uniform(0.0, 1.0)])
        angle, speed = turn + 2 * np.pi * i / len(KINDS), rng.uniform(0.2, 0.4)
        velocity = speed * np.array([np.cos(angle), np.sin(angle)])
        shapes.append(_Shape(kind, COLOURS[str(colour)], centre, velocity, radius))
    return shapes


def _draw(background: np.ndarray, shapes: list[_Shape], time: float) -> np.ndarray:
    height, width = background.shape[:2]
    picture = np.repeat(background, 3, axis=2)
    for shape in shapes:
        # The triangle wave 1 - |1 - (u mod 2)| is a way that bounces between 0 and 1.
        place = 1.0 - np.abs(1.0 - (shape.centre + shape.velocity * time) % 2.0)
        x, y = shape.radius + place * (np.array([width, height]) - 2 * shape.radius)
        cover = _coverage(shape, np.arange(width) + 0.5 - x, (np.arange(height) + 0.5 - y)[:, None])[..., None]
        picture = picture * (1 - cover) + np.array(shape.colour, np.float32) * cover
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _coverage(shape: _Shape, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers, 0..1; x, y: pixels from its centre."""
    if shape.kind == "circle":
        inside = shape.radius - np.hypot(x, y)
    elif shape.kind == "square":
        inside = 0.85 * shape.radius - np.maximum(np.abs(x), np.abs(y))
    else:  # a regular triangle with a corner on top: the distance to each of its three sides
        half = 0.5 * shape.radius
        inside = np.minimum(half - y, half - (np.sqrt(0.75) * np.abs(x) - 0.5 * y))
    return np.clip(inside + 0.5, 0.0, 1.0).astype(np.float32)
