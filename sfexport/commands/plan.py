"""`sfexport plan`: compute memory and speed before a build."""

from __future__ import annotations

from pathlib import Path

import click

import sfexport
from sfexport import console
from sfexport.commands.common import DIRECTORY, json_option, with_examples


@with_examples(
    "sfexport plan ./checkpoint --target jetson-orin-agx-64 --frames 96", "sfexport plan ./checkpoint --target all"
)
@click.command()
@click.argument("checkpoint", type=DIRECTORY)
@click.option("--target", help="Name of a target such as h100, 'cpu' or 'all'.  [default: this machine]")
@click.option("--jetpack", help="The target's JetPack.  [default: the target's]")
@click.option("--frames", type=int, help="Frames of a video.  [default: the checkpoint's, else 64]")
@json_option
def plan(checkpoint: Path, target: str | None, jetpack: str | None, frames: int | None, as_json: bool) -> None:
    """Compute the memory and speed of a CHECKPOINT on a target, without building anything."""
    from sfexport.planning.report import show

    found = sfexport.plan(checkpoint, target, frames=frames, jetpack=jetpack)
    if as_json:
        console.document(found.to_json())
    else:
        show(found)
