"""Check single values that callers pass, at the command line or in Python."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfexport.errors import InputError
from sfexport.fields import LARGEST, shown
from sfexport.printable import printable, shortened


def whole_number(value: Any, name: str, minimum: int = 1, maximum: int = LARGEST, hint: str = "") -> int:
    """Return `value` if it is a whole number in minimum..maximum; NumPy's integers are, True and 4.0 are not.

    Raises:
        InputError: naming the value and what it may be.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise InputError(f"{name} must be a whole number, not {shown(value)}.", hint)
    if number < minimum:
        raise InputError(f"{name} must be at least {minimum}, not {shown(number)}.", hint)
    if number > maximum:
        raise InputError(f"{name} must be at most {maximum:,}, not {shown(number)}.", hint)
    return number


def one_of(value: Any, name: str, choices: Sequence[str]) -> str:
    """Check that `value` is one of `choices` and return it. Raises InputError."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"Unknown {name} {shown(value)}; choose one of {', '.join(choices)}.")
    return value


def as_path(value: Any, what: str) -> Path:
    """Return the path that a str or Path names; nothing has to be there.

    Raises:
        InputError: another type, a name that no file can have, or one that the system does not let us look at.
    """
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        raise InputError(f"{what} is a path, a str or a pathlib.Path, not {shown(value)}.")
    if "\0" in os.fspath(value):
        raise InputError(f"The path {_path_text(os.fspath(value))} has a NUL character in it.", "Correct it.")
    try:
        os.lstat(value)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise InputError(
            f"The path {_path_text(os.fspath(value))} cannot be used: {error.strerror}.", "Correct it."
        ) from None
    return Path(value)


def as_output(value: Any) -> Path:
    """Return a path to write to, as `as_path` does; ONNX's libraries take names in UTF-8 only.

    Raises:
        InputError: as `as_path`, or a name that is not UTF-8.
    """
    path = as_path(value, "The output")
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        hint = "Choose another with -o, or work in another directory."
        raise InputError(f"The output {_path_text(str(path.absolute()))} is not a name in UTF-8.", hint) from None
    return path


def _path_text(path: str) -> str:
    """Show a path in a message; a very long one keeps both ends."""
    return f"'{printable(shortened(path))}'"


def directory_name(path: Path) -> str:
    """Return a directory's own name, also where the path is '.'."""
    return path.resolve().name
