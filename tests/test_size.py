"""Files and functions stay short enough to be read in one go."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sfexport"
MODULE_LINES, FUNCTION_LINES, MEDIAN_LINES = 350, 60, 10


def test_no_module_is_long() -> None:
    long = {file.name: lines for file in files() if (lines := len(file.read_text("utf-8").splitlines())) > MODULE_LINES}
    assert not long


def test_no_function_is_long() -> None:
    long = {f"{file.name}: {name}": lines for file, name, lines in functions() if lines > FUNCTION_LINES}
    assert not long


def test_half_of_the_functions_are_short() -> None:
    assert statistics.median(lines for _, _, lines in functions()) < MEDIAN_LINES


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def functions() -> Iterator[tuple[Path, str, int]]:
    """Yield file, name and number of lines, signature and docstring included, of every function and method."""
    for file in files():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield file, node.name, node.end_lineno - node.lineno + 1
