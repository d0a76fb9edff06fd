"""`sfexport doctor`: whether this machine can build and run engines."""

from __future__ import annotations

import click

import sfexport
from sfexport import console
from sfexport.commands.common import json_option, with_examples


@with_examples("sfexport doctor", "sfexport doctor --target jetson-orin-agx-64 --json")
@click.command()
@click.option("--target", help="Machine that engines are for.  [default: this machine]")
@json_option
@click.pass_context
def doctor(ctx: click.Context, target: str | None, as_json: bool) -> None:
    """Show whether engines can be built and run here, and the commands that fix what is missing.

    Exits with 0 if TensorRT engines (with --target: for that machine) can be built here, with 1 if not. Without
    --target and without an NVIDIA GPU, exits with 0 if ONNX Runtime works.
    """
    from sfexport.doctor.diagnosis import show

    diagnosis = sfexport.diagnose(target)
    if as_json:
        console.document(diagnosis.to_json())
    else:
        show(diagnosis)
    ctx.exit(diagnosis.exit_code)
