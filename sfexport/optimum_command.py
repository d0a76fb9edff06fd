"""`optimum-cli export sfexport`: the same as `sfexport export`, for users of optimum.

Imported by optimum alone, through `optimum/commands/register/register_sfexport.py`, whenever its command line starts:
besides optimum it imports what `sfexport --help` does.
"""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser
from typing import Any

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from sfexport.cli import main


class SfexportExportCommand(BaseOptimumCLICommand):
    """Hands its arguments to `sfexport export`, whose options it has."""

    COMMAND = CommandInfo(
        name="sfexport", help="Export a Slow-Fast Video MLLM checkpoint to ONNX graphs that point to its weights."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("-m", "--model", required=True, metavar="CHECKPOINT", help="The checkpoint's directory.")
        parser.add_argument("output", metavar="OUT", help="The bundle directory to write.")
        for option in _options():
            parser.add_argument(*option.opts, dest=option.name, default=SUPPRESS, **_as_argparse(option))

    def run(self) -> None:
        """Run `sfexport export` and exit with its status."""
        given = vars(self.args)
        line = ["export", "--output", given["output"]]
        for option in _options():
            if option.name in given:
                line += [option.opts[-1]] if option.is_flag else [option.opts[-1], given[option.name]]
        main([*line, "--", given["model"]], prog_name="sfexport")


def _options() -> list[click.Option]:
    """Return the options of `sfexport export` that have the same name here."""
    parameters = main.commands["export"].params
    return [p for p in parameters if isinstance(p, click.Option) and p.name != "output"]


def _as_argparse(option: click.Option) -> dict[str, Any]:
    text = (option.help or "").replace("%", "%%")
    if option.is_flag:
        return {"action": "store_true", "help": text}
    if option.show_default:
        text += f"  [default: {option.default}]"
    if isinstance(option.type, click.Choice):
        return {"choices": option.type.choices, "help": text}
    return {"metavar": option.type.name.upper(), "help": text}
