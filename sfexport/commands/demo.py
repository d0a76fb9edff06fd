"""`sfexport demo`: export, build, ask and compare once with a tiny model."""

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
    """Export, build, ask and compare with a tiny model that ships with sfexport.

    The engines are compared with PyTorch if it is installed, else with its recorded outputs.
    """
    from sfexport.demo.run import run_demo

    if not run_demo(output):
        ctx.exit(1)
