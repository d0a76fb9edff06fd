"""Write a quantised bundle's weights file from the checkpoint's shards, in the order planned by weights_layout.

The safetensors library writes arrays that are all in memory, so tensors are written here, one after the other. Memory
taken: the rounded form of two matrices (at most 64 MB of each at a time), one being written while the next is rounded,
and some megabytes per thread; nothing is mapped.
"""

from __future__ import annotations

import functools
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfexport.checkpoint.checkpoint import NO_NUMBERS, Tensor
from sfexport.checkpoint.gptq_awq import CENTRE, PrequantizedMatrix
from sfexport.dtypes import SAFETENSORS_BYTES, Precision
from sfexport.errors import CheckpointError
from sfexport.exporting.rounding import (
    pack_int4,
    relative_error,
    round_to_int4,
    round_to_int8,
)
from sfexport.exporting.weights_layout import INTEGER, ROUNDED, Item, Kind, WeightsLayout
from sfexport.graphs.initializers import Rows
from sfexport.progress import OnStep, no_step

_COPY_BYTES = 8 << 20
# Rounded weights kept before they are written: the whole of every matrix in a 7B model's layers.
_GROUP_BYTES = 64 << 20
# Weights that a thread works on at a time.
_TILE = 1 << 21
# Fewer weights than this are rounded in a second or two.
_WORTH_REPORTING = 100_000_000


@dataclass(frozen=True)
class _Tile:
    """Some outputs (or inputs) of a matrix, rounded.

    Attributes:
        start: the first output (or input).
        scales: float32.
        data: codes as they are stored.
        sums: the sums of rounding.Rounded.
    """

    start: int
    scales: np.ndarray
    data: np.ndarray
    sums: tuple[float, float, float]


def write_weights(layout: WeightsLayout, on_step: OnStep = no_step) -> dict[str, Any]:
    """Write the file; return the manifest's account of the rounding (see _describe).

    Raises:
        CheckpointError: a weight is not finite, or too large for the scales' type; a shard has become shorter.
    """
    file = layout.shard().path
    sums: dict[Item, np.ndarray | None] = {}
    total, done = layout.weights(*INTEGER), 0
    with (
        file.open("wb", buffering=0) as stream,
        ThreadPoolExecutor(_cores()) as pool,
        _Writer(layout, stream.fileno(), pool) as writer,
    ):
        stream.truncate(layout.size)
        writer.write(layout.header, 0)
        for item in layout.items:
            try:
                sums[item] = writer.write_item(item)
            except ValueError as error:
                problem = f"Tensor '{item.source.name}' in {item.source.shard.name} has {error}."
                raise CheckpointError(problem, NO_NUMBERS) from None
            before, done = done, done + (item.weights if sums[item] is not None else 0)
            if total > _WORTH_REPORTING and 10 * done // total > 10 * before // total:
                on_step(f"rounding weights: {done / 1e6:,.0f} of {total / 1e6:,.0f} million")
    return _describe({item: found for item, found in sums.items() if found is not None})


def _describe(sums: dict[Item, np.ndarray]) -> dict[str, Any]:
    """Return relative weight errors (rounding.relative_error) of plain rounding and of the searched scales.

    By kind: weights and scales in all, and the error of them all. `matrices`: each by itself. The errors are against
    the checkpoint's weights; codes that are kept have none.
    """

    def errors(chosen: list[Item]) -> dict[str, float]:
        weight, plain, searched = sum((sums[item] for item in chosen), np.zeros(3))
        return {"plain_error": relative_error(plain, weight), "error": relative_error(searched, weight)}

    out: dict[str, Any] = {}
    for kind in INTEGER:
        chosen = [item for item in sums if item.kind == kind]
        counts = {"weights": sum(item.weights for item in chosen), "scales": sum(item.scales for item in chosen)}
        out[kind.value] = counts | errors(chosen)
    out["matrices"] = {item.name: {"kind": item.kind.value, "block": item.block, **errors([item])} for item in sums}
    return out


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summary(rounded: dict[str, Any]) -> str:
    """Sum up in one line what `write_weights` did."""
    lines = []
    for kind in ROUNDED:
        weights, error, plain = (rounded[kind.value][key] for key in ("weights", "error", "plain_error"))
        if weights:
            than = f" ({plain:.2%} with plain rounding)" if error < plain else ""
            lines.append(f"{kind.value.upper()}: {weights / 1e6:,.1f} million weights, off by {error:.2%}{than}")
    if weights := rounded[Kind.PREQUANTIZED.value]["weights"]:
        lines.append(f"{weights / 1e6:,.1f} million weights keep the checkpoint's 4-bit codes")
    return "; ".join(lines) or "no weight has a form that could be rounded"


class _Writer:
    def __init__(self, layout: WeightsLayout, file: int, pool: ThreadPoolExecutor) -> None:
        self._layout, self._file, self._pool = layout, file, pool
        self._background = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._background.shutdown()
        if error[0] is None:
            self._finish_pending()

    def _finish_pending(self) -> None:
        """Wait for what `_write_later` was given; raises what went wrong there."""
        if self._pending is not None:
            self._pending.result()

    def _write_later(self, item: Item, codes: np.ndarray, start: int) -> None:
        """_write_codes, while the caller goes on; the next call waits for it."""
        self._finish_pending()
        self._pending = self._background.submit(self._write_codes, item, codes, start)

    def write(self, data: bytes | np.ndarray, offset: int) -> None:
        # NumPy hands out no buffer of bfloat16.
        raw = data if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        rest = memoryview(raw)
        while rest:
            count = os.pwrite(self._file, rest, offset)
            rest, offset = rest[count:], offset + count

    def write_item(self, item: Item) -> np.ndarray | None:
        """Write an item; the sums of rounding.Rounded over it, None for one that is not quantised."""
        if item.prequantized is not None:
            return self._write_prequantized(item, item.prequantized)
        if item.kind in ROUNDED:
            return self._write_rounded(item)
        place, source = self._layout.places[item.name], item.source
        count, step = math.prod(source.shape), _COPY_BYTES // SAFETENSORS_BYTES[source.dtype]
        mask = Precision.from_safetensors(source.dtype).exponent_mask
        for start in range(0, count, step):
            values = _read(source, start, min(step, count - start))
            if ((values.view(mask.dtype) & mask) == mask).any():
                raise ValueError("values that are not finite numbers")
            stored = _narrowed(values, place.dtype) if item.kind == Kind.NARROW else values
            self.write(stored, place.offset + start * SAFETENSORS_BYTES[place.dtype])
        return None

    def _write_rounded(self, item: Item) -> np.ndarray:
        inputs, (first, last) = item.source.shape[1], item.span
        tile = min(512, max(64, _TILE // inputs)) // 2 * 2
        group = max(1, _GROUP_BYTES * _per_byte(item) // inputs // tile) * tile
        scales, sums = np.empty((inputs // item.scale_block, last - first), np.float32), np.zeros(3)
        for start in range(first, last, group):
            stop = min(start + group, last)
            spans = [(at, min(at + tile, stop)) for at in range(start, stop, tile)]
            tiles = self._pool.map(functools.partial(_round_tile, item, self._layout.scale_type), spans)
            codes = np.empty((inputs, (stop - start) // _per_byte(item)), np.uint8)
            for done in tiles:
                column, outputs = (done.start - start) // _per_byte(item), done.scales.shape[-1]
                codes[:, column : column + done.data.shape[1]] = done.data
                scales[:, done.start - first : done.start - first + outputs] = done.scales
                sums += done.sums
            self._write_later(item, codes, start)
        place = self._layout.places[f"{item.name}.scale"]
        self.write(Precision.from_safetensors(self._layout.scale_type).from_float32(scales), place.offset)
        return sums

    def _write_prequantized(self, item: Item, matrix: PrequantizedMatrix) -> np.ndarray:
        """Write the checkpoint's codes, some inputs at a time; either as they are or rounded again."""
        sums = np.zeros(3)
        (inputs, outputs), unit = matrix.shape, max(matrix.group, item.scale_block)
        step = max(1, _TILE // (outputs * unit)) * unit
        spans = [(at, min(at + step, inputs)) for at in range(0, inputs, step)]
        scales, zeros = matrix.scale_values(), matrix.zero_points()
        convert = functools.partial(_round_again, item, matrix, self._layout.scale_type, scales, zeros)
        codes, scale = self._layout.places[item.codes_name], self._layout.places[f"{item.name}.scale"]
        for done in self._pool.map(convert, spans):
            self.write(done.data, codes.offset + done.start * outputs // 2)
            stored = _narrowed(done.scales, self._layout.scale_type)
            self.write(stored, scale.offset + done.start // item.scale_block * outputs * stored.itemsize)
            sums += done.sums
        if not matrix.symmetric and item.kind == Kind.PREQUANTIZED:
            self.write(pack_int4(zeros), self._layout.places[f"{item.name}.zero"].offset)
        return sums

    def _write_codes(self, item: Item, codes: np.ndarray, start: int) -> None:
        """Some outputs, from `start` on, of every input: one run of bytes if these are all, else one per input."""
        (first, last), offset = item.span, self._layout.places[item.codes_name].offset
        width, column = (last - first) // _per_byte(item), (start - first) // _per_byte(item)
        if codes.shape[1] == width:
            self.write(codes, offset)
            return
        for i, row in enumerate(codes):
            self.write(row, offset + i * width + column)


def _per_byte(item: Item) -> int:
    return 2 if item.kind == Kind.INT4 else 1


def _round_tile(item: Item, scale_type: str, span: Rows) -> _Tile:
    """Round rows first..last-1 of the source, which are outputs."""
    (first, last), source, inputs = span, item.source, item.source.shape[1]
    stored = _read(source, first * inputs, (last - first) * inputs)
    rows = Precision.from_safetensors(source.dtype).to_float32(stored).reshape(-1, inputs)
    weights = np.ascontiguousarray(rows.T)
    if item.kind == Kind.INT4:
        rounded = round_to_int4(weights, item.scale_block, scale_type)
        data = pack_int4(rounded.codes)
    else:
        rounded = round_to_int8(weights, scale_type)
        data = rounded.codes.view(np.uint8)
    return _Tile(first, rounded.scales, data, (rounded.weight, rounded.plain, rounded.searched))


def _round_again(
    item: Item, matrix: PrequantizedMatrix, scale_type: str, scales: np.ndarray, zeros: np.ndarray, span: Rows
) -> _Tile:
    """Keep or round inputs first..last-1 of a matrix whose scales and zero points these are."""
    first, last = span
    codes, groups = matrix.codes_of(first, last), slice(first // matrix.group, last // matrix.group)
    if item.kind == Kind.PREQUANTIZED:
        data = pack_int4(codes ^ CENTRE if matrix.symmetric else codes)
        return _Tile(first, scales[groups], data, (0.0, 0.0, 0.0))
    by_input = (np.repeat(values[groups], matrix.group, axis=0).astype(np.float32) for values in (zeros, scales))
    rounded = round_to_int4((codes - next(by_input)) * next(by_input), item.scale_block, scale_type)
    return _Tile(first, rounded.scales, pack_int4(rounded.codes), (rounded.weight, rounded.plain, rounded.searched))


def _read(tensor: Tensor, start: int, count: int) -> np.ndarray:
    """Read `count` stored numbers from the start-th on, without mapping the file."""
    offset = tensor.offset + start * SAFETENSORS_BYTES[tensor.dtype]
    values = np.fromfile(tensor.shard, Precision.from_safetensors(tensor.dtype).numpy, count, offset=offset)
    if len(values) < count:
        raise CheckpointError(f"The shard {tensor.shard} has become shorter while it was read.", "Get it again.")
    return values


def _narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    stored = Precision.from_safetensors(dtype).from_float32(values.astype(np.float32, copy=False))
    if not np.isfinite(stored).all():
        raise ValueError(f"values that leave the range of {dtype}")
    return stored
