"""Directories and files that appear whole or not at all. May import sfexport.errors only."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sfexport.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_PARTIAL = ".partial"


def check_output(target: Path, ours: str) -> None:
    """Refuse a place that cannot be written, or that holds something that is not ours.

    Args:
        ours: the manifest's file name; a directory that has it may be replaced, and so may an empty one. We
            write no directories into it: one that has any holds something of the user's too.

    Raises:
        InputError: with what is in the way.
    """
    hint = "Choose another with -o, or empty it first; nothing was changed."
    try:
        if os.path.lexists(target) and not target.is_dir():
            raise InputError(f"The output {target} exists and is not a directory.", "Choose another with -o.")
        entries = list(target.iterdir()) if target.is_dir() else []
    except OSError as error:
        raise _unwritable(target, error) from None
    if Path.cwd().is_relative_to(target.resolve()):
        raise InputError(f"The output {target} is the current directory or above it.", "Name another with -o.")
    if entries and not (target / ours).is_file():
        raise InputError(f"The output directory {target} already holds something else (no {ours} in it).", hint)
    for entry in entries:
        if entry.is_dir():
            raise InputError(f"The output directory {target} also holds the directory {entry.name}.", hint)


def _unwritable(target: Path, error: OSError) -> InputError:
    return InputError(f"The output {target} cannot be written: {error.strerror or error}.", "Choose another with -o.")


@contextlib.contextmanager
def new_directory(target: Path, ours: str) -> Iterator[Path]:
    """A temporary sibling of `target` to write into; renamed to it at the end, removed if anything fails.

    One that a killed process left behind is removed by the next that writes to the same target.

    Raises:
        InputError: as check_output, and where the parent cannot be written or the disk is full.
    """
    check_output(target, ours)
    target = target.resolve() if target.name == ".." else target
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent))
    except OSError as error:
        _remove_empty(made)
        raise _unwritable(target, error) from None
    try:
        with _locked(temporary):
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            _replace(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _unwritable(target, error) from None
        raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Hold a directory's lock, which the system gives back when the process ends; False where it cannot be had."""
    handle = _lock(directory)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _lock(directory: Path) -> int | None:
    if fcntl is None:
        return None
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process holds it, or the file system has no locks
        os.close(handle)
        return None
    return handle


def _remove_abandoned(target: Path) -> None:
    """What processes that were killed while they wrote to `target` left behind."""
    for found in target.parent.glob(f".{glob.escape(target.name)}.*{_PARTIAL}"):
        with contextlib.suppress(OSError), _locked(found) as abandoned:
            if abandoned:
                shutil.rmtree(found, ignore_errors=True)


def _remove_empty(directories: list[Path]) -> None:
    """Remove parents that were made for nothing, deepest first."""
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
    try:
        target.rename(aside / target.name)
        try:
            temporary.rename(target)
        except OSError:
            (aside / target.name).rename(target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_bytes(target: Path, data: bytes) -> None:
    """Write or replace a small file in one step. Raises OSError where it cannot be written."""
    with tempfile.NamedTemporaryFile(prefix=f".{target.name}.", dir=target.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, target)
