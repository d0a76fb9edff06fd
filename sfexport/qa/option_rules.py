"""Rules for the values of generation options, from configuration files, Python callers and the command line."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sfexport.fields import LARGEST, shown

# Scores divided by a temperature or a penalty outside this range may leave float32's range.
_SMALL, _LARGE = 1e-30, 1e30


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


def is_number(value: Any, whole: bool = False) -> bool:
    """Return whether a value is a finite number, and whole if `whole`; a bool is not a number."""
    kind = numbers.Integral if whole else numbers.Real
    return isinstance(value, kind) and not isinstance(value, bool) and _finite(value)


def _count(name: str, minimum: int, what: str) -> _Rule:
    return _Rule(name, lambda v: is_number(v, whole=True) and minimum <= v <= LARGEST, what)


def _share(name: str, closed_below: bool, closed_above: bool, optional: bool = False) -> _Rule:
    """Make the rule of a number from 0 to 1, with the ends included or not."""

    def test(v: Any) -> bool:
        if v is None and optional:
            return True
        return is_number(v) and (0 < v < 1 or (v == 0 and closed_below) or (v == 1 and closed_above))

    return _Rule(name, test, f"must lie in {'(['[closed_below]}0, 1{')]'[closed_above]}")


def _positive(name: str) -> _Rule:
    return _Rule(name, lambda v: is_number(v) and _SMALL <= v <= _LARGE, "must be positive (1e-30 to 1e30)")


def _tokens(name: str) -> _Rule:
    def test(v: Any) -> bool:
        return isinstance(v, (frozenset, set)) and all(is_number(token, whole=True) for token in v)

    return _Rule(name, test, "must be a set of token ids")


@dataclass(frozen=True)
class _Rule:
    """The rule of one option.

    Attributes:
        test: returns whether a value is allowed.
        what: the message's words about an allowed value.
    """

    name: str
    test: Callable[[Any], bool]
    what: str


RULES = {
    rule.name: rule
    for rule in (
        _count("max_new_tokens", 1, "must be at least 1"),
        _Rule("max_length", lambda v: v is None or (is_number(v, whole=True) and v >= 1), "must be at least 1"),
        _count("min_new_tokens", 0, "must be 0 or more"),
        _count("min_length", 0, "must be 0 or more"),
        _positive("temperature"),
        _count("top_k", 0, "must be 0 (off) or more, and whole"),
        _share("top_p", False, True),
        _share("min_p", True, True, optional=True),
        _share("top_h", False, True, optional=True),
        _share("typical_p", False, True),
        _share("epsilon_cutoff", True, False),
        _share("eta_cutoff", True, False),
        _positive("repetition_penalty"),
        _count("no_repeat_ngram_size", 0, "must be 0 (off) or more, and whole"),
        _Rule("seed", lambda v: v is None or (is_number(v, whole=True) and v >= 0), "must be 0 or more, and whole"),
        *(_tokens(name) for name in ("stop_ids", "suppress_tokens", "begin_suppress_tokens", "forced_last")),
        *(
            _Rule(name, lambda v: isinstance(v, bool), "must be True or False")
            for name in ("sample", "remove_invalid_values", "renormalize_logits")
        ),
    )
}
_SPOKEN = {"max_new_tokens": "maximum of new tokens", "top_k": "top-k", "top_p": "top-p"}


def spoken(name: str) -> str:
    """Return an option's name for a sentence."""
    return _SPOKEN.get(name, name.replace("_", " "))


def problem_of(name: str, value: Any) -> str | None:
    """Return a sentence about a wrong value, or None."""
    rule = RULES[name]
    return None if rule.test(value) else f"The {spoken(name)} {rule.what}, not {shown(value)}."
