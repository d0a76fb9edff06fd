"""The undamaged material that every case starts from, and reading an engine directory to the last number."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from drawn_clip import write_clip

import sfexport
from fuzz.kinds import Case, Unexpected, Wrong, call, command
from sfexport.engines.interface import Backend, Cache, DecoderStep, KeyValues
from sfexport.testing.random_checkpoint import write_random_checkpoint

QUESTION = "What happens in the video?"
FRAMES = np.random.default_rng(7).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
TOLERANCE = 1e-4
CHECKPOINT, BUNDLE, ENGINES, CLIP = "checkpoint", "bundle", "engines", "clip.mp4"


def make(root: Path) -> None:
    """A random checkpoint, its bundle and engines, and a clip."""
    write_random_checkpoint(root / CHECKPOINT)
    write_clip(root / CLIP, seconds=1.5, fps=8, size=(96, 64))
    command("export", root / CHECKPOINT, "-o", root / BUNDLE, "--weights", "copy")
    command("build", root / BUNDLE, "-o", root / ENGINES, "--backend", "onnxruntime")


@dataclass(frozen=True)
class Reading:
    """What an engine directory makes of FRAMES and QUESTION.

    Attributes:
        pixels: as the vision tower gets them. prompt: token ids around the video. logits: of the answer's first token.
    """

    pixels: np.ndarray
    prompt: tuple[int, ...]
    logits: np.ndarray
    ids: tuple[int, ...]


class _Recorded(Backend):
    """A backend that keeps the last logits of each call."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.name, self.config = backend, backend.name, backend.config
        self.logits: list[np.ndarray] = []

    def encode_frames(self, pixel_values: np.ndarray, single_image: bool) -> np.ndarray:
        return self.backend.encode_frames(pixel_values, single_image)

    def compress(self, slow_tokens: np.ndarray) -> tuple[np.ndarray, KeyValues | None]:
        return self.backend.compress(slow_tokens)

    def decode(self, step: DecoderStep) -> tuple[np.ndarray, KeyValues]:
        logits, new = self.backend.decode(step)
        self.logits.append(np.array(logits[0]))
        return logits, new

    def join(self, parts: Sequence[KeyValues]) -> KeyValues:
        return self.backend.join(parts)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        return self.backend.new_cache(rows, capacity)

    def to_numpy(self, tensors: KeyValues) -> list[np.ndarray]:
        return self.backend.to_numpy(tensors)

    def from_numpy(self, arrays: list[np.ndarray]) -> KeyValues:
        return self.backend.from_numpy(arrays)


def read(engines: Path, **options: Any) -> Reading:
    """Answer QUESTION about FRAMES. Raises Refused or Unexpected."""

    def answer() -> Reading:
        pipeline = sfexport.load(engines)
        pixels, _ = pipeline.read_frames(FRAMES, len(FRAMES), "linspace")
        prompt = pipeline.tokenizer.prompt(QUESTION)
        recorded = _Recorded(pipeline.backend)
        vars(pipeline)["backend"] = recorded  # in the place where cached_property keeps it
        session = pipeline.encode(FRAMES, len(FRAMES))
        before = len(recorded.logits)
        found = session.ask(QUESTION, **options)
        return Reading(pixels, (*prompt.before, -1, *prompt.after), recorded.logits[before], tuple(found.ids))

    return call(answer)


@cache
def whole(base: Path) -> Reading:
    """What the undamaged engines give."""
    return read(base / ENGINES)


def difference(found: Reading, wanted: Reading) -> str:
    """What differs, or an empty text."""
    if found.prompt != wanted.prompt:
        return f"the prompt's ids are {found.prompt[:30]}..., not {wanted.prompt[:30]}..."
    for name in ("pixels", "logits"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        if ours.shape != theirs.shape:
            return f"{name} of shape {ours.shape}, not {theirs.shape}"
        if not np.abs(ours - theirs).max() <= TOLERANCE * max(1.0, float(np.abs(theirs).max())):
            return f"{name} are off by {np.abs(ours - theirs).max():.3g}"
    return "" if found.ids == wanted.ids else f"the answer's ids are {found.ids}, not {wanted.ids}"


def expect_same(case: Case, found: Reading) -> None:
    """Raises Wrong unless it is what the undamaged engines give."""
    if problem := difference(found, whole(case.base)):
        raise Wrong(problem)


def copy(case: Case, name: str) -> Path:
    """A part of the base to change, in the case's room."""
    source, target = case.base / name, case.room / name
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))


def through_checkpoint(
    case: Case, damage: Callable[[Path], object], right: Callable[[Case, Reading], None] = expect_same
) -> None:
    """A damaged checkpoint all the way: inspect, export, build, ask."""
    damage(copy(case, CHECKPOINT))
    from_checkpoint(case, right)


def from_checkpoint(case: Case, right: Callable[[Case, Reading], None] = expect_same) -> None:
    """The checkpoint that lies in the case's room, all the way."""
    checkpoint, bundle, engines = (case.room / name for name in (CHECKPOINT, BUNDLE, ENGINES))
    command("inspect", checkpoint, "--json")
    command("export", checkpoint, "-o", bundle)
    command("build", bundle, "-o", engines, "--backend", "onnxruntime")
    right(case, read(engines))


def check_left_over(room: Path) -> None:
    """Raises Unexpected for half-written directories of ours."""
    for path in room.rglob(".*"):
        is_whole = any((path / name).is_file() for name in ("sfexport.json", "engine.json"))
        if not is_whole and any(mark in path.name for mark in (".partial", ".old", ".sfexport", ".clip.")):
            raise Unexpected(f"left behind: {path.relative_to(room)}")
