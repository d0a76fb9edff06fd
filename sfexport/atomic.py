"""Directories that appear whole or not at all. May import sfexport.errors only."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sfexport.errors import InputError


def check_output(target: Path, ours: str) -> None:
    """Refuse a place that cannot be written, or that holds something that is not ours.

    Args:
        ours: the manifest's file name; a directory that has it may be replaced, and so may an empty one.

    Raises:
        InputError: with what is in the way.
    """
    if target.exists() and not target.is_dir():
        raise InputError(f"The output {target} exists and is not a directory.", "Choose another with -o.")
    if target.is_dir() and any(target.iterdir()) and not (target / ours).is_file():
        raise InputError(
            f"The output directory {target} already holds something else (no {ours} in it).",
            "Choose another with -o, or empty it first; nothing was changed.",
        )


@contextlib.contextmanager
def new_directory(target: Path, ours: str) -> Iterator[Path]:
    """A temporary sibling of `target` to write into; renamed to it at the end, removed if anything fails.

    Raises:
        InputError: as check_output, and where the parent cannot be written.
    """
    check_output(target, ours)
    made: list[Path] = []
    try:
        made = _make_parents(target)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        _remove_empty(made)
        raise InputError(
            f"The output {target} cannot be written: {error.strerror or error}.", "Choose another with -o."
        ) from None
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        _replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
        raise


def _make_parents(target: Path) -> list[Path]:
    """Create missing parents; returns those it made, deepest first."""
    missing = [p for p in target.parents if not p.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(directories: list[Path]) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.rmdir()


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _replace(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    # A directory cannot be replaced in one step: the old one steps aside until the new one stands.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(aside / target.name)
    try:
        temporary.rename(target)
    except OSError:
        (aside / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
