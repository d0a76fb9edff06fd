"""Define what the commands share: types of arguments, the --json option, examples at the end of a help text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

DIRECTORY = click.Path(path_type=Path)
MODES = click.Choice(["released", "trained"])
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")


def with_examples(*examples: str) -> Callable[[click.Command], click.Command]:
    """Show examples at the end of a command's help."""

    def attach(command: click.Command) -> click.Command:
        command.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples)
        return command

    return attach
