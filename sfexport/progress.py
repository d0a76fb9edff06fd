"""Callbacks that long steps call to say what they do."""

from __future__ import annotations

from collections.abc import Callable

OnStep = Callable[[str], None]  # takes one line of text per step
OnProgress = Callable[[str, int, int], None]  # takes a phase's name, its steps done and its steps in all


def no_step(line: str) -> None:
    """Ignore a step: the default where a caller passes no callback."""


def no_progress(phase: str, done: int, total: int) -> None:
    """Ignore progress: the default where a caller passes no callback."""
