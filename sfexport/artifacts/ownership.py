"""Decide whether an output directory may be replaced: only one that sfexport wrote, as it wrote it."""

from __future__ import annotations

import errno
import json
import os
import stat
from hashlib import sha256
from pathlib import Path
from typing import Any

from sfexport.errors import InputError

# What desktop systems leave in every directory: nobody's, and never read.
DROPPINGS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_MANIFEST_LIMIT = 64 << 20
_ELSEWHERE = "Choose another with -o, or move it away; nothing was changed."


def check_output(target: Path, manifest: str | None) -> None:
    """Refuse a place that holds anything but an earlier output of the same kind, whole or with files missing.

    Args:
        manifest: name of the file that lists what we wrote; None: only an absent or empty directory will do.

    Raises:
        InputError: naming what is in the way: a file that the manifest does not list, or one changed since.
    """
    try:
        if os.path.lexists(target) and not target.is_dir():
            raise InputError(f"The output {target} exists and is not a directory.", "Choose another with -o.")
        entries = [entry for entry in os.scandir(target) if entry.name not in DROPPINGS] if target.is_dir() else []
        if Path.cwd().is_relative_to(target.resolve()):
            raise InputError(f"The output {target} is the current directory or above it.", "Name another with -o.")
        if os.path.ismount(target):
            raise InputError(
                f"The output {target} is where a file system is mounted, which cannot be replaced in one step.",
                f"Name a directory in it, for instance -o {target / 'sfexport'}.",
            )
        if entries:
            _check_ours(target, manifest, sorted(entries, key=lambda entry: entry.name))
    except OSError as error:
        raise unwritable(target, error) from None
    except RuntimeError:  # links in a circle, before Python 3.13
        raise unwritable(target, OSError(errno.ELOOP, os.strerror(errno.ELOOP))) from None


def unwritable(target: Path, error: OSError) -> InputError:
    """Make the error to raise where the system refuses to write."""
    return InputError(f"The output {target} cannot be written: {error.strerror or error}.", "Choose another with -o.")


def _check_ours(target: Path, manifest: str | None, entries: list[os.DirEntry[str]]) -> None:
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            raise InputError(f"The output directory {target} also holds the directory {entry.name}.", _ELSEWHERE)
    if manifest is None or not any(entry.name == manifest for entry in entries):
        lacks = "" if manifest is None else f" (no {manifest} in it)"
        raise InputError(f"The output directory {target} already holds something else{lacks}.", _ELSEWHERE)
    listed = _listed(target / manifest)
    if listed is None:
        raise InputError(
            f"The output directory {target} already holds something else: its {manifest} is not one that sfexport "
            "wrote, or is damaged.",
            _ELSEWHERE,
        )
    for entry in entries:
        if entry.name == manifest:
            continue
        if entry.name not in listed or not entry.is_file(follow_symlinks=False):
            raise InputError(
                f"The output directory {target} also holds {entry.name}, which sfexport did not write.", _ELSEWHERE
            )
        if _changed(Path(entry.path), *listed[entry.name]):
            raise InputError(f"{entry.path} was changed after sfexport wrote it.", _ELSEWHERE)


def _listed(manifest: Path) -> dict[str, tuple[int, str | None]] | None:
    """List size and sha256 of every file that a manifest, of any version of sfexport, says it wrote beside itself."""
    try:
        content = _read(manifest)
        if not isinstance(content["sfexport"], str) or type(content["format"]) is not int:
            return None
        found: dict[str, tuple[int, str | None]] = {
            name: (entry["size"], str(entry["sha256"])) for name, entry in content["files"].items()
        }
        weights = content.get("weights")
        if weights and weights["directory"]["relative"] == ".":
            # Weights are told by their size: reading gigabytes to delete them would take longer than writing others.
            found |= {shard["file"]: (shard["size"], None) for shard in weights["shards"]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return found


def _read(manifest: Path) -> Any:
    about = manifest.lstat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > _MANIFEST_LIMIT:
        raise ValueError("not a manifest")
    return json.loads(manifest.read_text(encoding="utf-8"))


def _changed(file: Path, size: Any, digest: str | None) -> bool:
    if file.stat().st_size != size:
        return True
    if digest is None:
        return False
    found = sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest() != digest
