"""Comparing two arrays: how far apart, and whether within a stated tolerance. NumPy only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sfexport.dtypes import Precision
from sfexport.errors import InputError
from sfexport.fields import shown

# atol and rtol by what an engine computes in. On models recorded from the reference, logits of float16 and bfloat16 are
# off by up to 0.7 % and 7 % of the largest one, in PyTorch as in these graphs; those of a wrong graph by most of it.
TOLERANCES = {Precision.FP32: (1e-4, 1e-4), Precision.FP16: (1e-3, 1e-2), Precision.BF16: (1e-2, 1e-1)}
# At least this for rounded weights: ONNX Runtime multiplies them with inputs that it rounds to 8 bits.
ROUNDED = (1e-3, 5e-2)


@dataclass(frozen=True)
class Tolerance:
    """A comparison passes if max |a - b| <= atol + rtol * max |b|, b being the PyTorch value.

    Attributes:
        precision: what the engine computes in (PyTorch always in float32).
    """

    atol: float = 1e-4
    rtol: float = 1e-4
    precision: str = "fp32"

    def __post_init__(self) -> None:
        """Raises InputError for a tolerance that is negative or not finite."""
        for name, value in (("--atol", self.atol), ("--rtol", self.rtol)):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (is_number and 0 <= value < math.inf):
                raise InputError(f"{name} must be a number from 0 on, not {shown(value)}.")

    @classmethod
    def for_precision(
        cls, precision: str, atol: float | None = None, rtol: float | None = None, rounded: bool = False
    ) -> Tolerance:
        """The usual one for 'fp32', 'fp16' or 'bf16', and for rounded weights; what is given replaces a part of it."""
        usual = TOLERANCES[Precision(precision)]
        if rounded:
            usual, precision = tuple(map(max, usual, ROUNDED)), f"int4 {precision}"
        return cls(usual[0] if atol is None else atol, usual[1] if rtol is None else rtol, precision)

    def __str__(self) -> str:
        rule = f"max |engine - torch| <= {self.atol:g} + {self.rtol:g} * max |torch|"
        return rule if self.precision == "fp32" else f"{rule} ({self.precision} engine)"


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
