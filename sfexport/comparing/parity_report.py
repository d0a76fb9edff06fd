"""The result of comparing engines with PyTorch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sfexport.comparing.compare import Comparison, Tolerance


@dataclass(frozen=True)
class AnswerPair:
    """One question's greedy answers by the engines and by PyTorch.

    Attributes:
        engine: the engines' answer.
        torch: PyTorch's answer.
        tokens: number of tokens in PyTorch's answer.
        equal_tokens: number of tokens before the first that differs.
        passed: the tokens are the same, or the same up to a tie.
        tie: by how much PyTorch's logit of its own first differing token exceeds that of the engines' token, if two
            logits may be off by so much within the tolerance; tokens after a tie are not comparable. Else None.
    """

    mode: str
    question: str
    engine: str
    torch: str
    tokens: int
    equal_tokens: int
    passed: bool
    tie: float | None = None


@dataclass(frozen=True)
class ParityReport:
    """The comparisons of engines with PyTorch, which gets the engines' rounded weights where they are rounded.

    Attributes:
        backend: name of the engines' backend.
        frames: number of frames of the video.
        rounding: PyTorch's prefill logits with rounded weights, compared with those with the checkpoint's own; says
            what rounding costs, not whether the engines are right.
        oracle: the reference that the engines were compared with, as shown to people.
        checkpoint: directory that PyTorch's weights were read from.
        is_copy: the weights are the bundle's own copy, since the checkpoint that was exported is gone.
    """

    backend: str
    tolerance: Tolerance
    frames: int
    comparisons: list[Comparison]
    answers: list[AnswerPair]
    rounding: Comparison | None = None
    oracle: str = "PyTorch"
    checkpoint: str | None = None
    is_copy: bool = False

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.comparisons) and all(a.passed for a in self.answers)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "backend": self.backend,
            "oracle": self.oracle,
            "checkpoint": self.checkpoint,
            "is_copy": self.is_copy,
            "frames": self.frames,
            "tolerance": {**asdict(self.tolerance), "rule": str(self.tolerance)},
            "comparisons": [c.to_json() for c in self.comparisons],
            "answers": [asdict(a) for a in self.answers],
            "rounding": None if self.rounding is None else self.rounding.to_json(),
        }
