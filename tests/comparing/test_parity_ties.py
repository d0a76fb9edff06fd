"""Answers that part at a token which PyTorch itself holds for about as likely."""

from __future__ import annotations

import numpy as np
import pytest

from sfexport.comparing.compare import Tolerance
from sfexport.comparing.report import show
from sfexport.comparing.run import run_parity, tie_within
from sfexport.demo.run import DemoPaths as Tree
from sfexport.qa.pipeline import Pipeline

pytest.importorskip("torch", reason="parity compares with PyTorch, which is not installed")


def parity(tree: Tree, tolerance: Tolerance):
    """With engines that take every likeliest token for the second likeliest, and the other way round."""
    pipeline = Pipeline.load(tree.engines)
    inner = pipeline.backend.decode

    def decode(step):
        (logits,), new = inner(step)
        order, swapped = np.argsort(logits[: pipeline.tokenizer.vocabulary_size]), logits.copy()
        swapped[order[-2:]] = logits[order[-2:][::-1]]
        return swapped[None], new

    pipeline.backend.decode = decode
    return run_parity(pipeline, None, frames=4, max_new_tokens=3, tolerance=tolerance)


def test_a_tie_within_the_tolerance_passes_and_is_shown(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    report = parity(tree, Tolerance(atol=100.0))
    assert report.passed
    assert all(a.tie is not None and a.tie >= 0 and a.equal_tokens == 0 for a in report.answers)
    show(report)
    assert "a tie at token 1 (" in capsys.readouterr().out


def test_another_token_that_is_no_tie_fails(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    report = parity(tree, Tolerance())
    assert not any(a.passed for a in report.answers)
    assert all(a.tie is None for a in report.answers)
    show(report)
    assert "differ from token 1 on" in capsys.readouterr().out


@pytest.mark.parametrize(("gap", "tie"), [(0.0, True), (0.2, True), (0.21, False), (5.0, False)])
def test_each_of_two_logits_may_be_off_by_the_tolerance(gap: float, tie: bool) -> None:
    logits = np.array([1.0, 3.0, 3.0 - gap])
    found = tie_within(logits, 1, 2, Tolerance(atol=0.1001, rtol=0.0))
    assert found == (pytest.approx(gap) if tie else None)
