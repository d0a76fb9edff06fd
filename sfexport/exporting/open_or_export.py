"""What a build starts from: a bundle as it is, or a checkpoint, exported first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfexport.artifacts.atomic import restore
from sfexport.artifacts.manifest import Bundle
from sfexport.artifacts.manifest_files import BUNDLE_FILE, ENGINE_FILE
from sfexport.artifacts.ownership import check_output
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.errors import InputError
from sfexport.exporting.export import ExportOptions, export
from sfexport.progress import OnStep, no_step


@dataclass(frozen=True)
class Wanted:
    """How a checkpoint is to be exported; a bundle has to agree.

    Attributes:
        precision: 'auto' or one of PRECISIONS. half: 'auto' is 16 bits wide, else fp32.
        quantize: as ExportOptions has it. split_lm_head: too; a bundle keeps what it has.
    """

    precision: str = "auto"
    half: bool = False
    quantize: str | None = None
    split_lm_head: int = 1

    def options(self, checkpoint: Checkpoint) -> ExportOptions:
        half = checkpoint.half_precision if self.half else "fp32"
        precision = half if self.precision == "auto" else self.precision
        return ExportOptions(precision=precision, quantize=self.quantize, split_lm_head=self.split_lm_head)


def bundle_from(
    source: Path,
    beside: Path,
    output: Path | None,
    wanted: Wanted,
    ours: str = ENGINE_FILE,
    on_step: OnStep = no_step,
) -> Bundle:
    """The bundle at `source`, or the checkpoint there exported to `beside`.

    Args:
        output: where the build will write; checked first, so that no export is lost on a place that is taken.
        ours: manifest of the directory that `output` may replace.

    Raises:
        InputError: `output` is taken, or a bundle is not as wanted. CheckpointError, BundleError: see there.
    """
    restore(source)
    if (source / BUNDLE_FILE).is_file():
        bundle = Bundle.open(source)
        _check_agrees(bundle, wanted)
        return bundle
    checkpoint = Checkpoint.open(source)
    if output is not None:
        check_output(output, ours)
    return export(checkpoint, beside, wanted.options(checkpoint), on_step)


def _check_agrees(bundle: Bundle, wanted: Wanted) -> None:
    if wanted.precision not in ("auto", bundle.precision):
        raise InputError(
            f"{bundle.path} is a bundle in {bundle.precision}; its precision cannot be changed to {wanted.precision}.",
            f"Export again with --precision {wanted.precision}, or name the checkpoint.",
        )
    if wanted.quantize and not bundle.quantization:
        raise InputError(
            f"{bundle.path} is a bundle whose weights are not rounded; that cannot be changed.",
            f"Export again with --quantize {wanted.quantize}, or name the checkpoint.",
        )
