"""What a quantised bundle's weights file will hold, decided before any weight is read.

One safetensors file holds everything the graphs need: rounded matrices, and copies of what is left alone. So the bundle
stands without the checkpoint, which is more than twice as large; and graphs can point to one directory only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfexport.checkpoint.checkpoint import Checkpoint, Shard, Tensor
from sfexport.checkpoint.gptq_awq import DECODER_LINEAR, Taken
from sfexport.checkpoint.safetensors import write_header
from sfexport.dtypes import SAFETENSORS_BYTES
from sfexport.exporting.rounding import block_for
from sfexport.graphs.initializers import Packed, Rows, even_parts, head_name, part_name

FILE = "weights.safetensors"
HEADS = ("int8", "fp16")
ROUNDED = ("int4", "int8")
INTEGER = (*ROUNDED, "taken")


@dataclass(frozen=True)
class Item:
    """What becomes of a tensor, or of some of its rows.

    Attributes:
        kind: 'int4', 'int8': rounded. 'taken': 4-bit codes of the checkpoint. 'narrow': to 16 bits. 'copy': nothing.
        taken: what the checkpoint has in the place of `source`, to be taken over or to be rounded again.
    """

    source: Tensor
    kind: str
    rows: Rows | None = None
    block: int | None = None
    taken: Taken | None = None

    @property
    def name(self) -> str:
        return part_name(self.source.name, self.rows)

    @property
    def codes_name(self) -> str:
        return f"{self.name}.{'int8' if self.kind == 'int8' else 'int4'}"

    @property
    def span(self) -> Rows:
        return self.rows or (0, self.source.shape[0])

    @property
    def weights(self) -> int:
        return (self.span[1] - self.span[0]) * math.prod(self.source.shape[1:])

    @property
    def scales(self) -> int:
        """How many scales a rounded one has."""
        return (self.span[1] - self.span[0]) * (self.source.shape[1] // (self.block or self.source.shape[1]))


@dataclass(frozen=True)
class WeightsPlan:
    """What a weights file will hold and where.

    Attributes:
        places: written tensors by name; their shard is the file in the directory that was planned for.
        header: the file's first bytes. size: of the whole file.
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
        """Those that are as the model has them, by the model's names."""
        return {item.name: self.places[item.name] for item in self.items if item.kind in ("narrow", "copy")}

    def weights(self, *kinds: str) -> int:
        """How many weights become of these kinds."""
        return sum(item.weights for item in self.items if item.kind in kinds)

    def shard(self) -> Shard:
        file = next(iter(self.places.values())).shard
        return Shard(FILE, file, self.size)


def plan_weights(
    checkpoint: Checkpoint,
    directory: Path,
    scale_type: str,
    head: str = "int8",
    head_parts: int = 1,
    taken: Mapping[str, Taken] | None = None,
    rounds: bool = True,
) -> WeightsPlan:
    """Decide what becomes of every tensor the graphs need.

    The decoder layers' linear weights become INT4, in blocks of 128, of 64 where 128 does not divide their inputs; one
    that 64 does not divide either is left alone, as is everything else but the head.

    Args:
        scale_type: 'F32', 'F16' or 'BF16', as the graphs compute.
        head: 'int8', or 'fp16': 16 bits wide, as it is where it is stored so.
        taken: what the checkpoint has in the place of some weights (gptq_awq.adopt).
        rounds: round linear weights, and those of `taken` again that are not symmetric; else take over what there is.
    """
    text, items, taken = checkpoint.config.text, [], taken or {}
    for tensor in sorted((checkpoint.tensors[n] for n in checkpoint.expected_tensors()), key=_position):
        if tensor.name == f"{head_name(text)}.weight":
            items += _head_items(tensor, head, head_parts, text.tie_word_embeddings)
        else:
            items.append(_item(tensor, taken.get(tensor.name), rounds))
    places, header, size = _lay_out(items, directory / FILE, scale_type)
    return WeightsPlan(tuple(items), places, header, size, scale_type)


def _position(tensor: Tensor) -> tuple[str, int]:
    """Reading goes through the shards from end to end."""
    return str(tensor.shard), tensor.offset


def _item(tensor: Tensor, taken: Taken | None, rounds: bool) -> Item:
    block = block_for(tensor.shape[1], tensor.shape[0]) if rounds and DECODER_LINEAR.fullmatch(tensor.name) else None
    if taken and (taken.symmetric or block is None):
        return Item(tensor, "taken", block=taken.group, taken=taken)
    return Item(tensor, "int4", block=block, taken=taken) if block else Item(tensor, "copy")


def _head_items(tensor: Tensor, head: str, parts: int, tied: bool) -> list[Item]:
    if head == "int8":
        pieces = [None] if parts == 1 else even_parts(tensor.shape[0], parts)
        rounded = [Item(tensor, "int8", rows) for rows in pieces]
        # Tied to the head, the embedding table is still read row by row.
        return [*rounded, Item(tensor, "copy")] if tied else rounded
    return [Item(tensor, "narrow" if tensor.dtype == "F32" else "copy")]


def _lay_out(items: Sequence[Item], file: Path, scale_type: str) -> tuple[dict[str, Tensor], bytes, int]:
    """Places in a file, widest numbers first, so that each is aligned."""
    entries = [entry for item in items for entry in _entries(item, scale_type)]
    entries.sort(key=lambda entry: -SAFETENSORS_BYTES[entry[1]])
    header, places = write_header(entries, file, "sfexport")
    return places, header, len(header) + sum(place.length for place in places.values())


def _entries(item: Item, scale_type: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of what is written for an item."""
    source = item.source
    if item.kind == "copy":
        yield item.name, source.dtype, source.shape
    elif item.kind == "narrow":
        yield item.name, _narrow_type(scale_type), source.shape
    elif item.kind == "int8":
        outputs = item.span[1] - item.span[0]
        yield item.codes_name, "I8", (source.shape[1], outputs)
        yield f"{item.name}.scale", scale_type, (outputs,)
    else:
        outputs, inputs = source.shape
        yield item.codes_name, "U8", (inputs, outputs // 2)
        yield f"{item.name}.scale", scale_type, (inputs // item.block, outputs)
        if item.kind == "taken" and not item.taken.symmetric:
            yield f"{item.name}.zero", "U8", (inputs // item.block, outputs // 2)


def _narrow_type(scale_type: str) -> str:
    return "BF16" if scale_type == "BF16" else "F16"
