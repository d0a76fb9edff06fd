"""The training command with stages of two steps: every stage runs, the result is a checkpoint, a second run resumes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from sfexport.checkpoint.checkpoint import Checkpoint

pytest.importorskip("torch")
pytest.importorskip("accelerate")


@pytest.mark.parametrize("plain", [False, True])
def test_all_stages_lead_to_a_checkpoint(plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "shapes")
    import train

    short = {name: dataclasses.replace(stage, steps=2, batch=2) for name, stage in train.STAGES.items()}
    monkeypatch.setattr(train, "STAGES", short)
    arguments = ["train.py", "-o", str(tmp_path), "--clips", "1", *["--plain"] * plain]
    monkeypatch.setattr(sys, "argv", arguments)
    train.main()
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    checkpoint.validate()
    assert bool(checkpoint.config.slow_fast.hybrid_layers) is not plain
    written = {stage: (tmp_path / stage / "final.pt").stat().st_mtime_ns for stage in short}
    weights = (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
    train.main()
    assert {stage: (tmp_path / stage / "final.pt").stat().st_mtime_ns for stage in short} == written
    assert (tmp_path / "checkpoint" / "model.safetensors").read_bytes() == weights
