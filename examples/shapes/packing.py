"""Training data: clips rendered on the fly, and all of a clip's questions packed behind one shared prefix.

Every question sees the prefix (text before the video, fast tokens) and itself, not the other questions: the
same as asking each alone, at a fraction of the cost.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch.utils.data import Dataset

from sfexport.checkpoint.image_processor import CLIP_MEAN, CLIP_STD
from sfexport.demo.scenes import (
    COLOURS,
    CORNERS,
    DETAIL,
    DIGITS,
    FRAMES,
    SHAPES,
    SIZE,
    Question,
    Scene,
    make_scene,
    positions,
    render,
    through_camera,
)
from sfexport.qa.prompt import ChatTokenizer

IGNORED = -100
CELLS = 6  # the tower's grid: 6 x 6 cells of 8 pixels
QUESTIONS_PER_CLIP, FRAGMENTS_PER_CLIP = 10, 10


@dataclass(frozen=True)
class Segment:
    """One question with its answer, or one caption. The loss is on the answer.

    Attributes:
        kind: the question's, or 'caption'. frame: of the flash it is about, None for an overview.
    """

    asked: tuple[int, ...]
    answer: tuple[int, ...]
    kind: str
    frame: int | None


@dataclass(frozen=True)
class Example:
    """One clip. `pixels` float32 [FRAMES, 3, SIZE, SIZE]; `labels` per auxiliary head."""

    pixels: np.ndarray
    labels: dict[str, np.ndarray]
    segments: list[Segment]


class Clips(Dataset):
    """Clip `index` of a training seed; every index is a fresh clip.

    Args:
        detail: share of a clip's questions that are about one-frame details.
        directions, counts, shapes: how much oftener these are asked than another overview question.
    """

    def __init__(
        self,
        seed: int,
        count: int,
        tokenizer: ChatTokenizer | None,
        detail: float = 0.0,
        directions: int = 2,
        counts: int = 1,
        shapes: int = 1,
    ) -> None:
        self.seed, self.count, self.tokenizer, self.detail = seed, count, tokenizer, detail
        self.directions, self.counts, self.shapes = directions, counts, shapes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng([self.seed, index, 3])
        scene = make_scene(self.seed, index)
        frames = through_camera(render(scene, self.seed, index), rng)
        segments = self._segments(scene, rng) if self.tokenizer else []
        return Example(normalise(frames), frame_labels(scene), segments)

    def _segments(self, scene: Scene, rng: np.random.Generator) -> list[Segment]:
        questions = scene.questions()
        details = [q for q in questions if q.kind in DETAIL]
        overview = [q for q in questions if q.kind not in DETAIL]
        # Direction takes longest to learn.
        overview += [q for q in overview if "direction" in q.kind]
        overview += [q for q in overview if q.kind == "direction"] * (self.directions - 2)
        overview += [q for q in overview if q.kind == "count"] * (self.counts - 1)
        overview += [q for q in overview if q.kind == "shape"] * (self.shapes - 1)
        out = []
        for _ in range(QUESTIONS_PER_CLIP):
            pool = details if rng.random() < self.detail else overview
            out.append(self.segment(pool[rng.integers(len(pool))]))
        return out + self._fragments(scene, rng)

    def segment(self, question: Question) -> Segment:
        return Segment(*self._ids(question.text, question.answer), question.kind, question.frame)

    @cache  # noqa: B019  the few questions there are
    def _ids(self, question: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        end = self.tokenizer.end_of_turn()
        return tuple(self.tokenizer.prompt(question).after), (*self.tokenizer.encode(answer), end)

    def _fragments(self, scene: Scene, rng: np.random.Generator) -> list[Segment]:
        """Short captions without a chat around them: the loss is on what follows the key word."""
        captions: list[tuple[str, str, int | None]] = []
        for t in scene.shapes:
            captions += [(t.shape, f" {t.colour} {t.direction}", None), (t.colour, f" {t.shape}", None)]
        for f in scene.flashes if self.detail else ():
            captions += [
                (f"flash {f.colour}", f" {f.digit} {f.corner}", f.frame),
                (f"flash {f.digit}", f" {f.colour} {f.corner}", f.frame),
            ]
        chosen = (captions[i] for i in rng.integers(len(captions), size=FRAGMENTS_PER_CLIP))
        encode = self.tokenizer.encode
        return [Segment(tuple(encode(key)), tuple(encode(rest)), "caption", frame) for key, rest, frame in chosen]


def normalise(frames: np.ndarray) -> np.ndarray:
    """0..255 [T, H, W, 3] -> the tower's pixels, float32 [T, 3, H, W]."""
    values = (frames / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2), dtype=np.float32)


def frame_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Targets of the auxiliary heads, int64: per frame (0: no flash) and per cell (0: nothing there)."""
    out = {name: np.zeros(FRAMES, dtype=np.int64) for name in ("flash", "digit", "corner")}
    for f in scene.flashes:
        out["flash"][f.frame] = 1 + list(COLOURS).index(f.colour)
        out["digit"][f.frame] = 1 + DIGITS.index(f.digit)
        out["corner"][f.frame] = 1 + CORNERS.index(f.corner)
    for name in ("shape", "colour"):
        out[name] = np.zeros((FRAMES, CELLS, CELLS), dtype=np.int64)
    for moving in scene.shapes:
        cells = np.clip(positions(moving) * CELLS // SIZE, 0, CELLS - 1).astype(int)
        at = (np.arange(FRAMES), cells[:, 1], cells[:, 0])
        out["shape"][at] = 1 + SHAPES.index(moving.shape)
        out["colour"][at] = 1 + list(COLOURS).index(moving.colour)
    return out


HEADS = {"flash": 7, "digit": 9, "corner": 5, "shape": 4, "colour": 7}


class Collator:
    """Examples -> tensors. Rows are padded on the right.

    Args:
        before: ids of the text before the video. fast_tokens: how many follow it.
        slow_dropout: share of batches without slow branch, in which details are not asked.
    """

    def __init__(self, before: Sequence[int], fast_tokens: int, slow_dropout: float = 0.0) -> None:
        self.before, self.fast_tokens, self.slow_dropout = list(before), fast_tokens, slow_dropout

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        out = {"pixels": torch.from_numpy(np.stack([e.pixels for e in examples]))}
        for name in HEADS:
            out[f"head_{name}"] = torch.from_numpy(np.stack([e.labels[name] for e in examples]))
        if not examples[0].segments:
            return out
        # Drawn from the data, so that a resumed run draws the same.
        draw = np.random.default_rng(zlib.crc32(examples[0].pixels[0].tobytes())).random()
        slow_off = bool(draw < self.slow_dropout)
        rows = [self._pack(e, slow_off) for e in examples]
        longest = max(len(row["ids"]) for row in rows)
        for key, fill in (("ids", 0), ("positions", 0), ("segments", -1), ("labels", IGNORED)):
            out[key] = torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])
        out["slow_off"] = torch.tensor(slow_off)
        return out

    def _pack(self, example: Example, slow_off: bool) -> dict[str, list[int]]:
        prefix = len(self.before) + self.fast_tokens
        row = {
            "ids": self.before + [0] * self.fast_tokens,
            "positions": list(range(prefix)),
            "segments": [0] * prefix,
            "labels": [IGNORED] * prefix,
        }
        for number, segment in enumerate(example.segments, start=1):
            ids = segment.asked + segment.answer
            silent = slow_off and segment.frame is not None
            row["ids"] += ids
            row["positions"] += range(prefix, prefix + len(ids))
            row["segments"] += [number] * len(ids)
            row["labels"] += [IGNORED] * len(segment.asked)
            row["labels"] += [IGNORED] * len(segment.answer) if silent else segment.answer
        return row
