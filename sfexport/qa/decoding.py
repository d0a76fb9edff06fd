"""Decode the answers to several questions about one video as rows of one batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sfexport.engines.interface import Backend, Cache, DecoderStep, KeyValues
from sfexport.qa.generation import Sampler
from sfexport.qa.prompt import ChatTokenizer

OnText = Callable[[str], None]
Embed = Callable[[list[int]], np.ndarray]


@dataclass
class Row:
    """One answer while it is generated.

    Attributes:
        logits: float32 [V], of the position before the next token; not kept where `best` is enough.
        key_values: K/V of the question's positions.
        sampler: chooses tokens and keeps them.
        stream: takes the tokens' text.
        seconds: seconds of decoding until the answer's end.
        best: token with the largest logit; None: to be found in `logits`.
    """

    logits: np.ndarray
    key_values: KeyValues
    sampler: Sampler
    stream: TextStream
    seconds: float = 0.0
    best: int | None = None

    def choose(self, vocabulary: int) -> bool:
        """Choose the next token; return whether the answer goes on.

        Args:
            vocabulary: number of the tokenizer's tokens; logits beyond it are padding, which the reference cuts off.
        """
        best, sampler = self.best, self.sampler
        token = sampler.next(self.logits[:vocabulary]) if best is None else sampler.take(best)
        if token in self.sampler.options.stop_ids:
            return False
        self.stream.add(token)
        return len(self.sampler.ids) < self.sampler.limit


class Decoder:
    """Generates the answers of several rows together; a row that has ended leaves the batch.

    Args:
        prefix: K/V of the video's part of the prompt, which all rows share.
        slow: K/V of the slow tokens; None: answer tokens do not attend to them.
    """

    def __init__(
        self, backend: Backend, embed: Embed, tokenizer: ChatTokenizer, prefix: KeyValues, slow: KeyValues | None
    ) -> None:
        self._backend, self._embed, self._prefix, self._slow = backend, embed, prefix, slow
        self._vocabulary = tokenizer.vocabulary_size
        self._cache: Cache | None = None

    def run(self, rows: Sequence[Row]) -> None:
        """Generate until every row has ended."""
        start, going = time.perf_counter(), list(rows)
        while True:
            goes_on = [row.choose(self._vocabulary) for row in going]
            for row in [row for row, more in zip(going, goes_on, strict=True) if not more]:
                row.stream.close()
                row.seconds = time.perf_counter() - start
            kept = [i for i, more in enumerate(goes_on) if more]
            if not kept:
                return
            going = [going[i] for i in kept]
            self._cache = self._with_room(going, kept)
            self._step(going)

    def _with_room(self, going: Sequence[Row], kept: list[int]) -> Cache:
        """Return a cache of the rows that go on, with room for one more position."""
        if self._cache is None:
            lengths = [row.key_values.length for row in going]
            cache = self._backend.new_cache(len(going), self._backend.capacity_for(max(lengths) + 1))
            for i, row in enumerate(going):
                cache.append(row.key_values, i)
            return cache
        needed = self._backend.capacity_for(int(self._cache.lengths[kept].max()) + 1)
        if len(kept) == len(self._cache.lengths) and needed <= self._cache.capacity:
            return self._cache
        return self._cache.resize(kept, needed)

    def _step(self, rows: Sequence[Row]) -> None:
        assert self._cache is not None  # made by _with_room
        embeds = self._embed([row.sampler.ids[-1] for row in rows])[:, None]
        attends = np.array([self._slow is not None])
        step = DecoderStep(embeds, attends, self._prefix, self._cache, self._slow)
        logits, new = self._backend.decode_later(step)
        self._cache.append(new)
        best = logits.best() if all(row.sampler.takes_best for row in rows) else None
        if best is not None and (best < self._vocabulary).all():
            for row, token in zip(rows, best, strict=True):
                row.best = int(token)
            return
        for row, values in zip(rows, logits.values(), strict=True):
            row.best, row.logits = None, values


@dataclass
class TextStream:
    """Turns token ids into pieces of text, and holds back bytes that do not form a character yet.

    The last piece is empty.
    """

    tokenizer: ChatTokenizer
    on_text: OnText
    ids: list[int] = field(default_factory=list)
    sent: int = 0

    def add(self, token: int) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._send(text)

    def close(self) -> None:
        self._send(self.tokenizer.decode(self.ids))
        self.on_text("")

    def _send(self, text: str) -> None:
        if len(text) > self.sent:
            self.on_text(text[self.sent :])
            self.sent = len(text)
