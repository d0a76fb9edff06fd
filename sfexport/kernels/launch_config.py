"""Configure the launches of the cross-attention kernels: tile sizes by type and GPU, grids, the number of splits.

Written once for plain integers and for TensorRT's symbolic dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from sfexport.dtypes import PRECISIONS, Precision
from sfexport.errors import InputError

HEAD_DIMS = (32, 64, 128)
SMS = (80, 87, 89, 90, 100, 110, 120)  # the GPUs that kernels are compiled for
PROGRAMS_PER_MULTIPROCESSOR = 2  # as many as fit at the shared memory and registers that the kernels take
SMALLEST_SHARE = 128  # slow tokens that are worth a program of their own
# Row tiles are counted in these when the splits are chosen, whatever the type's own tile: a plugin must know its
# outputs' shapes before it knows the type.
NOMINAL_ROWS = 64
COMBINE_POSITIONS = 4
COMBINE_WARPS = 4


@dataclass(frozen=True)
class Tiles:
    """The part that one program of cross_attention_split works on.

    Attributes:
        rows: query rows (positions times heads of a group).
        tokens: slow tokens per step.
        warps: number of warps, of 32 threads each.
        stages: number of steps whose loads are in flight.
    """

    rows: int
    tokens: int
    warps: int
    stages: int


def tiles_for(dtype: str, head_dim: int, sm: int) -> Tiles:
    """Return the largest tiles that need no more than 48 KB of shared memory and spill no register.

    Measured by benchmarks/kernel_resources.py.

    Raises:
        InputError: a type, head size or GPU that the kernels are not made for.
    """
    if dtype not in PRECISIONS:
        raise InputError(f"The cross-attention kernel knows no type {dtype!r}; it has {', '.join(PRECISIONS)}.")
    if head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        raise InputError(f"The cross-attention kernel is made for heads of {sizes} elements, not {head_dim}.")
    if sm not in SMS:
        raise InputError(f"The cross-attention kernel is not compiled for SM {sm / 10:.1f}.")
    if dtype == Precision.FP32:
        return Tiles(16, 16, 4, 3) if sm >= 100 else Tiles(32, 16, 8, 2)
    if sm in (100, 110):
        # 64-row tiles use tensor memory: untested. 32-row tiles use the older instructions.
        return Tiles(32, 32, 4, 3)
    return Tiles(64, 16, 4, 3) if sm == 90 else Tiles(64, 32, 4, 2)


class Arithmetic(Protocol):
    """Integer operations on numbers or on symbols that stand for them."""

    def cdiv(self, a: Any, b: Any) -> Any: ...
    def floordiv(self, a: Any, b: Any) -> Any: ...
    def product(self, a: Any, b: Any) -> Any: ...
    def minimum(self, a: Any, b: Any) -> Any: ...
    def maximum(self, a: Any, b: Any) -> Any: ...


class Integers:
    """Arithmetic on plain integers."""

    def cdiv(self, a: int, b: int) -> int:
        return -(-a // b)

    def floordiv(self, a: int, b: int) -> int:
        return a // b

    def product(self, a: int, b: int) -> int:
        return a * b

    def minimum(self, a: int, b: int) -> int:
        return min(a, b)

    def maximum(self, a: int, b: int) -> int:
        return max(a, b)


Shapes = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class LaunchConfig:
    """One kernel launch for one set of shapes; entries are integers or TensorRT's symbols.

    Attributes:
        arguments: int32 arguments between the kernel's inputs and its outputs.
    """

    grid: tuple[Any, Any, Any]
    arguments: tuple[Any, ...]


def split_outputs(arithmetic: Arithmetic, query: Any, key: Any, multiprocessors: int) -> Shapes:
    """Return the shapes of cross_attention_split's outputs for query [B, heads, S, d] and key [B or 1, kv heads, T, d].

    partial [B * kv heads, splits, group * S, d] and logsumexp, the same without d. Row tiles of all heads and samples
    come first; what they leave of the GPU is filled by splitting the slow tokens, down to SMALLEST_SHARE each.
    """
    a = arithmetic
    batch, heads, sequence, width = (query[i] for i in range(4))
    pairs, rows = a.product(batch, key[1]), a.product(a.floordiv(heads, key[1]), sequence)
    programs = a.product(pairs, a.cdiv(rows, NOMINAL_ROWS))
    room = a.floordiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, programs)
    splits = a.maximum(1, a.minimum(room, a.cdiv(key[2], SMALLEST_SHARE)))
    return (pairs, splits, rows, width), (pairs, splits, rows)


def split_launch(arithmetic: Arithmetic, query: Any, key: Any, tiles: Tiles, multiprocessors: int) -> LaunchConfig:
    """Return cross_attention_split's launch for query [B, heads, S, d] and key [B or 1, kv heads, T, d]."""
    (pairs, splits, rows, _), _ = split_outputs(arithmetic, query, key, multiprocessors)
    grid = (arithmetic.cdiv(rows, tiles.rows), splits, pairs)
    return LaunchConfig(grid, arguments=(query[2], rows, key[2], key[1], key[0]))


def combine_outputs(arithmetic: Arithmetic, query: Any) -> Shapes:
    """Return the shape of cross_attention_combine's output for query [B, heads, S, d]: [B, S, heads * d]."""
    return ((query[0], query[2], arithmetic.product(query[1], query[3])),)


def combine_launch(arithmetic: Arithmetic, query: Any, partial: Any) -> LaunchConfig:
    """Return cross_attention_combine's launch for query [B, heads, S, d] and cross_attention_split's partial."""
    batch, heads, sequence = (query[i] for i in range(3))
    grid = (arithmetic.cdiv(sequence, COMBINE_POSITIONS), heads, batch)
    return LaunchConfig(grid, arguments=(sequence, partial[1], arithmetic.floordiv(partial[2], sequence)))
