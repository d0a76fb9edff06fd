"""Zero-copy weights: initialisers that point into safetensors files, the checkpoint's own shards or a bundle's.

An ONNX tensor with external data is a file name, an offset and a length; a safetensors shard is a header
followed by raw tensors. So nothing is copied, and writing a graph costs kilobytes whatever the model's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from sfexport.checkpoint.checkpoint import Tensor
from sfexport.checkpoint.config import TextConfig
from sfexport.dtypes import Precision, from_onnx
from sfexport.errors import CheckpointError

Rows = tuple[int, int]


@dataclass(frozen=True)
class Packed:
    """A matrix stored transposed, [in, out], as integers with scales.

    Attributes:
        codes: I8 [in, out], or two 4-bit codes to a byte, U8 [in, out / 2].
        scales: [in / block, out], or [out] where `block` is None: one scale per output.
        zeros: unsigned codes that stand for 0, as the codes are stored; None: codes are signed and 0 is 0.
    """

    codes: Tensor
    scales: Tensor
    block: int | None
    zeros: Tensor | None = None

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype == "I8" else 4

    @property
    def shape(self) -> tuple[int, int]:
        inputs, width = self.codes.shape
        return inputs, width * 8 // self.bits

    def initializers(self) -> list[ir.ExternalTensor]:
        """Make the inputs of a DequantizeLinear."""
        signed = ir.DataType.INT4 if self.zeros is None else ir.DataType.UINT4
        dtype = ir.DataType.INT8 if self.bits == 8 else signed
        out = [_external(self.codes.name, self.codes, dtype, self.shape)]
        out.append(
            _external(
                self.scales.name, self.scales, Precision.from_safetensors(self.scales.dtype).onnx, self.scales.shape
            )
        )
        if self.zeros is not None:
            out.append(_external(self.zeros.name, self.zeros, dtype, self.scales.shape))
        return out


def part_name(name: str, rows: Rows | None) -> str:
    """Name a tensor, or some of its rows, in a graph."""
    return name if rows is None else f"{name}[{rows[0]}:{rows[1]}]"


class Weights:
    """Stored tensors as onnx-ir tensors. Locations are the files' real names.

    Args:
        packed: quantised matrices by part_name; each stands for the tensor, or the rows, of that name.
    """

    def __init__(self, tensors: Mapping[str, Tensor], packed: Mapping[str, Packed] | None = None) -> None:
        self._tensors, self._packed = tensors, packed or {}

    @classmethod
    def of_graph(cls, model: onnx.ModelProto, directory: Path) -> Weights:
        """Find the weights of a graph that was written from others, for writing it in another form.

        Args:
            directory: holds the files that the graph's external data names.
        """
        places = {t.name: _place(t, directory) for t in model.graph.initializer if _is_external(t)}
        packed = {}
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear" and places.keys() >= set(node.input):
                codes, scales, *zeros = (places.pop(name) for name in node.input)
                block = next((a.i for a in node.attribute if a.name == "block_size"), None)
                packed[codes.name.rpartition(".")[0]] = Packed(codes, scales, block, *zeros)
        return cls(places, packed)

    @property
    def has_int4(self) -> bool:
        return any(packed.bits == 4 for packed in self._packed.values())

    def packed(self, name: str, rows: Rows | None = None) -> Packed | None:
        return self._packed.get(part_name(name, rows))

    def tensor(self, name: str, rows: Rows | None = None) -> ir.ExternalTensor:
        """Point to the tensor, or its rows first..last-1, which lie together in the file.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if part_name(name, rows) in self._tensors:
            name, rows = part_name(name, rows), None
        if name not in self._tensors:
            raise CheckpointError(f"The checkpoint has no tensor '{name}', which the graph needs.")
        place = self._tensors[name]
        dtype = Precision.from_safetensors(place.dtype).onnx
        if rows is None:
            return _external(name, place, dtype, place.shape)
        (first, last), row = rows, place.length // place.shape[0]
        shape = (last - first, *place.shape[1:])
        return _external(part_name(name, rows), place, dtype, shape, first * row, (last - first) * row)


def _external(
    name: str, place: Tensor, dtype: ir.DataType, shape: tuple[int, ...], skip: int = 0, length: int | None = None
) -> ir.ExternalTensor:
    """Point to `length` bytes of a stored tensor (None: all), after the first `skip`."""
    return ir.ExternalTensor(
        location=place.shard.name,
        offset=place.offset + skip,
        length=place.length if length is None else length,
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
        base_dir=place.shard.parent,
    )


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _place(tensor: onnx.TensorProto, directory: Path) -> Tensor:
    """Return an initialiser's place; two 4-bit codes are one element of the file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    stored, shape = from_onnx(tensor.data_type), tuple(tensor.dims)
    dtype, *rest = (stored.safetensors, *shape) if stored.safetensors else ("U8", *shape[:-1], shape[-1] // 2)
    file = directory / entries["location"]
    return Tensor(tensor.name, dtype, tuple(rest), file, int(entries["offset"]), int(entries["length"]))


def external_to_inputs(model: onnx.ModelProto) -> None:
    """Turn initialisers with external data into inputs of the same type, so that no other file is needed."""
    kept = []
    for tensor in model.graph.initializer:
        if _is_external(tensor):
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            kept.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def even_parts(total: int, parts: int) -> list[Rows]:
    """Split rows into `parts` consecutive runs, begun at multiples of 64 where there are enough of them."""
    unit = 64 if total >= 64 * parts else 1
    units = math.ceil(total / unit)
    starts = [i * units // parts * unit for i in range(parts)]
    return list(zip(starts, [*starts[1:], total], strict=True))


def head_name(text: TextConfig) -> str:
    """Name the linear layer that makes logits, without '.weight'."""
    return "model.embed_tokens" if text.tie_word_embeddings else "lm_head"
