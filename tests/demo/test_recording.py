"""Parity without PyTorch: its recorded outputs for the demo's clip, which are still what PyTorch gives."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_says, sfexport

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.comparing.compare import Tolerance, compare
from sfexport.comparing.recording import Recording, largest_difference, unprepare
from sfexport.demo.clip import write_frames
from sfexport.demo.run import CLIP
from sfexport.demo.scenes import FPS, SIZE, UPSCALE, video_frames
from sfexport.demo.shipped import RECORDED, SHIPPED
from sfexport.video.decoding import Video
from sfexport.video.preprocessing import preprocess


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without PyTorch: importing it fails."""
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording.load(RECORDED)


def test_the_demo_says_which_parity_it_shows(no_torch: None, recording: Recording, tmp_path: Path) -> None:
    result = sfexport("demo", "-o", tmp_path / "demo")
    assert result.exit_code == 0, result.stderr
    version = recording.source.torch
    assert_says(
        result.stdout, "'torch', which is not installed", f"recorded outputs (torch {version})", "parity passed"
    )
    assert "live" not in result.stdout


def test_with_pytorch_parity_is_live(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    result = sfexport("demo", "-o", tmp_path / "demo")
    assert result.exit_code == 0, result.stderr
    assert_says(result.stdout, "computed live", "against PyTorch, 16 frames", "parity passed")
    assert "recorded" not in result.stdout


@pytest.mark.parametrize("tensor", ["model.mm_projector.0.weight", "model.layers.3.mlp.down_proj.weight"])
def test_other_weights_fail(tensor: str, no_torch: None, tmp_path: Path) -> None:
    """Engines of a slightly different checkpoint run, and parity fails."""
    checkpoint = Path(shutil.copytree(SHIPPED, tmp_path / "demo" / "checkpoint"))
    nudge(checkpoint, tensor)
    result = sfexport("demo", "-o", tmp_path / "demo")
    assert result.exit_code == 1
    assert_says(result.stdout, "FAIL", "parity FAILED")


def nudge(checkpoint: Path, name: str) -> None:
    """Add 3 % of its largest value to every value of a bfloat16 tensor."""
    tensor = Checkpoint.open(checkpoint).tensors[name]
    values = tensor.rows().astype(np.float32)
    bits = (values + np.float32(0.03) * np.abs(values).max()).view(np.uint32) >> 16
    with open(tensor.shard, "r+b") as file:
        file.seek(tensor.offset)
        file.write(bits.astype("<u2").tobytes())


def test_pytorch_still_gives_what_was_recorded(recording: Recording) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from sfexport.demo.record import record_demo

    again = record_demo(recording.frames)
    assert (again.source.question, again.source.steps) == (recording.source.question, recording.source.steps)
    assert again.tokens == recording.tokens
    assert again.answers == recording.answers
    assert again.shapes == recording.shapes
    for (graph, name), values in recording.samples.items():
        found = compare(graph, name, again.samples[graph, name], values, Tolerance(1e-5, 1e-5))
        assert found.passed, found


def test_the_recorded_frames_are_the_clips(recording: Recording, tmp_path: Path) -> None:
    """As far as encoders agree; and preparing them changes nothing but their scale."""
    write_frames(tmp_path / "clip.mp4", video_frames(*CLIP), FPS, (SIZE * UPSCALE, SIZE * UPSCALE))
    image = Checkpoint.open(SHIPPED).image
    with Video.open(tmp_path / "clip.mp4") as video:
        pixels = preprocess(list(video.frames(range(len(recording.frames)))), image)
    drawn = unprepare(pixels, image)
    assert np.abs(drawn.astype(int) - recording.frames).mean() < 3
    assert np.array_equal(unprepare(preprocess(list(recording.frames), image), image), recording.frames)
    assert largest_difference(recording.frames, recording.frames) == 0
    assert largest_difference(recording.frames, recording.frames[:1]) == 255


def test_it_is_small_and_says_what_it_was_made_with(recording: Recording) -> None:
    assert RECORDED.stat().st_size < 200_000
    assert recording.source.torch and recording.source.transformers
    assert recording.frames.dtype == np.uint8
