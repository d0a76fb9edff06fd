"""Define the command line: the group of commands (a file each in sfexport/commands) and how their errors are shown.

Heavy libraries are imported when a command runs: `sfexport --help` needs click alone.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from sfexport import console
from sfexport.__version__ import __version__
from sfexport.commands.ask import ask
from sfexport.commands.build import build
from sfexport.commands.demo import demo
from sfexport.commands.doctor import doctor
from sfexport.commands.export import export
from sfexport.commands.inspect import inspect
from sfexport.commands.parity import parity
from sfexport.commands.plan import plan
from sfexport.errors import SfexportError
from sfexport.printable import one_paragraph

_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class _Commands(click.Group):
    """Turns exceptions into one paragraph and an exit code; SFEXPORT_DEBUG=1 shows the traceback instead."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _cleaning_up_when_terminated():
                return super().invoke(ctx)
        except click.ClickException as error:
            error.message = one_paragraph(error.message)  # type: ignore[misc]  # click declares it Final
            raise
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if os.environ.get("SFEXPORT_DEBUG") == "1":
                raise
            if isinstance(error, SfexportError):
                console.error(error.paragraph())
                ctx.exit(error.exit_code)
            console.error(_unexpected(error))
            ctx.exit(1)


@contextmanager
def _cleaning_up_when_terminated() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, so that no half-written file stays.

    Service managers and containers send SIGTERM, a terminal that is closed sends SIGHUP. A signal that was ignored when
    the process started, as under nohup, stays ignored.
    """

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not set from Python, so it cannot be set again
                signal.signal(number, handler)


def _unexpected(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {error or 'no message'}. sfexport did not expect this; "
        "run again with SFEXPORT_DEBUG=1 for the traceback and report it."
    )


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="sfexport")
def main() -> None:
    """Export Slow-Fast Video MLLM checkpoints to engines that answer questions about videos offline.

    \b
    Try a tiny model:     sfexport demo
    Use your checkpoint:  sfexport build CHECKPOINT -o ENGINES
                          sfexport ask ENGINES video.mp4 -q "What happens in the video?"
    """


for _command in (demo, export, build, ask, inspect, parity, doctor, plan):
    main.add_command(_command)
