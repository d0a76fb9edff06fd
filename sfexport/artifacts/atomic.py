"""Make directories and files appear whole or not at all, whenever the process is killed.

What is written goes to a hidden sibling, `.<name>.<random>.partial`, and takes its place in one step. A sibling is
locked while its process lives; the next that writes to the same place removes those without a lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import glob
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from sfexport.artifacts.ownership import check_output, unwritable

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_PARTIAL, _OLD = ".partial", ".old"
_LONGEST_NAME = 200  # bytes: a sibling's name must fit into the usual 255
_PATIENCE = 30.0  # seconds that another process may take to put a whole directory in its place
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EBUSY}
_BUSY = -1  # in the place of a lock's handle
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of renameat2(2)


@contextlib.contextmanager
def new_directory(target: Path, manifest: str | None) -> Iterator[Path]:
    """Give a temporary sibling of `target` to write into; it becomes `target` at the end, or is removed if that fails.

    An earlier output is replaced in one step, and only if it is ours (see ownership.check_output). Where `target` is
    a link, the directory it leads to is replaced and the link stays.

    Raises:
        InputError: as check_output; the parent cannot be written, or the disk is full.
    """
    check_output(target, manifest)
    target = target.resolve() if target.name == ".." or target.is_symlink() else target
    made = [parent for parent in target.parents if not parent.exists()]
    temporary, lock = _sibling(target, _PARTIAL), None
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                target.lstat()  # raises for a name that is too long
            with _swept(target):
                temporary.mkdir(mode=0o700)
                lock = _lock(temporary)
        except OSError as error:
            raise unwritable(target, error) from None
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        with _parent_lock(target):
            check_output(target, manifest)
            _put(temporary, target)
        _remove(temporary)
    except BaseException as error:
        _remove(temporary)
        _remove_empty(made)
        if isinstance(error, OSError) and _is_about_writing(error, temporary):
            raise unwritable(target, error) from None
        raise
    finally:
        _unlock(lock)


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Give a temporary sibling of `target`, of the same suffix, to write to; it becomes `target` at the end.

    Raises:
        OSError: it cannot be written.
    """
    target = target.resolve() if target.is_symlink() else target
    temporary, lock = _sibling(target, _PARTIAL + target.suffix), None
    try:
        with _swept(target):
            temporary.touch(mode=0o600, exist_ok=False)
            lock = _lock(temporary)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        _unlock(lock)


def write_bytes(target: Path, data: bytes) -> None:
    """Write or replace a small file in one step. Raises OSError where it cannot be written."""
    with new_file(target) as file:
        file.write_bytes(data)


def restore(target: Path) -> None:
    """Put back a directory that a killed process had moved aside to replace it, if `target` is absent."""
    if not os.path.lexists(target) and target.parent.is_dir() and list(_siblings(target, _OLD)):
        with contextlib.suppress(OSError), _parent_lock(target) as locked:
            _sweep_old(target) if locked else None


def is_leftover(name: str, target: str) -> bool:
    """Tell whether a file name is that of a sibling that was being written, or moved aside, for `target`."""
    rest = name.removeprefix(_prefix(target))
    return rest != name and (_PARTIAL in rest or rest.endswith(_OLD))


def _sibling(target: Path, suffix: str) -> Path:
    """Choose a free name beside `target`, before anything is made, so that whatever ends the making can clean up."""
    return target.with_name(f"{_prefix(target.name)}{secrets.token_hex(6)}{suffix}")


@contextlib.contextmanager
def _swept(target: Path) -> Iterator[None]:
    """Repair what killed processes left beside `target`; until the end of the block nobody else does."""
    with _parent_lock(target) as locked:
        if locked:
            _sweep_old(target)
        _sweep_partial(target)
        yield


def _prefix(name: str) -> str:
    """Return the beginning of the names of a target's siblings."""
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}."


def _siblings(target: Path, kind: str) -> Iterator[Path]:
    return target.parent.glob(f"{glob.escape(_prefix(target.name))}*{kind}*")


def _sweep_partial(target: Path) -> None:
    """Remove what processes that were killed while they wrote to `target` left behind."""
    for found in _siblings(target, _PARTIAL):
        with contextlib.suppress(OSError):
            handle = _lock(found)
            if handle is not None:
                _remove(found)
                _unlock(handle)


def _sweep_old(target: Path) -> None:
    """Put back what was moved aside for a new directory that never came; remove it where one came."""
    for found in sorted(_siblings(target, _OLD), key=lambda path: path.lstat().st_mtime, reverse=True):
        if not os.path.lexists(target) and (found / target.name).is_dir():
            (found / target.name).rename(target)
        _remove(found)


def _put(temporary: Path, target: Path) -> None:
    """Make `temporary` the new `target`; an old one is left at `temporary`, or is gone."""
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        # Two steps where the system has no exchange: a kill in between is repaired by `restore`.
        aside = Path(tempfile.mkdtemp(prefix=_prefix(target.name), suffix=_OLD, dir=target.parent))
        try:
            target.rename(aside / target.name)
            try:
                temporary.rename(target)
            except OSError:
                (aside / target.name).rename(target)
                raise
        finally:
            if target.exists():
                _remove(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step; False where the system or the file system cannot."""
    swap = _renameat2()
    return swap is not None and swap(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0


@functools.cache
def _renameat2() -> Any:
    """Find the C library's function; None where it has none (before glibc 2.28, and on other systems than Linux)."""
    try:
        function = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


@contextlib.contextmanager
def _parent_lock(target: Path) -> Iterator[bool]:
    """Hold the lock of the directory that `target` is in, for as long as names in it change; False without locks.

    Raises:
        TimeoutError: another process has held it for long.
    """
    handle, end = None, time.monotonic() + _PATIENCE
    while True:
        with contextlib.suppress(PermissionError):
            handle = _lock(target.parent, wait=True)
        if handle != _BUSY:
            break
        if time.monotonic() > end:
            raise TimeoutError(f"another process is writing to {target.parent}")
        time.sleep(0.01)
    try:
        yield handle is not None
    finally:
        _unlock(handle)


def _lock(path: Path, wait: bool = False) -> int | None:
    """Lock a file or directory until the returned handle is closed or the process ends; None: no lock.

    Args:
        wait: tell the lock that another holds, _BUSY, from one that the file system does not have.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        return _BUSY if wait and error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _remove(path: Path) -> None:
    """Remove a file or directory; a signal that arrives meanwhile ends the process afterwards."""
    try:
        _remove_once(path)
    except BaseException:
        _remove_once(path)
        raise


def _remove_once(path: Path) -> None:
    with contextlib.suppress(OSError):  # also where the name is one that no file can have
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _remove_empty(directories: list[Path]) -> None:
    """Remove parents that were made for nothing, deepest first."""
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.rmdir()


def _is_about_writing(error: OSError, temporary: Path) -> bool:
    name = error.filename
    below = isinstance(name, (str, bytes)) and Path(os.fsdecode(name)).is_relative_to(temporary)
    return below or error.errno in _DISK or isinstance(error, TimeoutError)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
