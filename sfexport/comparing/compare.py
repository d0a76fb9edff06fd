"""Compare two arrays: how far apart they are, and whether that is within a stated tolerance. NumPy only."""

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
# Smallest atol and rtol for rounded weights: ONNX Runtime multiplies them with inputs that it rounds to 8 bits.
ROUNDED = (1e-3, 5e-2)


@dataclass(frozen=True)
class Tolerance:
    """A comparison passes if max |a - b| <= atol + rtol * max |b|, b being the PyTorch value.

    Attributes:
        precision: type that the engine computes in (PyTorch always computes in float32).
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
        """Return the default for 'fp32', 'fp16' or 'bf16', and for rounded weights; atol and rtol override it."""
        default_atol, default_rtol = TOLERANCES[Precision(precision)]
        if rounded:
            default_atol, default_rtol = max(default_atol, ROUNDED[0]), max(default_rtol, ROUNDED[1])
            precision = f"int4 {precision}"
        return cls(default_atol if atol is None else atol, default_rtol if rtol is None else rtol, precision)

    def __str__(self) -> str:
        rule = f"max |engine - torch| <= {self.atol:g} + {self.rtol:g} * max |torch|"
        return rule if self.precision == "fp32" else f"{rule} ({self.precision} engine)"


@dataclass(frozen=True)
class Comparison:
    """How far an engine's output is from PyTorch's.

    Attributes:
        max_abs: largest absolute difference.
        max_rel: largest absolute difference over the largest absolute PyTorch value.
        cosine: cosine of the flattened arrays (1.0 if both are zero).
    """

    graph: str
    name: str
    shape: tuple[int, ...]
    max_abs: float
    max_rel: float
    cosine: float
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON, with infinity, which JSON does not have, as None."""
        values = asdict(self) | {"shape": list(self.shape)}
        return {k: None if v in (np.inf, -np.inf) else v for k, v in values.items()}


def compare(graph: str, name: str, engine: np.ndarray, torch: np.ndarray, tolerance: Tolerance) -> Comparison:
    """Compare an engine's output with PyTorch's; another shape or a value that is not finite fails."""
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
    """Return the comparison with the largest relative difference, from the failed ones if there are any."""
    return max(comparisons, key=lambda c: (not c.passed, c.max_rel))
