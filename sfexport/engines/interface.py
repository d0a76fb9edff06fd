"""Define the interface of a backend: three graphs as three calls on NumPy arrays, and the arrays that each graph takes.

K/V stay where the backend keeps them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfexport.checkpoint.config import FastPathConfig, ModelConfig
from sfexport.checkpoint.fast_path import cell_weights, frame_weights
from sfexport.graphs import names

VISION_CHUNK = 8  # largest number of frames that one call of encode_frames gets: engines are built for it


# Capacities of a cache: a step's attention runs over all of it, so it grows with what it holds.
FIRST_CAPACITY = 64


@dataclass(frozen=True)
class KeyValues:
    """Hold K and V per layer in a backend's own tensors, [rows, kv heads, length, head_dim] each; never changed.

    Attributes:
        tensors: key and value by layer: k0, v0, k1, v1, ...
        length: number of positions (or slow tokens) held.
    """

    tensors: tuple[Any, ...]
    length: int


class Cache(ABC):
    """Hold the K/V of several rows' own positions, [rows, kv heads, capacity, head_dim] each; changed in place.

    Attributes:
        lengths: int64 [rows], number of valid positions of each row; they come first.
        capacity: largest number of positions of a row.
    """

    lengths: np.ndarray
    capacity: int

    @abstractmethod
    def append(self, new: KeyValues, row: int | None = None) -> None:
        """Copy the K/V of new positions behind the valid ones.

        Args:
            new: K/V of all rows, or of the one named; each gets new.length positions, for which there must be room.
            row: the row that `new` belongs to; None: `new` has as many rows as the cache.
        """

    @abstractmethod
    def resize(self, rows: Sequence[int], capacity: int) -> Cache:
        """Copy some rows into a new cache of another capacity, at least as large as their lengths."""


@dataclass(frozen=True)
class DecoderStep:
    """Describe one call of the decoder: for a prompt, a piece of one, or one token of each of several rows.

    Attributes:
        inputs_embeds: float32 [rows, S, H].
        slow_attends: bool [S], True for positions that query the slow tokens, in every row.
        prefix: K/V of one row that come before, shared by all rows; None: there are none.
        cache: K/V of the rows' own positions between the prefix and this step; None: there are none. Not changed.
        slow: K/V of the slow tokens of one video; None: there are none, or no position queries them.
    """

    inputs_embeds: np.ndarray
    slow_attends: np.ndarray
    prefix: KeyValues | None = None
    cache: Cache | None = None
    slow: KeyValues | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.inputs_embeds)

    @property
    def lengths(self) -> np.ndarray:
        """Numbers of valid positions in the cache, int64 [rows]."""
        return np.zeros(self.rows, dtype=np.int64) if self.cache is None else self.cache.lengths

    @property
    def positions(self) -> np.ndarray:
        """Positions of the embeddings, int64 [rows, S]."""
        start = self.lengths + (self.prefix.length if self.prefix else 0)
        return start[:, None] + np.arange(self.inputs_embeds.shape[1], dtype=np.int64)


def decoder_feeds(step: DecoderStep, config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the decoder graph's inputs by name, without the K/V, which are in the backend's own memory.

    float32 inputs_embeds [rows, S, H], int64 position_ids [rows, S], bool attention_mask [rows, S], int64 past_lengths
    [rows]; with hybrid layers also bool slow_attends [rows, S] and int64 slow_lengths [1].
    """
    shape = step.inputs_embeds.shape[:2]
    feeds = {
        names.EMBEDS: step.inputs_embeds,
        names.POSITIONS: step.positions,
        names.MASK: np.ones(shape, dtype=bool),
        names.PAST_LENGTHS: step.lengths,
    }
    if config.slow_fast.hybrid_layers:
        feeds[names.SLOW_ATTENDS] = np.broadcast_to(step.slow_attends, shape)
        feeds[names.SLOW_LENGTHS] = np.array([step.slow.length if step.slow else 0], dtype=np.int64)
    return feeds


def compressor_feeds(slow_tokens: np.ndarray, fast: FastPathConfig) -> dict[str, np.ndarray]:
    """Return the compressor graph's inputs by name for slow tokens, float32 [T, P, H]."""
    frames, cells, _ = slow_tokens.shape
    feeds = {names.SLOW_TOKENS: slow_tokens, names.FRAME_WEIGHTS: frame_weights(frames, fast)}
    if fast.spatial_stride > 1:
        feeds[names.CELL_WEIGHTS] = cell_weights(cells, fast.spatial_stride)
    return feeds


class Logits:
    """Hold a step's logits until the backend's next call, where the backend has them."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def best(self) -> np.ndarray | None:
        """Return each row's token with the largest logit, int64 [rows].

        None: the backend does not know it without the values, or one of these is not finite.
        """
        return None

    def values(self) -> np.ndarray:
        """Return the logits, float32 [rows, V]."""
        return self._values


class Backend(ABC):
    """Run the three graphs of one model. A call is about one video; the decoder takes several rows about it."""

    name: str
    config: ModelConfig
    max_rows: int | None = None  # rows that the decoder takes; None: any number

    @abstractmethod
    def encode_frames(self, pixel_values: np.ndarray, single_image: bool) -> np.ndarray:
        """Encode frames, float32 [N, 3, S, S], to slow tokens, float32 [N, P, H].

        A single image gives its tokens unpooled, [1, n, H].
        """

    @abstractmethod
    def compress(self, slow_tokens: np.ndarray) -> tuple[np.ndarray, KeyValues | None]:
        """Make fast tokens, float32 [F * P', H], and the hybrid layers' slow K/V from all slow tokens [T, P, H].

        The K/V is None for a model without hybrid layers.
        """

    @abstractmethod
    def decode(self, step: DecoderStep) -> tuple[np.ndarray, KeyValues]:
        """Return the last position's logits, float32 [rows, V], and the K/V of the step's own positions."""

    def decode_later(self, step: DecoderStep) -> tuple[Logits, KeyValues]:
        """Decode without waiting for logits that may not be needed on the host."""
        logits, new = self.decode(step)
        return Logits(logits), new

    @abstractmethod
    def join(self, parts: Sequence[KeyValues]) -> KeyValues:
        """Make one K/V of those of consecutive pieces of a row."""

    @abstractmethod
    def new_cache(self, rows: int, capacity: int) -> Cache:
        """Make an empty cache."""

    def capacity_for(self, length: int) -> int:
        """Return the capacity of a cache for `length` positions: the next of 64, 128, 256, ...

        Raises:
            InputError: the engines are built for fewer positions.
        """
        capacity = FIRST_CAPACITY
        while capacity < length:
            capacity *= 2
        return capacity

    @abstractmethod
    def to_numpy(self, tensors: KeyValues) -> list[np.ndarray]:
        """Copy K/V to the host, for comparison and for saving."""

    @abstractmethod
    def from_numpy(self, arrays: list[np.ndarray]) -> KeyValues:
        """Make K/V of this backend from arrays, the opposite of to_numpy."""
