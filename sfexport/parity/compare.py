"""Comparing two arrays: how far apart, and whether within a stated tolerance. NumPy only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """A comparison passes if max |a - b| <= atol + rtol * max |b|, b being the PyTorch value."""

    atol: float = 1e-4
    rtol: float = 1e-4

    def __str__(self) -> str:
        return f"max |engine - torch| <= {self.atol:g} + {self.rtol:g} * max |torch|"


@dataclass(frozen=True)
class Comparison:
    """Two arrays side by side.

    Attributes:
        max_abs: largest absolute difference. max_rel: the same over the largest absolute PyTorch value.
        cosine: of the flattened arrays (1.0 where both are zero).
    """

    graph: str
    name: str
    shape: tuple[int, ...]
    max_abs: float
    max_rel: float
    cosine: float
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """Infinity, which JSON has not, becomes null."""
        values = asdict(self) | {"shape": list(self.shape)}
        return {k: None if v in (np.inf, -np.inf) else v for k, v in values.items()}


def compare(graph: str, name: str, engine: np.ndarray, torch: np.ndarray, tolerance: Tolerance) -> Comparison:
    """Compare an engine's output with PyTorch's. Another shape, or a value that is not finite, fails."""
    if engine.shape != torch.shape:
        return Comparison(graph, name, engine.shape, np.inf, np.inf, 0.0, False)
    a, b = engine.astype(np.float64).ravel(), torch.astype(np.float64).ravel()
    if not a.size:
        return Comparison(graph, name, engine.shape, 0.0, 0.0, 1.0, True)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Comparison(graph, name, engine.shape, np.inf, np.inf, 0.0, False)
    difference, scale = float(np.abs(a - b).max()), float(np.abs(b).max())
    return Comparison(
        graph=graph,
        name=name,
        shape=engine.shape,
        max_abs=difference,
        max_rel=difference / scale if scale else float(difference > 0),
        cosine=_cosine(a, b),
        passed=difference <= tolerance.atol + tolerance.rtol * scale,
    )


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not norms:
        return float(np.array_equal(a, b))
    return float(a @ b) / norms


def worst(comparisons: list[Comparison]) -> Comparison:
    """The one with the largest relative difference (a failed one first)."""
    return max(comparisons, key=lambda c: (not c.passed, c.max_rel))
