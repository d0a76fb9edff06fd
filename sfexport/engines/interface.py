"""The interface of a backend: three graphs as three calls on NumPy arrays, and the arrays that each graph takes.

K/V stay where the backend keeps them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfexport.checkpoint.config import FastPathConfig, ModelConfig
from sfexport.checkpoint.fast_path import cell_weights, frame_weights
from sfexport.graphs import names

VISION_CHUNK = 8  # largest number of frames that one call of encode_frames gets: engines are built for it


@dataclass(frozen=True)
class KeyValues:
    """Hold K and V per layer in a backend's own tensors, [B, kv heads, length, head_dim] each; never changed in place.

    Attributes:
        tensors: key and value by layer: k0, v0, k1, v1, ...
        length: number of positions (or slow tokens) held.
    """

    tensors: tuple[Any, ...]
    length: int


@dataclass(frozen=True)
class DecoderStep:
    """Describe one call of the decoder: for a prompt, a piece of one, or one token.

    Attributes:
        inputs_embeds: float32 [1, S, H].
        start: position of the first embedding; equals the length of `past`.
        slow_attends: bool [S], True for positions that query the slow tokens.
        past: K/V of the positions before; None: there are none.
        slow: K/V of the slow tokens; None: there are none, or no position queries them.
    """

    inputs_embeds: np.ndarray
    start: int
    slow_attends: np.ndarray
    past: KeyValues | None = None
    slow: KeyValues | None = None

    @property
    def end(self) -> int:
        """Number of positions after the step."""
        return self.start + int(self.inputs_embeds.shape[1])


def decoder_feeds(step: DecoderStep, config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the decoder graph's inputs by name, without the K/V, which are in the backend's own memory.

    float32 inputs_embeds [1, S, H], int64 position_ids [1, S], bool attention_mask [1, start + S]; with hybrid layers
    also bool slow_attends [1, S] and int64 slow_lengths [1].
    """
    feeds = {
        names.EMBEDS: step.inputs_embeds,
        names.POSITIONS: np.arange(step.start, step.end, dtype=np.int64)[None],
        names.MASK: np.ones((1, step.end), dtype=bool),
    }
    if config.slow_fast.hybrid_layers:
        feeds[names.SLOW_ATTENDS] = step.slow_attends[None]
        feeds[names.SLOW_LENGTHS] = np.array([step.slow.length if step.slow else 0], dtype=np.int64)
    return feeds


def compressor_feeds(slow_tokens: np.ndarray, fast: FastPathConfig) -> dict[str, np.ndarray]:
    """Return the compressor graph's inputs by name for slow tokens, float32 [T, P, H]."""
    frames, cells, _ = slow_tokens.shape
    feeds = {names.SLOW_TOKENS: slow_tokens, names.FRAME_WEIGHTS: frame_weights(frames, fast)}
    if fast.spatial_stride > 1:
        feeds[names.CELL_WEIGHTS] = cell_weights(cells, fast.spatial_stride)
    return feeds


class Backend(ABC):
    """Run the three graphs of one model. The batch is 1: a session is one video."""

    name: str
    config: ModelConfig

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
        """Return the last position's logits, float32 [V], and the K/V with the step's positions added."""

    @abstractmethod
    def to_numpy(self, tensors: KeyValues) -> list[np.ndarray]:
        """Copy K/V to the host, for comparison and for saving."""

    @abstractmethod
    def from_numpy(self, arrays: list[np.ndarray]) -> KeyValues:
        """Make K/V of this backend from arrays, the opposite of to_numpy."""
