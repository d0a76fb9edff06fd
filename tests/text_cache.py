"""The decoder graph's text K/V between its calls, in NumPy: what a runtime keeps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sfexport.checkpoint.config import ModelConfig
from sfexport.graphs import names

PADDING = 9.0  # what lies behind a row's valid positions and must not matter


class TextCache:
    """Each row's own K/V; nothing is shared."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        text = config.text
        self._config = config
        self._shape = (text.num_kv_heads, 0, text.head_dim)
        empty = np.zeros(self._shape, np.float32)
        self._rows = [dict.fromkeys(names.past_names(config), empty) for _ in range(rows)]

    def feeds(self) -> dict[str, np.ndarray]:
        """Return the graph's inputs; the capacity is one more than the longest row's length."""
        lengths = [next(iter(row.values())).shape[1] for row in self._rows]
        capacity = max(lengths) + 1
        empty = np.zeros((1, *self._shape), np.float32)
        feeds = dict.fromkeys(names.prefix_names(self._config), empty)
        for name in self._rows[0]:
            widths = [((0, 0), (0, capacity - length), (0, 0)) for length in lengths]
            rows = [row[name] for row in self._rows]
            feeds[name] = np.stack(
                [np.pad(row, w, constant_values=PADDING) for row, w in zip(rows, widths, strict=True)]
            )
        return feeds | {names.PAST_LENGTHS: np.array(lengths, dtype=np.int64)}

    def append(self, outputs: Mapping[str, np.ndarray], valid: np.ndarray) -> None:
        """Add the new K/V of a call's valid positions, bool [rows, S]."""
        for past, new in zip(names.past_names(self._config), names.new_names(self._config), strict=True):
            for row, values, kept in zip(self._rows, outputs[new], valid, strict=True):
                row[past] = np.concatenate([row[past], values[:, kept]], axis=1)
