"""`sfexport export`: write a checkpoint's three graphs as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import sfexport
from sfexport import console
from sfexport.commands.common import DIRECTORY, json_option, with_examples
from sfexport.dtypes import PRECISIONS


@with_examples(
    "sfexport export ./checkpoint",
    "sfexport export ./checkpoint -o ./bundle --frames 96",
    "sfexport export ./checkpoint -o ./small --quantize int4 --precision fp16",
)
@click.command()
@click.argument("checkpoint", type=DIRECTORY)
@click.option("-o", "--output", type=DIRECTORY, help="The bundle directory.  [default: ./<checkpoint name>-bundle]")
@click.option(
    "--frames", type=int, help="Frames sampled from a video by default.  [default: the checkpoint's, else 64]"
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "reference", "copy"]),
    default="auto",
    show_default=True,
    help="Point into the checkpoint's shards (reference), copy them (copy), or copy up to 64 MB (auto).",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="Type that the graphs compute in, whatever type the weights are stored in.",
)
@click.option(
    "--quantize",
    type=click.Choice(["int4"]),
    help="Round the decoder's weights to 4 bits; the bundle then contains all weights.",
)
@click.option(
    "--lm-head",
    type=click.Choice(["int8", "int4", "fp16"]),
    help="Format of the language-model head in a quantized bundle; fp16: 16 bits, not rounded.  [default: int8]",
)
@click.option(
    "--split-lm-head", type=int, default=1, show_default=True, help="Parts to split the language-model head into."
)
@click.option(
    "--digest",
    type=click.Choice(["sampled", "full"]),
    default="sampled",
    show_default=True,
    help="Digests that referenced weights are verified by: of sampled blocks, or of every byte too (slower).",
)
@json_option
def export(checkpoint: Path, output: Path | None, as_json: bool, **options: Any) -> None:
    """Write a CHECKPOINT's three graphs as a bundle. This takes seconds: weights are not copied unless they are small.

    With --quantize the weights are streamed, rounded and written, which takes minutes for a large model.
    """
    bundle = sfexport.export(checkpoint, output, on_step=console.step, **options)
    if as_json:
        console.document(sfexport.inspect(bundle.path))
        return
    how = bundle.content["options"]["weights"]
    where = "copied into it" if how == "copy" else f"left in {bundle.weights_directory}"
    console.result(f"bundle written to {bundle.path} (weights {where})")
    console.result(f"next: sfexport build {bundle.path}")
