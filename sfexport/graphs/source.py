"""What a build starts from: a bundle as it is, or a checkpoint, exported first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sfexport.atomic import check_output
from sfexport.checkpoint import Checkpoint
from sfexport.errors import InputError
from sfexport.graphs.bundle import ExportOptions, export
from sfexport.manifest import BUNDLE_FILE, ENGINE_FILE, Bundle


def bundle_from(
    source: Path,
    beside: Path,
    output: Path | None,
    precision: str,
    half: bool,
    ours: str = ENGINE_FILE,
    report: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """The bundle at `source`, or the checkpoint there exported to `beside`.

    Args:
        output: where the build will write; checked first, so that no export is lost on a place that is taken.
        precision: 'auto' or one of PRECISIONS. half: 'auto' is 16 bits wide, else fp32.
        ours: manifest of the directory that `output` may replace.

    Raises:
        InputError: `output` is taken, or a bundle is of another precision. CheckpointError, BundleError: see there.
    """
    if (source / BUNDLE_FILE).is_file():
        bundle = Bundle.open(source)
        if precision not in ("auto", bundle.precision):
            raise InputError(
                f"{source} is a bundle in {bundle.precision}; its precision cannot be changed to {precision}.",
                f"Export again with --precision {precision}, or name the checkpoint.",
            )
        return bundle
    checkpoint = Checkpoint.open(source)
    if output is not None:
        check_output(output, ours)
    if precision == "auto":
        precision = checkpoint.half_precision if half else "fp32"
    return export(checkpoint, beside, ExportOptions(precision=precision), report)
