"""`sfexport build`: engines from a bundle or a checkpoint, and the check of a build for another machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import sfexport
from sfexport import console
from sfexport.commands.common import DIRECTORY, json_option, with_examples
from sfexport.dtypes import PRECISIONS

if TYPE_CHECKING:
    from sfexport.engines.tensorrt.preflight import Readiness


@with_examples(
    "sfexport build ./checkpoint",
    "sfexport build ./checkpoint --quantize int4",
    "sfexport build ./bundle -o ./engines --backend onnxruntime",
    "sfexport build ./checkpoint --target jetson-orin-agx-64 --check -o ./for-the-orin",
    "sfexport build ./checkpoint --backend tensorrt --frames 96 --max-new-tokens 512",
    "sfexport build ./checkpoint --backend tensorrt-rtx -o ./for-an-rtx-card",
)
@click.command()
@click.argument("source", metavar="CHECKPOINT|BUNDLE", type=DIRECTORY)
@click.option(
    "-o", "--output", type=DIRECTORY, help="The engine directory.  [default: ./<name>-engines/<target>-<runtime>]"
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "tensorrt", "tensorrt-rtx", "torch"]),
    default="auto",
    show_default=True,
    help="What runs the graphs. auto: TensorRT if it is installed and there is a GPU, else ONNX Runtime; tensorrt-rtx "
    "builds without a GPU; torch is the PyTorch model itself, for comparison.",
)
@click.option("--target", help="Machine that TensorRT engines are for, such as h100.  [default: this one]")
@click.option("--jetpack", help="The target's JetPack, for --check.  [default: the target's]")
@click.option("--check", is_flag=True, help="Check a TensorRT build for --target on any machine; build nothing.")
@click.option(
    "--precision",
    type=click.Choice(["auto", *PRECISIONS]),
    default="auto",
    show_default=True,
    help="For a CHECKPOINT: type that the graphs compute in. auto: for TensorRT the weights' own type (fp16 for fp32 "
    "weights), else fp32.",
)
@click.option(
    "--quantize", type=click.Choice(["int4"]), help="For a CHECKPOINT: round the decoder's weights to 4 bits."
)
@click.option(
    "--lm-head",
    type=click.Choice(["int8", "int4", "fp16"]),
    help="With --quantize: format of the language-model head.  [default: int8]",
)
@click.option("--frames", type=int, help="Maximum frames of a video (TensorRT).  [default: the bundle's]")
@click.option("--max-question-tokens", type=int, help="Maximum text tokens of a prompt (TensorRT).  [default: 512]")
@click.option("--max-new-tokens", type=int, help="Maximum tokens of an answer (TensorRT).  [default: 256]")
@click.option("--max-batch", type=int, help="Maximum questions decoded together (TensorRT).  [default: 8]")
@click.option(
    "--split-decoder",
    type=int,
    help="Engines to split the decoder into, for boards that cannot allocate it in one block (TensorRT).  [default: "
    "the target's]",
)
@click.option("--kernels", type=DIRECTORY, help="Directory of kernels that --check -o wrote (TensorRT without Triton).")
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="TensorRT's optimization level: 0 builds fastest, 5 runs fastest.  [default: TensorRT's]",
)
@click.option("--force", is_flag=True, help="Build even if the weights do not seem to fit into memory.")
@json_option
@click.pass_context
def build(
    ctx: click.Context,
    /,
    source: Path,
    output: Path | None,
    backend: str,
    target: str | None,
    check: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build engines from a BUNDLE, or from a CHECKPOINT (which is exported first).

    With --check: check a TensorRT build for --target on this machine; -o then names a directory to write for the
    target. Exits with 1 if the check fails.
    """
    if check:
        found = sfexport.check_build(source, output, target=target, on_step=console.step, **options)
        _show_check(found, output, as_json)
        ctx.exit(0 if found.passed else 1)
    with console.build_progress() as on_progress:
        engines = sfexport.build(
            source,
            output,
            backend=backend,
            target=target,
            force=force,
            on_step=console.step,
            on_progress=on_progress,
            **options,
        )
    if as_json:
        console.document(sfexport.inspect(engines.path))
        return
    console.result(f"engines written to {engines.path}")
    console.result(f"next: sfexport ask {engines.path} VIDEO -q 'What happens in the video?'")


def _show_check(found: Readiness, output: Path | None, as_json: bool) -> None:
    if as_json:
        console.document(found.to_json())
        return
    target = found.target
    system = f"JetPack {target.jetpack}, " if target.jetpack else ""
    title = f"{target.name}: {system}TensorRT {target.tensorrt}, {found.precision}, {found.limits.frames} frames"
    console.table(title, ("what", "checked", "found", "verdict"), found.rows())
    if output is not None:
        console.result(f"written to {output}; copy it to the target and run {output.name}/build.sh CHECKPOINT")
