"""Read the package's tables (TOML files beside the code)."""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Any

from sfexport.errors import MissingDependency


def read_table(package: str, name: str) -> dict[str, Any]:
    """Read the table `name` of a package. Raises MissingDependency on Python 3.10 without tomli."""
    text = files(package).joinpath(name).read_text(encoding="utf-8")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise MissingDependency("tomli", f"Reading {name}", "pip install tomli") from None
    return tomllib.loads(text)
