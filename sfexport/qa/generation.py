"""Choosing the next token: greedy, temperature, top-k, top-p, repetition penalty. NumPy only.

Order and definitions are those of transformers' generate; defaults come from the checkpoint's
generation_config.json.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sfexport.errors import InputError, SfexportError

DEFAULT_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated.

    Attributes:
        max_new_tokens: length limit of the answer.
        sample: draw from the distribution; False: take the most likely token (greedy).
        temperature, top_k, top_p: used when sampling; top_k 0 and top_p 1.0 switch them off.
        repetition_penalty: > 1 makes tokens of the answer so far less likely (the prompt does not count,
            as in the reference, where it enters as embeddings).
        seed: None draws a new one each time.
        stop_ids: tokens that end the answer.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_ids: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, f"The maximum of new tokens must be at least 1, not {self.max_new_tokens}."),
            (self.temperature > 0, f"The temperature must be positive, not {self.temperature} (0 means greedy)."),
            (self.top_k >= 0, f"top-k must be 0 (off) or more, not {self.top_k}."),
            (0 < self.top_p <= 1, f"top-p must lie in (0, 1], not {self.top_p}."),
            (self.repetition_penalty > 0, f"The repetition penalty must be positive, not {self.repetition_penalty}."),
            (self.seed is None or self.seed >= 0, f"The seed must be 0 or more, not {self.seed}."),
        )
        for passed, message in checks:
            if not passed:
                raise InputError(message)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], fallback_stop: int | None = None) -> GenerationOptions:
        """From generation_config.json's fields; `fallback_stop` ends answers where it names no end token.

        Raises:
            InputError: a field has no meaning.
        """
        stop = config.get("eos_token_id")
        stop = fallback_stop if stop is None else stop
        stop = stop if isinstance(stop, list) else [] if stop is None else [stop]
        try:
            return cls(
                max_new_tokens=config.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS,
                sample=bool(config.get("do_sample")),
                temperature=config.get("temperature") or 1.0,
                top_k=config.get("top_k") or 0,
                top_p=config.get("top_p") or 1.0,
                repetition_penalty=config.get("repetition_penalty") or 1.0,
                stop_ids=frozenset(operator.index(token) for token in stop),
            )
        except (TypeError, InputError) as error:
            raise InputError(
                f"generation_config.json has a field without meaning: {error}", "Correct it and export again."
            ) from None

    def override(self, temperature: float | None = None, **values: Any) -> GenerationOptions:
        """With the values that are not None. A temperature decides: 0 is greedy, more samples."""
        changes = {k: v for k, v in values.items() if v is not None}
        if temperature is not None:
            if temperature < 0:
                raise InputError(f"The temperature must be 0 (greedy) or more, not {temperature}.")
            changes |= {"sample": temperature > 0, "temperature": temperature or 1.0}
        out = replace(self, **changes)
        if not out.sample and ({"top_k", "top_p"} & changes.keys()):
            raise InputError("top-k and top-p act when sampling, and this run is greedy.", "Add --temperature 0.7.")
        return out

    def greedy(self) -> GenerationOptions:
        return replace(self, sample=False, repetition_penalty=1.0)


class Sampler:
    """Draws tokens for one answer; remembers what it drew, for the repetition penalty."""

    def __init__(self, options: GenerationOptions) -> None:
        self.options, self.ids = options, []
        self._random = np.random.default_rng(options.seed)

    def next(self, logits: np.ndarray) -> int:
        """One token id from float32 logits [V].

        Raises:
            SfexportError: a logit is not a number.
        """
        options = self.options
        if np.isnan(logits).any():
            raise SfexportError("The model's logits are not numbers (NaN).", "Its weights may be damaged.")
        scores = penalise(logits.astype(np.float64), self.ids, options.repetition_penalty)
        if options.sample:
            probabilities = distribution(scores, options.temperature, options.top_k, options.top_p)
            token = int(self._random.choice(len(probabilities), p=probabilities))
        else:
            token = int(scores.argmax())
        self.ids.append(token)
        return token


def penalise(scores: np.ndarray, ids: Sequence[int], penalty: float) -> np.ndarray:
    """Scores of tokens already drawn divided by `penalty` (multiplied where negative)."""
    if penalty == 1.0 or not ids:
        return scores
    scores, seen = scores.copy(), np.unique(ids)
    scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    return scores


def distribution(scores: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities after temperature, top-k, then top-p (the smallest set whose mass reaches top_p)."""
    scores = scores / temperature
    if 0 < top_k < len(scores):
        kth = np.partition(scores, -top_k)[-top_k]
        scores = np.where(scores < kth, -np.inf, scores)
    probabilities = _softmax(scores)
    if top_p < 1.0:
        order = np.argsort(probabilities, kind="stable")
        removed = np.cumsum(probabilities[order]) <= 1 - top_p
        removed[-1] = False
        probabilities[order[removed]] = 0
        probabilities /= probabilities.sum()
    return probabilities


def _softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()
