"""Read the small files beside a checkpoint's weights: regular files of a bounded size, from the checkpoint itself.

A link is followed inside the checkpoint and into the blobs of a Hugging Face cache, nowhere else: these files are
copied into bundles, which people publish.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from sfexport.errors import CheckpointError

JSON_LIMIT = 64 << 20  # bytes
TOKENIZER_LIMIT = 256 << 20
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
_AGAIN = "It may be damaged; get it again."


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """Read a JSON object from a file. Raises CheckpointError saying what is wrong with it."""
    try:
        check_file(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.", _AGAIN) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.", _AGAIN)
    return value


def read_optional_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file of the checkpoint; None where there is no such name."""
    return read_json(path) if is_present(path) else None


def is_present(path: Path) -> bool:
    """Tell whether a file may be read as part of the checkpoint in its directory; False where there is no such name.

    Raises:
        CheckpointError: a link to nothing or out of the checkpoint, or not a regular file.
    """
    if not os.path.lexists(path):
        return False
    if not path.exists():
        raise CheckpointError(
            f"{path} is a link to a file that is gone.", "The download is incomplete: get the checkpoint again."
        )
    _check_link(path)
    check_file(path)
    return True


def check_file(path: Path) -> None:
    """Refuse what is not a regular file, or is too large to be what its name says.

    Raises:
        CheckpointError: naming the file.
        OSError: it does not exist, or may not be looked at.
    """
    limit = TOKENIZER_LIMIT if path.name in _TOKENIZER_FILES else JSON_LIMIT
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file.", "Put the file itself there.")
    if found.st_size > limit:
        raise CheckpointError(
            f"{path} has {found.st_size:,} bytes; at most {limit:,} are read of such a file.", "Get it again."
        )


def _check_link(path: Path) -> None:
    """Check where a link leads.

    A Hugging Face cache has <repository>/snapshots/<revision>/<name> -> <repository>/blobs/<digest>.
    """
    if not path.is_symlink():
        return
    directory, real = path.parent.resolve(), path.resolve()
    allowed = [directory]
    if directory.parent.name == "snapshots":
        allowed.append(directory.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path} is a link to {real}, outside the checkpoint.", "Put a copy of the file there instead of the link."
        )
