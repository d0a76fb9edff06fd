"""Read token embeddings row by row from the mapped shard: the table stays outside the decoder graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sfexport.checkpoint.checkpoint import Tensor
from sfexport.errors import InputError


class EmbeddingTable:
    """Returns the embeddings of token ids. Takes no memory but the rows' own pages."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """Return the embeddings, float32 [n, H].

        Raises:
            InputError: an id outside the table.
        """
        index = np.asarray(ids, dtype=np.int64)
        rows = self._tensor.shape[0]
        outside = index[(index < 0) | (index >= rows)]
        if len(outside):
            raise InputError(
                f"Token id {outside[0]} is outside the model's vocabulary of {rows}.",
                "The tokenizer.json belongs to another model.",
            )
        return self._tensor.rows(index)
