"""`sfexport inspect`: describe a checkpoint, bundle or engine directory."""

from __future__ import annotations

from pathlib import Path

import click

import sfexport
from sfexport import console
from sfexport.commands.common import DIRECTORY, json_option, with_examples


@with_examples("sfexport inspect ./checkpoint", "sfexport inspect ./engines --json")
@click.command()
@click.argument("path", type=DIRECTORY)
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Describe a checkpoint, bundle or engine directory: config, inputs and outputs, sizes, versions."""
    from sfexport.artifacts.inspect import graph_rows, rows

    document = sfexport.inspect(path)
    if as_json:
        console.document(document)
        return
    console.table(document["kind"], ("", ""), rows(document))
    if lines := graph_rows(document):
        console.table("graphs", ("graph", "", "name", "dtype", "shape"), lines)
