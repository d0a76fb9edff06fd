"""`sfexport build`: engines from a bundle or a checkpoint, and what a build for another machine will meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sfexport import console
from sfexport.commands.common import DIRECTORY, directory_name, json_option, with_examples


@with_examples(
    "sfexport build ./checkpoint",
    "sfexport build ./checkpoint --quantize int4",
    "sfexport build ./bundle -o ./engines --backend onnxruntime",
    "sfexport build ./checkpoint --target jetson-orin-agx-64 --check -o ./for-the-orin",
    "sfexport build ./checkpoint --backend tensorrt --frames 96 --max-new-tokens 512",
)
@click.command()
@click.argument("source", metavar="CHECKPOINT|BUNDLE", type=DIRECTORY)
@click.option(
    "-o", "--output", type=DIRECTORY, help="The engine directory.  [default: ./<name>-engines/<target>-<runtime>]"
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "tensorrt", "torch"]),
    default="auto",
    show_default=True,
    help="What runs the graphs: TensorRT where it is installed beside a GPU, else ONNX Runtime (auto); torch is the "
    "PyTorch model itself, for comparison.",
)
@click.option("--target", help="The machine TensorRT engines are for, as in 'sfexport doctor'.  [default: this one]")
@click.option("--jetpack", help="The target's JetPack, for --check.  [default: the target's]")
@click.option("--check", is_flag=True, help="Build nothing: check a TensorRT build for --target, on any machine.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
    default="auto",
    show_default=True,
    help="For a CHECKPOINT. auto: for TensorRT the weights' own type (fp16 for fp32 weights), else fp32.",
)
@click.option(
    "--quantize", type=click.Choice(["int4"]), help="For a CHECKPOINT: round the decoder's weights to 4 bits."
)
@click.option("--frames", type=int, help="Most frames of a video (TensorRT).  [default: the bundle's]")
@click.option("--max-question-tokens", type=int, help="Most text tokens of a prompt (TensorRT).  [default: 512]")
@click.option("--max-new-tokens", type=int, help="Most tokens of an answer (TensorRT).  [default: 256]")
@click.option("--kernels", type=DIRECTORY, help="Kernels compiled by --check elsewhere (TensorRT without Triton).")
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="TensorRT's: 0 builds fastest, 5 runs fastest.  [default: TensorRT's]",
)
@click.option("--force", is_flag=True, help="Build even if the weights do not seem to fit into memory.")
@json_option
@click.pass_context
def build(
    ctx: click.Context,
    source: Path,
    output: Path | None,
    backend: str,
    target: str | None,
    jetpack: str | None,
    check: bool,
    precision: str,
    quantize: str | None,
    force: bool,
    as_json: bool,
    **tensorrt: Any,
) -> None:
    """Build engines from a BUNDLE, or from a CHECKPOINT (which is exported beside them first).

    With --check: what a TensorRT build for --target will meet, without the target; -o then names a directory to take
    there. Exits with 1 if there is a gap.
    """
    from sfexport.artifacts.inspect import inspect
    from sfexport.engines.build import build, check_backend, choose_backend, engine_name
    from sfexport.errors import InputError
    from sfexport.exporting.open_or_export import bundle_from

    options = _tensorrt_options(target, jetpack, tensorrt)
    if check:
        if target is None:
            raise InputError("--check needs a --target.", "For instance --target jetson-orin-agx-64.")
        passed = _check_build(source, output, _wanted("tensorrt", options, precision, quantize), options, as_json)
        ctx.exit(0 if passed else 1)
    backend = choose_backend("tensorrt" if target is not None and backend == "auto" else backend)
    check_backend(backend, precision, options)
    wanted = _wanted(backend, options, precision, quantize)
    # A place without a name of its own ('.', '/') is refused once it is looked at.
    named = directory_name(source) if output is None else output.name or directory_name(output)
    beside = (Path() if output is None else output.parent) / f"{named}-bundle"
    output = output or Path(f"{directory_name(source)}-engines") / engine_name(backend, target)
    bundle = bundle_from(source, beside, output, wanted, on_step=console.step)
    with console.build_progress() as on_progress:
        engines = build(bundle, output, backend, console.step, force, options, on_progress)
    if as_json:
        console.document(inspect(engines.path))
        return
    console.say(f"engines written to {output}", err=False)
    console.say(f"next: sfexport ask {output} VIDEO -q 'What happens in the video?'", err=False)


def _tensorrt_options(target: str | None, jetpack: str | None, given: dict[str, Any]) -> Any:
    from sfexport.engines.tensorrt.build import TensorRTOptions
    from sfexport.errors import InputError
    from sfexport.machines.targets import find_target

    if jetpack is not None and target is None:
        raise InputError("--jetpack needs a --target.", "For instance --target jetson-orin-agx-64.")
    return TensorRTOptions(
        target=find_target(target, jetpack) if target is not None else None,
        frames=given["frames"],
        question_tokens=given["max_question_tokens"],
        new_tokens=given["max_new_tokens"],
        kernels=given["kernels"],
        optimization_level=given["optimization_level"],
    )


def _wanted(backend: str, options: Any, precision: str, quantize: str | None) -> Any:
    """How a checkpoint is exported for a backend; for TensorRT it depends on the target, else this machine."""
    from sfexport.exporting.open_or_export import Wanted
    from sfexport.machines.machine import look
    from sfexport.machines.targets import match_machine

    if backend != "tensorrt":
        return Wanted(precision, quantize=quantize)
    target = options.target or match_machine(look())
    return Wanted(precision, True, quantize, target.split_lm_head if target else 1)


def _check_build(source: Path, output: Path | None, wanted: Any, options: Any, as_json: bool) -> bool:
    """Print what a build for the target will meet; write a directory for it where one is asked for."""
    from tempfile import TemporaryDirectory

    from sfexport.engines.tensorrt.preflight import KIT_FILE, check_build, write_kit
    from sfexport.exporting.open_or_export import bundle_from

    with TemporaryDirectory() as folder:
        beside = Path(folder) / "bundle"
        bundle = bundle_from(source, beside, output, wanted, KIT_FILE, console.step)
        readiness = check_build(bundle, options.target, options)
    if output is not None:
        write_kit(readiness, output)
    if as_json:
        console.document(readiness.to_json())
        return readiness.passed
    target = readiness.target
    system = f"JetPack {target.jetpack}, " if target.jetpack else ""
    title = (
        f"{target.name}: {system}TensorRT {target.tensorrt}, {readiness.precision}, {readiness.limits.frames} frames"
    )
    console.table(title, ("what", "checked", "found", "verdict"), readiness.rows())
    if output is not None:
        console.say(f"taken along in {output}; on the target: {output.name}/build.sh CHECKPOINT", err=False)
    return readiness.passed
