"""Choose the next token: the options of generation, and the sampler that follows them. NumPy only.

Order and definitions are those of transformers' generate; defaults come from the checkpoint's
generation_config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from sfexport.checkpoint.generation_config import FILE, HINT, SAMPLING, read_generation_config
from sfexport.errors import InputError, SfexportError
from sfexport.fields import LARGEST, shown
from sfexport.qa import logits as change
from sfexport.qa.logits import penalise, softmax
from sfexport.qa.option_rules import RULES, is_number, problem_of, spoken

__all__ = ["DEFAULT_MAX_NEW_TOKENS", "GenerationOptions", "Sampler", "distribution", "penalise"]

DEFAULT_MAX_NEW_TOKENS = 256
DEFAULT_TOP_K = 50  # transformers'


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated. Names and meanings are those of transformers' GenerationConfig.

    Attributes:
        max_new_tokens: length limit of the answer.
        sample: draw from the distribution; False: take the most likely token (greedy).
        temperature, top_k, top_p: used when sampling; top_k 0 and top_p 1.0 switch them off.
        repetition_penalty: > 1 makes tokens of the answer so far less likely (the prompt does not count,
            as in the reference, where it enters as embeddings).
        seed: None draws a new one each time.
        stop_ids: tokens that end the answer.
        max_length, min_length: limits of prompt and answer together; max_length comes before max_new_tokens.
        min_p, top_h, typical_p, epsilon_cutoff, eta_cutoff: further filters when sampling; None, 1.0 or 0 is off.
        no_repeat_ngram_size: no n-gram of this size occurs twice in an answer; 0 is off.
        bad_words, sequence_bias: token sequences that are forbidden, or made likelier.
        forced_first: the answer's second token (transformers' forced_bos_token_id where the prompt is embeddings).
        forced_last: tokens one of which an answer of full length ends with.
        decay: (start, factor): ending becomes likelier after `start` tokens.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    sample: bool = False
    temperature: float = 1.0
    top_k: int = DEFAULT_TOP_K
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_ids: frozenset[int] = field(default_factory=frozenset)
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    suppress_tokens: frozenset[int] = frozenset()
    begin_suppress_tokens: frozenset[int] = frozenset()
    forced_first: int | None = None
    forced_last: frozenset[int] = frozenset()
    decay: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False

    def __post_init__(self) -> None:
        for name in RULES:
            if problem := problem_of(name, getattr(self, name)):
                raise InputError(problem)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], fallback_stop: int | None = None, model_stop: Any = None
    ) -> GenerationOptions:
        """Read the options from generation_config.json's fields.

        Args:
            fallback_stop: token that ends answers if the fields name none.
            model_stop: config.json's end tokens, used like `fallback_stop`.

        Raises:
            InputError: a field has no meaning, or asks for something that is not supported.
        """
        read = read_generation_config(config)
        stop = read.eos_token_id
        if stop is None:
            own = model_stop if isinstance(model_stop, list) else [model_stop]
            stop = [token for token in (fallback_stop, *own) if type(token) is int and token >= 0]
        limit = read.max_new_tokens or (DEFAULT_MAX_NEW_TOKENS if read.max_length is None else LARGEST)
        sampling = {name: getattr(read, name) for name in SAMPLING}
        if not read.do_sample and read.temperature == 0:  # a way of saying greedy
            sampling["temperature"] = 1.0
        try:
            return cls(
                max_new_tokens=limit,
                max_length=None if read.max_new_tokens else read.max_length,
                sample=read.do_sample,
                **sampling,
                repetition_penalty=read.repetition_penalty,
                stop_ids=_ids(stop),
                min_new_tokens=read.min_new_tokens or 0,
                min_length=read.min_length if read.min_new_tokens is None else 0,
                no_repeat_ngram_size=read.no_repeat_ngram_size,
                bad_words=tuple(map(tuple, read.bad_words_ids or ())),
                sequence_bias=tuple((tuple(ids), bias) for ids, bias in read.sequence_bias or ()),
                suppress_tokens=frozenset(read.suppress_tokens or ()),
                begin_suppress_tokens=frozenset(read.begin_suppress_tokens or ()),
                forced_first=read.forced_bos_token_id,
                forced_last=_ids(read.forced_eos_token_id),
                decay=read.exponential_decay_length_penalty,
                remove_invalid_values=read.remove_invalid_values,
                renormalize_logits=read.renormalize_logits,
            )
        except InputError as error:
            raise InputError(f"{FILE} has a field without meaning: {error}", HINT) from None

    def override(self, temperature: float | None = None, **values: Any) -> GenerationOptions:
        """Return the options with the values that are not None; temperature 0 is greedy, a higher one samples."""
        changes = {k: v for k, v in values.items() if v is not None}
        if temperature is not None:
            if not is_number(temperature) or not temperature >= 0:
                raise InputError(f"The temperature must be 0 (greedy) or more, not {shown(temperature)}.")
            changes |= {"sample": bool(temperature > 0), "temperature": temperature or 1.0}
        if "max_new_tokens" in changes:
            changes.setdefault("max_length", None)
        out = replace(self, **changes)
        idle = sorted(changes.keys() & (set(SAMPLING) - {"temperature"}))
        if not out.sample and idle:
            raise InputError(
                f"{' and '.join(map(spoken, idle))} act when sampling, and this run is greedy.",
                "Add --temperature 0.7.",
            )
        return out

    def greedy(self) -> GenerationOptions:
        """Return greedy options without any change of logits, with the same limits and stop tokens."""
        return GenerationOptions(max_new_tokens=self.max_new_tokens, max_length=self.max_length, stop_ids=self.stop_ids)

    @property
    def takes_best(self) -> bool:
        """Whether each token is the one with the largest logit, whatever came before."""
        plain = self.greedy()
        named = (f.name for f in fields(plain) if f.name not in (*SAMPLING, "seed", "renormalize_logits"))
        return all(getattr(self, name) == getattr(plain, name) for name in named)

    def check_tokens(self, size: int) -> None:
        """Raise InputError for a biased, forbidden or forced token beyond a vocabulary of `size` tokens."""
        sequences = [*self.bad_words, *(ids for ids, _ in self.sequence_bias), self.forced_last]
        forced = [] if self.forced_first is None else [self.forced_first]
        largest = max([*forced, *(token for ids in sequences for token in ids)], default=0)
        if largest >= size:
            raise InputError(f"{FILE} has the token {largest}, and the tokenizer has {size:,} tokens.", HINT)

    def limit(self, prompt: int) -> int:
        """Return the largest number of tokens of an answer to a prompt of `prompt` positions.

        Raises:
            InputError: max_length leaves no room for an answer.
        """
        if self.max_length is None:
            return self.max_new_tokens
        if self.max_length <= prompt:
            raise InputError(
                f"The prompt has {prompt} positions and max_length is {self.max_length}: no answer fits.",
                f"Use --max-new-tokens, or correct max_length in {FILE} and export again.",
            )
        return min(self.max_new_tokens, self.max_length - prompt)


class Sampler:
    """Draws tokens for one answer, and remembers them for the processors that depend on them."""

    def __init__(self, options: GenerationOptions, prompt: int = 0) -> None:
        """Start an answer after `prompt` positions, which max_length and min_length count too."""
        self.options, self.ids = options, list[int]()
        self.limit = options.limit(prompt)
        self._min_tokens = max(options.min_new_tokens, options.min_length - prompt)
        self._random = np.random.default_rng(options.seed)
        self.takes_best = options.takes_best

    def next(self, logits: np.ndarray) -> int:
        """Draw one token id from float32 logits [V].

        Raises:
            SfexportError: a logit is not a number, or no token is allowed.
        """
        if np.isnan(logits).any() and not self.options.remove_invalid_values:
            raise SfexportError("The model's logits are not numbers (NaN).", "Its weights may be damaged.")
        scores = self.scores(logits)
        if scores.max() == -np.inf:
            raise SfexportError(
                f"No token is allowed: all are forbidden by {FILE} (suppress_tokens, bad_words_ids and the like).",
                HINT,
            )
        if self.options.sample:
            token = int(self._random.choice(len(scores), p=self._probabilities(scores)))
        else:
            token = int(scores.argmax())
        return self.take(token)

    def take(self, token: int) -> int:
        """Remember a token that was chosen, and return it."""
        self.ids.append(token)
        return token

    def _probabilities(self, scores: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            probabilities: np.ndarray = softmax(scores).astype(np.float64)
        if not np.isfinite(probabilities).all():
            raise SfexportError(
                "The model's logits are infinite, so no token can be drawn.",
                "Its weights may be damaged, or the temperature is too small.",
            )
        probabilities /= probabilities.sum()
        return probabilities

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Apply all processors to the logits, in transformers' order; tokens that are not allowed get -inf."""
        options, ids = self.options, self.ids
        scores, step = logits.astype(np.float32), len(self.ids)
        if options.sequence_bias:
            scores = scores + change.biases(options.sequence_bias, ids, len(scores))
        scores = penalise(scores, ids, options.repetition_penalty)
        scores = change.forbid(scores, change.repeated(ids, options.no_repeat_ngram_size))
        if words := [word for word in options.bad_words if len(word) > 1 or word[0] not in options.stop_ids]:
            scores = scores + change.biases([(word, -math.inf) for word in words], ids, len(scores))
        if step < self._min_tokens:
            scores = change.forbid(scores, options.stop_ids)
        if options.forced_first is not None and step == 1:
            scores = change.force(scores, [options.forced_first])
        if options.forced_last and step == self.limit - 1:
            scores = change.force(scores, options.forced_last)
        if options.remove_invalid_values:
            scores = change.replace_invalid(scores)
        if options.decay:
            scores = change.decay(scores, options.stop_ids, step, *options.decay)
        scores = change.forbid(scores, options.suppress_tokens)
        if step == (0 if options.forced_first is None else 1):
            scores = change.forbid(scores, options.begin_suppress_tokens)
        if options.sample and scores.max() > -np.inf:
            scores = filter_scores(scores, options)
        return change.log_softmax(scores) if options.renormalize_logits else scores


def filter_scores(scores: np.ndarray, options: GenerationOptions) -> np.ndarray:
    """Apply what acts when sampling: temperature, then the filters in transformers' order."""
    if options.temperature != 1.0:
        scores = scores / scores.dtype.type(options.temperature)
    if options.top_h is not None:
        scores = change.keep_top_h(scores, options.top_h)
    if options.top_k:
        scores = change.keep_top_k(scores, options.top_k)
    if options.top_p < 1.0:
        scores = change.keep_top_p(scores, options.top_p)
    if options.min_p is not None:
        scores = change.keep_min_p(scores, options.min_p)
    if options.typical_p < 1.0:
        scores = change.keep_typical(scores, options.typical_p)
    if options.epsilon_cutoff:
        scores = change.keep_epsilon(scores, options.epsilon_cutoff)
    return change.keep_eta(scores, options.eta_cutoff) if options.eta_cutoff else scores


def distribution(scores: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Return the probabilities after temperature, top-k, then top-p (the smallest set whose mass reaches top_p)."""
    return softmax(filter_scores(scores, GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p)))


def _ids(tokens: int | Sequence[int] | None) -> frozenset[int]:
    return frozenset([tokens] if isinstance(tokens, int) else tokens or ())
