"""Open the bundle that a build starts from, or export it from a checkpoint first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfexport.artifacts.atomic import restore
from sfexport.artifacts.bundle import Bundle
from sfexport.artifacts.manifest_files import BUNDLE_FILE, ENGINE_FILE
from sfexport.artifacts.ownership import check_output
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.errors import InputError
from sfexport.exporting.export import ExportOptions, export
from sfexport.progress import OnStep, no_step


@dataclass(frozen=True)
class ExportRequest:
    """How to export a checkpoint; a bundle has to agree.

    Attributes:
        precision: 'auto' or one of PRECISIONS.
        half: 'auto' means the checkpoint's 16-bit type; otherwise fp32.
        quantize: 'int4', or None.
        lm_head: format of a quantised bundle's head; None: the default, or what a bundle has.
        split_lm_head: number of pieces the head is computed in; a bundle keeps its own number.
    """

    precision: str = "auto"
    half: bool = False
    quantize: str | None = None
    lm_head: str | None = None
    split_lm_head: int = 1

    def options(self, checkpoint: Checkpoint) -> ExportOptions:
        """Return the options that export `checkpoint` as asked for."""
        half = checkpoint.half_precision if self.half else "fp32"
        precision = half if self.precision == "auto" else self.precision
        return ExportOptions(
            precision=precision, quantize=self.quantize, lm_head=self.lm_head, split_lm_head=self.split_lm_head
        )


def open_or_export(
    source: Path,
    beside: Path,
    output: Path | None,
    request: ExportRequest,
    ours: str = ENGINE_FILE,
    on_step: OnStep = no_step,
) -> Bundle:
    """Open the bundle at `source`, or export the checkpoint there to `beside`.

    Args:
        output: where the build will write; checked first, so that no long export ends at an occupied place.
        ours: manifest of the directory that `output` may replace.

    Raises:
        InputError: `output` is occupied, or a bundle differs from the request.
        CheckpointError, BundleError: the source is incomplete or damaged.
    """
    restore(source)
    if (source / BUNDLE_FILE).is_file():
        bundle = Bundle.open(source)
        _check_agrees(bundle, request)
        return bundle
    checkpoint = Checkpoint.open(source)
    if output is not None:
        check_output(output, ours)
    return export(checkpoint, beside, request.options(checkpoint), on_step)


def _check_agrees(bundle: Bundle, request: ExportRequest) -> None:
    if request.precision not in ("auto", bundle.precision):
        raise InputError(
            f"{bundle.path} is a bundle in {bundle.precision}; its precision cannot be changed to {request.precision}.",
            f"Export again with --precision {request.precision}, or name the checkpoint.",
        )
    if request.quantize and not bundle.quantization:
        raise InputError(
            f"{bundle.path} is a bundle whose weights are not rounded; that cannot be changed.",
            f"Export again with --quantize {request.quantize}, or name the checkpoint.",
        )
    head = bundle.quantization["lm_head"] if bundle.quantization else "not rounded"
    if request.lm_head and request.lm_head != head:
        raise InputError(
            f"{bundle.path} is a bundle whose language-model head is {head}; that cannot be changed.",
            f"Export again with --quantize int4 --lm-head {request.lm_head}, or name the checkpoint.",
        )
