"""What a backend is: the three graphs as three calls on NumPy arrays, K/V staying wherever the backend keeps it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfexport.checkpoint.config import ModelConfig

VISION_CHUNK = 8  # most frames that one call of encode_frames gets: engines are built for it


@dataclass(frozen=True)
class KeyValues:
    """K and V per layer, in a backend's own tensors: [B, kv heads, length, head_dim] each, never changed in place.

    Attributes:
        tensors: key and value by layer: k0, v0, k1, v1, ...
        length: positions (or slow tokens) held.
    """

    tensors: tuple[Any, ...]
    length: int


@dataclass(frozen=True)
class DecoderStep:
    """One call of the decoder: a prompt, a piece of one, or one token.

    Attributes:
        inputs_embeds: float32 [1, S, H].
        start: position of the first embedding; equals the length of `past`.
        slow_attends: bool [S], positions that query the slow tokens.
        past, slow: what came before; None: nothing.
    """

    inputs_embeds: np.ndarray
    start: int
    slow_attends: np.ndarray
    past: KeyValues | None = None
    slow: KeyValues | None = None


class Backend(ABC):
    """Runs one model. Batch 1: a session is one video."""

    name: str
    config: ModelConfig

    @abstractmethod
    def encode_frames(self, pixel_values: np.ndarray, single_image: bool) -> np.ndarray:
        """float32 [N, 3, S, S] -> slow tokens, float32 [N, P, H]; unpooled [1, n, H] for a single image."""

    @abstractmethod
    def compress(self, slow_tokens: np.ndarray) -> tuple[np.ndarray, KeyValues | None]:
        """All frames' slow tokens [T, P, H] -> fast tokens, float32 [F * P', H], and the hybrid layers' slow K/V.

        The K/V is None for a model without hybrid layers.
        """

    @abstractmethod
    def decode(self, step: DecoderStep) -> tuple[np.ndarray, KeyValues]:
        """-> logits of the last position, float32 [V], and K/V including the step's positions."""

    @abstractmethod
    def to_numpy(self, tensors: KeyValues) -> list[np.ndarray]:
        """K/V on the host, for comparison and for saving."""

    @abstractmethod
    def from_numpy(self, arrays: list[np.ndarray]) -> KeyValues:
        """The opposite of to_numpy."""
