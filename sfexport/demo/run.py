"""`sfexport demo`: export, build, ask and compare once on the shipped model, and keep everything that is made."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfexport import console
from sfexport.artifacts.atomic import is_leftover, new_directory
from sfexport.artifacts.ownership import DROPPINGS
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.comparing.compare import Tolerance
from sfexport.demo.clip import write_frames
from sfexport.demo.scenes import FPS, SIZE, UPSCALE, Question, is_sampled, make_scene, video_frames
from sfexport.demo.shipped import RECORDED, SHIPPED
from sfexport.engines.build import build, engine_name
from sfexport.errors import InputError, MissingDependency
from sfexport.exporting.export import ExportOptions, export
from sfexport.qa.pipeline import Pipeline

if TYPE_CHECKING:
    from sfexport.comparing.parity_report import ParityReport

CLIP = (2026, 7)  # seed and index of the demo's clip
PARTS = ("checkpoint", "bundle", "engines", "clip.mp4")
_OLD_DRAFT = re.compile(r"\.clip\.\d+\.mp4")  # what earlier versions left when they were killed


@dataclass(frozen=True)
class DemoPaths:
    """The paths of everything that the demo makes."""

    root: Path

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"

    @property
    def engines(self) -> Path:
        return self.root / "engines"

    @property
    def clip(self) -> Path:
        return self.root / "clip.mp4"


def run_demo(root: Path) -> bool:
    """Make checkpoint, clip, bundle and engines, ask two questions and compare with PyTorch; False if parity fails.

    Raises:
        InputError: `root` holds something that does not come from an earlier demo.
    """
    paths = DemoPaths(root)
    _check_root(root)
    console.status(f"sfexport demo: everything goes to {root}")
    _make_inputs(paths)
    bundle = export(Checkpoint.open(paths.checkpoint), paths.bundle, ExportOptions(), console.step)
    build(bundle, paths.engines / engine_name("onnxruntime"), "onnxruntime", console.step)
    _ask(paths)
    passed = _compare(paths)
    _suggest_next(paths)
    return passed


def _check_root(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise InputError(f"{root} exists and is not a directory.", "Choose another with -o.")
    names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    for name in names:
        if name not in PARTS and name not in DROPPINGS and not _is_leftover(name):
            raise InputError(f"{root} already holds something that is not a demo ({name}).", "Choose another with -o.")


def _is_leftover(name: str) -> bool:
    """Return whether a killed demo left this file; the next demo removes it or puts it back."""
    return _OLD_DRAFT.fullmatch(name) is not None or any(is_leftover(name, part) for part in PARTS)


def _make_inputs(paths: DemoPaths) -> None:
    """Copy the shipped checkpoint and make a clip, unless an earlier run left them."""
    for draft in paths.root.iterdir() if paths.root.is_dir() else ():
        if _OLD_DRAFT.fullmatch(draft.name):
            draft.unlink(missing_ok=True)
    if _is_incomplete(paths.checkpoint):
        shutil.rmtree(paths.checkpoint)
    if not paths.checkpoint.exists():
        console.step("copying the demo checkpoint: a tiny Slow-Fast model, trained on clips of moving shapes")
        with new_directory(paths.checkpoint, None) as directory:
            for file in SHIPPED.iterdir():
                shutil.copyfile(file, directory / file.name)
    if not paths.clip.exists():
        console.step("making a clip: shapes move, and for one frame something flashes")
        write_frames(paths.clip, video_frames(*CLIP), FPS, (SIZE * UPSCALE, SIZE * UPSCALE))


def _is_incomplete(checkpoint: Path) -> bool:
    """Return whether a directory is an interrupted copy of the shipped checkpoint, without files of the user's."""
    if not checkpoint.is_dir():
        return False
    found, shipped = list(checkpoint.iterdir()), {file.name for file in SHIPPED.iterdir()}
    if not all(file.is_file() and file.name in shipped for file in found):
        return False
    whole = [(file.read_bytes(), (SHIPPED / file.name).read_bytes()) for file in found]
    begun = all(want.startswith(have) for have, want in whole)
    return begun and (len(found) < len(shipped) or any(have != want for have, want in whole))


def demo_questions() -> list[Question]:
    """Return one overview question, and one about a frame that the fast path never sees."""
    questions = make_scene(*CLIP).questions()
    overview = next(q for q in questions if q.kind == "colour_direction")
    detail = next(q for q in questions if q.kind == "digit_corner" and q.frame is not None and not is_sampled(q.frame))
    return [overview, detail]


def _ask(paths: DemoPaths) -> None:
    pipeline, questions = Pipeline.load(paths.engines), demo_questions()
    with console.frames_progress("encoding") as on_frames:
        session = pipeline.encode(paths.clip, questions=[q.text for q in questions], on_frames=on_frames)
    console.result()
    for question in questions:
        answer = session.ask(question.text, pipeline.generation_options())
        verdict = "right" if answer.answer == question.answer else "WRONG"
        console.result(f"Q: {question.text}")
        console.result(f"A: {answer.answer}   (truth: {question.answer}; {verdict})")
        console.result(
            f"   {answer.frames_encoded} frames encoded, {answer.prefill_tokens} tokens prefilled, "
            f"{answer.new_tokens} generated, {sum(answer.seconds.values()):.2f} s"
        )
    console.result(
        "The second answer is about one frame that the fast tokens never saw: it comes from the slow tokens.\n"
    )


def _compare(paths: DemoPaths) -> bool:
    """Compare the engines with PyTorch, or with its recorded outputs if it is not installed."""
    from sfexport.comparing.report import show
    from sfexport.comparing.run import run_parity

    pipeline = Pipeline.load(paths.engines)
    try:
        report = run_parity(pipeline, paths.clip, demo_questions()[0].text, tolerance=Tolerance())
        console.result("PyTorch is installed: parity with it is computed live.")
    except MissingDependency as missing:
        report = _compare_with_recording(pipeline, paths.clip, missing)
    show(report)
    return report.passed


def _compare_with_recording(pipeline: Pipeline, clip: Path, missing: MissingDependency) -> ParityReport:
    """Compare with PyTorch's outputs for this clip's frames, recorded earlier."""
    from sfexport.comparing.recording import Recording, compare_with, largest_difference, unprepare

    recording = Recording.load(RECORDED)
    console.result(f"{missing} Parity is with PyTorch's recorded outputs.")
    pixels, rows = pipeline.read_frames(clip, len(recording.frames), "linspace")
    if difference := largest_difference(recording.frames, unprepare(pixels[rows], pipeline.bundle.image)):
        console.result(
            f"The clip encoded here differs from the recorded frames by up to {difference} of 255: parity uses those."
        )
    return compare_with(recording, pipeline, Tolerance())


def _suggest_next(paths: DemoPaths) -> None:
    root = paths.root
    console.result("\nTry next:")
    for line in (
        f"sfexport ask {root}/engines {root}/clip.mp4 -q 'How many shapes are there?' --json",
        f"sfexport inspect {root}/bundle",
        f"sfexport parity {root}/engines YOUR_VIDEO.mp4",
        f"sfexport export {root}/checkpoint -o my-bundle && sfexport build my-bundle -o my-engines",
    ):
        console.result(f"  {line}")
