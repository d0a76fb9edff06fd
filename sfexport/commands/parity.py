"""`sfexport parity`: compare engines with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import sfexport
from sfexport import console
from sfexport.commands.common import DIRECTORY, json_option, with_examples


@with_examples("sfexport parity ./engines", "sfexport parity ./engines clip.mp4 --frames 16 --json")
@click.command()
@click.argument("engines", type=DIRECTORY)
@click.argument("video", required=False)
@click.option(
    "-q", "--question", default="What happens in the video?", show_default=True, help="The question to answer."
)
@click.option("--frames", type=int, help="Frames sampled from the video.  [default: the bundle's]")
@click.option("--max-new-tokens", type=int, default=16, show_default=True, help="Maximum tokens per answer.")
@click.option("--atol", type=float, help="Absolute tolerance.  [default: 1e-4 in fp32, more in fp16, bf16 and INT4]")
@click.option("--rtol", type=float, help="Tolerance relative to the largest PyTorch value.  [default: as for --atol]")
@json_option
@click.pass_context
def parity(
    ctx: click.Context,
    /,
    engines: Path,
    video: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare ENGINES with PyTorch, graph by graph and answer by answer, on a VIDEO (or on noise).

    Exits with 0 if everything is within tolerance and the answers are the same, with 1 if not. Answers may diverge
    where two logits tie within the tolerance; ties are shown, and pass.
    """
    from sfexport.comparing.report import show

    report = sfexport.parity(engines, video, on_step=console.step, **options)
    if as_json:
        console.document(report.to_json())
    else:
        show(report)
    if not report.passed:
        ctx.exit(1)
