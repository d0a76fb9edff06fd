"""Print a parity report, one line per comparison."""

from __future__ import annotations

from sfexport import console
from sfexport.comparing.compare import Comparison
from sfexport.comparing.parity_report import ParityReport


def show(report: ParityReport) -> None:
    """Print a table of comparisons, the answers, and the verdict."""
    rows = [
        (_mark(c.passed), c.graph, c.name, _shape(c), f"{c.max_abs:.1e}", f"{c.max_rel:.1e}", f"{c.cosine:.7f}")
        for c in report.comparisons
    ]
    header = ("", "graph", "output", "shape", "max abs", "max rel", "cosine")
    console.table(f"{report.backend} against {report.oracle}, {report.frames} frames", header, rows)
    for pair in report.answers:
        verdict = "same" if pair.tie is None else f"a tie at token {pair.equal_tokens + 1} ({pair.tie:.1e} apart)"
        verdict = verdict if pair.passed else f"differ from token {pair.equal_tokens + 1} on"
        console.result(f"  {_mark(pair.passed)}  answer, {pair.mode} mode: {pair.tokens} tokens, {verdict}")
    console.result(f"  tolerance: {report.tolerance}")
    if report.is_copy:
        console.result(
            f"  PyTorch read the bundle's own copy of the weights in {report.checkpoint}: the checkpoint that was "
            "exported is gone, so that the choice of weights is not compared"
        )
    elif report.checkpoint is not None:
        console.result(f"  PyTorch read the checkpoint {report.checkpoint}")
    if cost := report.rounding:
        console.result(
            f"  PyTorch has the engines' rounded weights; with the checkpoint's own its prefill logits differ by "
            f"{cost.max_rel:.1e}, cosine {cost.cosine:.7f}: what rounding costs"
        )
    console.result(f"parity {'passed' if report.passed else 'FAILED'}")


def _mark(passed: bool) -> str:
    return "ok" if passed else "FAIL"


def _shape(comparison: Comparison) -> str:
    return "x".join(map(str, comparison.shape))
