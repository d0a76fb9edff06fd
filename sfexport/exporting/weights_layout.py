"""Lay out a quantised bundle's weights file before any weight is read.

One safetensors file holds everything the graphs need: rounded matrices, and copies of what is left alone. So the bundle
stands without the checkpoint, which is more than twice as large; and graphs can point to one directory only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from sfexport.checkpoint.checkpoint import Checkpoint, Shard, Tensor
from sfexport.checkpoint.gptq_awq import DECODER_LINEAR, PrequantizedMatrix
from sfexport.checkpoint.safetensors import write_header
from sfexport.dtypes import SAFETENSORS_BYTES
from sfexport.exporting.rounding import block_for
from sfexport.graphs.initializers import Packed, Rows, even_parts, head_name, part_name

FILE = "weights.safetensors"
HEADS = ("int8", "fp16", "int4")


class Kind(str, Enum):
    """What is stored for a tensor. The values are those of manifests."""

    INT4 = "int4"  # rounded
    INT8 = "int8"  # rounded
    PREQUANTIZED = "taken"  # the checkpoint's 4-bit codes as they are
    NARROW = "narrow"  # 16 bits in place of 32
    COPY = "copy"


ROUNDED = (Kind.INT4, Kind.INT8)
INTEGER = (*ROUNDED, Kind.PREQUANTIZED)


@dataclass(frozen=True)
class Item:
    """How one tensor, or a range of its rows, is stored in the weights file.

    Attributes:
        source: the checkpoint's tensor.
        rows: the rows meant; None: all.
        block: number of inputs that share a scale; None: all of them.
        prequantized: the checkpoint's 4-bit codes in the place of `source`, to be kept or to be rounded again.
    """

    source: Tensor
    kind: Kind
    rows: Rows | None = None
    block: int | None = None
    prequantized: PrequantizedMatrix | None = None

    @property
    def name(self) -> str:
        return part_name(self.source.name, self.rows)

    @property
    def codes_name(self) -> str:
        return f"{self.name}.{'int8' if self.kind == Kind.INT8 else 'int4'}"

    @property
    def span(self) -> Rows:
        return self.rows or (0, self.source.shape[0])

    @property
    def weights(self) -> int:
        return (self.span[1] - self.span[0]) * math.prod(self.source.shape[1:])

    @property
    def scale_block(self) -> int:
        """Number of inputs that share a scale."""
        return self.block or self.source.shape[1]

    @property
    def scales(self) -> int:
        """Number of scales, if the item is rounded."""
        return (self.span[1] - self.span[0]) * (self.source.shape[1] // self.scale_block)


@dataclass(frozen=True)
class WeightsLayout:
    """Contents of a weights file, and the place of each tensor in it.

    Attributes:
        items: tensors in the order in which they are read.
        places: written tensors by name; their shard is the file to be written.
        header: the file's first bytes.
        size: bytes of the whole file.
        scale_type: safetensors' name of the scales' dtype.
    """

    items: tuple[Item, ...]
    places: dict[str, Tensor]
    header: bytes
    size: int
    scale_type: str

    def packed(self) -> dict[str, Packed]:
        return {item.name: self._packed(item) for item in self.items if item.kind in INTEGER}

    def _packed(self, item: Item) -> Packed:
        codes, zeros = self.places[item.codes_name], self.places.get(f"{item.name}.zero")
        return Packed(codes, self.places[f"{item.name}.scale"], item.block, zeros)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not quantised, by the model's names."""
        return {item.name: self.places[item.name] for item in self.items if item.kind in (Kind.NARROW, Kind.COPY)}

    def weights(self, *kinds: Kind) -> int:
        """Count the weights of these kinds."""
        return sum(item.weights for item in self.items if item.kind in kinds)

    def shard(self) -> Shard:
        file = next(iter(self.places.values())).shard
        return Shard(FILE, file, self.size)


def layout_weights(
    checkpoint: Checkpoint,
    directory: Path,
    scale_type: str,
    head: str = "int8",
    head_parts: int = 1,
    prequantized: Mapping[str, PrequantizedMatrix] | None = None,
    rounds: bool = True,
) -> WeightsLayout:
    """Decide how every tensor that the graphs need is stored.

    The decoder layers' linear weights become INT4, in blocks of 128, of 64 where 128 does not divide their inputs; one
    that 64 does not divide either is left alone, as is everything else but the head.

    Args:
        scale_type: safetensors' name of the type the graphs compute in.
        head: 'int8', 'int4', or 'fp16': 16 bits wide, as it is where it is stored so.
        prequantized: the checkpoint's 4-bit matrices by name (gptq_awq.read_prequantized).
        rounds: round linear weights, and those of `prequantized` again that are not symmetric; otherwise keep the
            checkpoint's codes.
    """
    items: list[Item] = []
    text, prequantized = checkpoint.config.text, prequantized or {}
    for tensor in sorted((checkpoint.tensors[n] for n in checkpoint.expected_tensors()), key=_position):
        if tensor.name == f"{head_name(text)}.weight":
            items += _head_items(tensor, head, head_parts, text.tie_word_embeddings)
        else:
            items.append(_item(tensor, prequantized.get(tensor.name), rounds))
    places, header, size = _lay_out(items, directory / FILE, scale_type)
    return WeightsLayout(tuple(items), places, header, size, scale_type)


def _position(tensor: Tensor) -> tuple[str, int]:
    """Sort key that reads each shard from end to end."""
    return str(tensor.shard), tensor.offset


def _item(tensor: Tensor, prequantized: PrequantizedMatrix | None, rounds: bool) -> Item:
    block = block_for(tensor.shape[1], tensor.shape[0]) if rounds and DECODER_LINEAR.fullmatch(tensor.name) else None
    if prequantized and (prequantized.symmetric or block is None):
        return Item(tensor, Kind.PREQUANTIZED, block=prequantized.group, prequantized=prequantized)
    return Item(tensor, Kind.INT4, block=block, prequantized=prequantized) if block else Item(tensor, Kind.COPY)


def _head_items(tensor: Tensor, head: str, parts: int, tied: bool) -> list[Item]:
    if head in ("int8", "int4"):
        pieces = [None] if parts == 1 else even_parts(tensor.shape[0], parts)
        rounded = [_rounded_head(tensor, head, rows) for rows in pieces]
        # Tied to the head, the embedding table is still read row by row.
        return [*rounded, Item(tensor, Kind.COPY)] if tied else rounded
    return [Item(tensor, Kind.NARROW if tensor.dtype == "F32" else Kind.COPY)]


def _rounded_head(tensor: Tensor, head: str, rows: Rows | None) -> Item:
    """Return the head, or some of its rows, in the format asked for; in INT8 where no block of INT4 divides it."""
    outputs = rows[1] - rows[0] if rows else tensor.shape[0]
    block = block_for(tensor.shape[1], outputs) if head == "int4" else None
    return Item(tensor, Kind.INT4 if block else Kind.INT8, rows, block)


def _lay_out(items: Sequence[Item], file: Path, scale_type: str) -> tuple[dict[str, Tensor], bytes, int]:
    """Lay the items out in a file, widest numbers first, so that each is aligned; places, header and size."""
    entries = [entry for item in items for entry in _entries(item, scale_type)]
    entries.sort(key=lambda entry: -SAFETENSORS_BYTES[entry[1]])
    header, places = write_header(entries, file, "sfexport")
    return places, header, len(header) + sum(place.length for place in places.values())


def _entries(item: Item, scale_type: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield name, dtype and shape of the tensors written for an item."""
    source = item.source
    if item.kind == Kind.COPY:
        yield item.name, source.dtype, source.shape
    elif item.kind == Kind.NARROW:
        yield item.name, _narrow_type(scale_type), source.shape
    elif item.kind == Kind.INT8:
        outputs = item.span[1] - item.span[0]
        yield item.codes_name, "I8", (source.shape[1], outputs)
        yield f"{item.name}.scale", scale_type, (outputs,)
    else:
        outputs, inputs = source.shape
        yield item.codes_name, "U8", (inputs, outputs // 2)
        yield f"{item.name}.scale", scale_type, (inputs // item.scale_block, outputs)
        if item.kind == Kind.PREQUANTIZED and item.prequantized and not item.prequantized.symmetric:
            yield f"{item.name}.zero", "U8", (inputs // item.scale_block, outputs // 2)


def _narrow_type(scale_type: str) -> str:
    return "BF16" if scale_type == "BF16" else "F16"
