"""Print for the commands: results on stdout, progress and errors on stderr.

Uses rich on a terminal, plain lines elsewhere. No control character reaches a terminal unescaped (see
sfexport.printable). rich is imported only when something is shown.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from sfexport.printable import json_text, one_paragraph, printable, shortened


def result(line: str = "", end: str = "\n") -> None:
    """Print a line of a command's result on stdout."""
    _write(sys.stdout, printable(line) + end)


def status(line: str) -> None:
    """Print a line about the command's progress on stderr."""
    _write(sys.stderr, printable(line) + "\n")


def document(value: Any) -> None:
    """Print a result as one JSON document on stdout, in ASCII."""
    _write(sys.stdout, json_text(value) + "\n")


def error(message: str) -> None:
    """Print what is wrong as one paragraph on stderr."""
    _write(sys.stderr, f"Error: {one_paragraph(message)}\n")


def raw(text: str) -> None:
    """Print a piece of an answer on stdout, escaped on a terminal and unchanged to a file or a program."""
    _write(sys.stdout, printable(text) if sys.stdout.isatty() else text)


def _write(stream: TextIO, text: str) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # Characters that the stream's encoding lacks are escaped.
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="", file=stream, flush=True)


def step(line: str) -> None:
    """Print one step of a longer command."""
    line = shortened(line)
    if sys.stderr.isatty():
        _rich().print(f"[dim]·[/dim] {_escape(line)}", highlight=False)
    else:
        status(line)


@contextlib.contextmanager
def frames_progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """Show progress over frames; yields a function to call with (done, total)."""
    if not sys.stderr.isatty():
        yield _plain_progress(verb)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn("frames"), TimeRemainingColumn())
    with Progress(*columns, console=_rich(), transient=True) as progress:
        task = progress.add_task(verb, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _plain_progress(verb: str) -> Callable[[int, int], None]:
    shown = [0]

    def show(done: int, total: int) -> None:
        # A line per quarter: logs stay short however long the video is.
        quarter = 4 * done // total
        if quarter > shown[0]:
            shown[0] = quarter
            status(f"{verb} {done}/{total} frames")

    return show


@contextlib.contextmanager
def answers(questions: Sequence[str], shown: bool) -> Iterator[Callable[[int, str], None] | None]:
    """Show answers in the order of their questions while they are generated.

    Yields a function to call with a question's index and pieces of its answer, an empty one at the answer's end; None
    if nothing is to be shown.
    """
    if not shown:
        yield None
        return
    waiting, ended, current = [""] * len(questions), [False] * len(questions), 0

    def begin() -> None:
        result(f"Q: {questions[current]}\nA: ", end="")
        raw(waiting[current])

    def show(index: int, text: str) -> None:
        nonlocal current
        ended[index] = not text
        if index == current:
            raw(text)
        else:
            waiting[index] += text
        while current < len(questions) and ended[current]:
            result()
            current += 1
            if current < len(questions):
                begin()

    begin()
    yield show


@contextlib.contextmanager
def build_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress over a build's phases, which may be nested; yields a function to call with (phase, done, total)."""
    if not sys.stderr.isatty():
        yield _plain_phases()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_rich(), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(_escape(phase), total=total)
            progress.update(tasks[phase], completed=done, total=total)
            if done >= total:
                progress.remove_task(tasks.pop(phase))

        yield show


def _plain_phases() -> Callable[[str, int, int], None]:
    shown: dict[str, int] = {}

    def show(phase: str, done: int, total: int) -> None:
        # Only phases that take a while have many steps; a line per quarter.
        quarter = 4 * done // total if total else 4
        if total >= 8 and quarter > shown.get(phase, 0):
            shown[phase] = quarter
            status(f"{phase}: {done}/{total}")

    return show


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on stdout: by rich on a terminal, in aligned columns elsewhere."""
    title = printable(title)
    cells = [[shortened(printable(str(c))) for c in row] for row in rows]
    if not sys.stdout.isatty():
        _plain_table(title, header, cells)
        return
    from rich.console import Console
    from rich.table import Table

    # No frame: names then fit into 80 columns.
    view = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0), show_header=any(header)
    )
    for name in header:
        view.add_column(name, overflow="fold")
    for row in cells:
        view.add_row(*(_escape(c) for c in row))
    Console().print(view)


def _plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    result(title)
    for row in [header, *rows] if any(header) else rows:
        result("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(printable(text))


def _rich() -> Any:
    from rich.console import Console

    return Console(stderr=True)
