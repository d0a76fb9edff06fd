"""Zero-copy weights: initialisers that point into the checkpoint's safetensors shards.

An ONNX tensor with external data is a file name, an offset and a length; a safetensors shard is a header
followed by raw tensors. So nothing is copied, and writing a graph costs kilobytes whatever the model's size.
"""

from __future__ import annotations

import onnx_ir as ir

from sfexport.checkpoint import Checkpoint
from sfexport.errors import CheckpointError

DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


class Weights:
    """A checkpoint's tensors as onnx-ir tensors. Locations are the shards' real file names."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors

    def tensor(self, name: str) -> ir.ExternalTensor:
        """Raises CheckpointError if the checkpoint has no such tensor."""
        if name not in self._tensors:
            raise CheckpointError(f"The checkpoint has no tensor '{name}', which the graph needs.")
        place = self._tensors[name]
        return ir.ExternalTensor(
            location=place.shard.name,
            offset=place.offset,
            length=place.length,
            dtype=DTYPES[place.dtype],
            shape=ir.Shape(place.shape),
            name=name,
            base_dir=place.shard.parent,
        )
