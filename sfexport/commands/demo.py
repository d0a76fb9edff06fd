"""`sfexport demo`: the whole way once."""

from __future__ import annotations

from pathlib import Path

import click

from sfexport.commands.common import DIRECTORY, with_examples


@with_examples("sfexport demo", "sfexport demo -o /tmp/demo")
@click.command()
@click.option(
    "-o", "--output", type=DIRECTORY, default=Path("sfexport-demo"), show_default=True, help="Directory to write."
)
@click.pass_context
def demo(ctx: click.Context, output: Path) -> None:
    """Go the whole way once on a tiny model: checkpoint, export, build, ask, parity.

    Parity is computed with PyTorch where it is installed, and shown with its recorded outputs where it is not.
    """
    from sfexport.demo.run import run_demo

    if not run_demo(output):
        ctx.exit(1)
