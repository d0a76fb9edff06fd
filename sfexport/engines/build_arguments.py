"""Turn the arguments of `sfexport.build` and `check_build` into options of the export and of TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sfexport.engines.build import engine_name
from sfexport.engines.tensorrt.build import TensorRTOptions
from sfexport.errors import InputError
from sfexport.exporting.open_or_export import ExportRequest
from sfexport.machines.machine import detect_machine
from sfexport.machines.targets import find_target, match_machine
from sfexport.values import as_output, as_path, directory_name


class Sizes(NamedTuple):
    """The sizes that engines are built for, by the names of TensorRTOptions; None: the default."""

    frames: int | None = None
    question_tokens: int | None = None
    new_tokens: int | None = None
    rows: int | None = None
    split_decoder: int | None = None


def tensorrt_options(
    target: str | None, jetpack: str | None, kernels: str | Path | None, sizes: Sizes, optimization_level: int | None
) -> TensorRTOptions:
    """Return the options of a TensorRT build.

    Raises:
        InputError: an unknown target, or a number without meaning.
    """
    if jetpack is not None and target is None:
        raise InputError("--jetpack needs a --target.", "Name one, such as --target jetson-orin-agx-64.")
    found = find_target(target, jetpack) if target is not None else None
    directory = None if kernels is None else as_path(kernels, "The directory of kernels")
    return TensorRTOptions(target=found, kernels=directory, optimization_level=optimization_level, **sizes._asdict())


def output_paths(source: Path, output: str | Path | None, backend: str, target: str | None) -> tuple[Path, Path]:
    """Return where `build` writes the bundle of a checkpoint, and the engines."""
    if output is None:
        name = directory_name(source)
        return Path(f"{name}-bundle"), Path(f"{name}-engines") / engine_name(backend, target)
    output = as_output(output)
    # A path without a name of its own ('.', '/') is refused later, when the output is checked.
    return output.parent / f"{output.name or directory_name(output)}-bundle", output


def export_request(
    backend: str, options: TensorRTOptions, precision: str, quantize: str | None, lm_head: str | None
) -> ExportRequest:
    """Return how a checkpoint is exported for a backend; for TensorRT it depends on the target, else this machine."""
    if backend == "tensorrt-rtx":
        return ExportRequest(precision, True, quantize, lm_head)
    if backend != "tensorrt":
        return ExportRequest(precision, False, quantize, lm_head)
    target = options.target or match_machine(detect_machine())
    return ExportRequest(precision, True, quantize, lm_head, target.split_lm_head if target else 1)
