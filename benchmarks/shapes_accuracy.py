"""Ask a model about the demo's clips, as real video files through exported engines.

Used by benchmarks/demo_accuracy.py and benchmarks/slow_fast.py.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.clip import write_frames
from sfexport.demo.scenes import (
    FPS,
    OVERVIEW,
    SIZE,
    TRAINING_SEEDS,
    UPSCALE,
    Question,
    is_sampled,
    make_scene,
    video_frames,
)
from sfexport.engines.build import build
from sfexport.engines.interface import KeyValues
from sfexport.exporting.export import ExportOptions, export
from sfexport.qa.pipeline import Pipeline
from sfexport.qa.video_session import VideoSession

MODES = ("trained", "released", "slow_off")
OTHER_CLIP = "slow_of_another_clip"


@dataclass
class Tally:
    """Right answers by mode and kind; detail kinds also as `<kind>_unsampled`."""

    counts: dict[str, dict[str, list[int]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(lambda: [0, 0]))
    )

    def add(self, mode: str, question: Question, is_right: bool) -> None:
        kinds = [question.kind]
        if question.frame is not None:
            kinds.append(f"{question.kind}_{'sampled' if is_sampled(question.frame) else 'unsampled'}")
        for kind in kinds:
            count = self.counts[mode][kind]
            count[0] += is_right
            count[1] += 1

    def accuracies(self) -> dict[str, dict[str, float]]:
        order = {kind: i for i, kind in enumerate(OVERVIEW)}
        return {
            mode: {
                kind: round(right / asked, 4)
                for kind, (right, asked) in sorted(kinds.items(), key=lambda k: (order.get(k[0], 99), k[0]))
            }
            for mode, kinds in self.counts.items()
        }


def check_seed(seed: int) -> None:
    """Refuse a seed the shipped model was trained on."""
    if seed in TRAINING_SEEDS or seed < 0:
        sys.exit(
            f"Seed {seed} cannot be used: clips of seeds {TRAINING_SEEDS.start} to {TRAINING_SEEDS.stop - 1} were "
            "trained on, and seeds are not negative."
        )


def load(checkpoint: Path, folder: Path, backend: str = "onnxruntime") -> Pipeline:
    """Export and build a checkpoint into `folder`, and load it."""
    bundle = export(Checkpoint.open(checkpoint), folder / f"{checkpoint.name}-bundle", ExportOptions())
    engines = build(bundle, folder / f"{checkpoint.name}-{backend}", backend)
    return Pipeline.load(engines.path)


def clips(folder: Path, seed: int, count: int) -> Iterator[tuple[Path, list[Question]]]:
    """Video files and their questions, one at a time."""
    for index in range(count):
        path = folder / "clip.mp4"
        write_frames(path, video_frames(seed, index), FPS, (SIZE * UPSCALE, SIZE * UPSCALE))
        yield path, make_scene(seed, index).questions()


def evaluate(pipeline: Pipeline, folder: Path, seed: int, count: int, extra: bool = False) -> Tally:
    """Ask every question of `count` clips in every mode, greedily.

    Args:
        extra: also with the slow tokens of the clip before.
    """
    tally, options = Tally(), pipeline.generation_options().greedy()
    other: KeyValues | None = None
    for done, (path, questions) in enumerate(clips(folder, seed, count), start=1):
        pixels, rows = pipeline.read_frames(path, None, "linspace")
        slow_tokens = pipeline.backend.encode_frames(pixels, single_image=False)[rows]
        fast, slow = pipeline.backend.compress(slow_tokens)
        for mode, branch in _branches(slow, other, extra):
            session = VideoSession(pipeline.backend, pipeline.tokenizer, pipeline.embedding, fast, branch)
            decode = "released" if mode == "released" else "trained"
            for question in questions:
                tally.add(mode, question, session.ask(question.text, options, decode).answer == question.answer)
        other = slow
        if done % 100 == 0:
            print(f"{done}/{count} clips", file=sys.stderr, flush=True)
    return tally


def _branches(slow: KeyValues | None, other: KeyValues | None, extra: bool) -> Iterator[tuple[str, KeyValues | None]]:
    if slow is None:
        yield "plain", None
        return
    yield from (("trained", slow), ("released", slow), ("slow_off", None))
    if extra and other is not None:
        yield OTHER_CLIP, other
