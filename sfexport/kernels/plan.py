"""How the cross-attention kernels are launched: tile sizes by type and GPU, grids, the number of splits.

Written once for plain integers and for TensorRT's symbolic dimensions. Imports neither triton nor tensorrt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from sfexport.errors import InputError

DTYPES = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes
HEAD_DIMS = (32, 64, 128)
SMS = (80, 87, 89, 90, 100, 110, 120)  # the GPUs that kernels are compiled for
PROGRAMS_PER_MULTIPROCESSOR = 2  # as many as fit at the shared memory and registers that the kernels take
SMALLEST_SHARE = 128  # slow tokens that are worth a program of their own
COMBINE_POSITIONS = 8
COMBINE_WARPS = 2


@dataclass(frozen=True)
class Tiles:
    """What one program of cross_attention_split works on.

    Attributes:
        rows: query rows (positions times heads of a group). tokens: slow tokens per step.
        warps: of 32 threads. stages: steps whose loads are in flight.
    """

    rows: int
    tokens: int
    warps: int
    stages: int


def tiles_for(dtype: str, head_dim: int, sm: int) -> Tiles:
    """The largest tiles that need no more than 48 KB of shared memory and spill no register (benchmarks/kernel.py).

    Raises:
        InputError: a type, head size or GPU that the kernels are not made for.
    """
    if dtype not in DTYPES:
        raise InputError(f"The cross-attention kernel knows no type {dtype!r}; it has {', '.join(DTYPES)}.")
    if head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        raise InputError(f"The cross-attention kernel is made for heads of {sizes} elements, not {head_dim}.")
    if sm not in SMS:
        raise InputError(f"The cross-attention kernel is not compiled for SM {sm / 10:.1f}.")
    if dtype == "fp32":
        return Tiles(16, 16, 4, 3) if sm >= 100 else Tiles(32, 16, 8, 2)
    if sm in (100, 110):
        # 64 rows would bring in tensor memory, which nobody here has run yet; 32 stay with the older instructions.
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


@dataclass(frozen=True)
class Launch:
    """One kernel launch for one set of shapes; entries are integers or TensorRT's symbols.

    Attributes:
        arguments: int32 arguments between the kernel's inputs and its outputs. outputs: the outputs' shapes.
    """

    grid: tuple[Any, Any, Any]
    arguments: tuple[Any, ...]
    outputs: tuple[tuple[Any, ...], ...]


def plan_split(arithmetic: Arithmetic, query: Any, key: Any, tiles: Tiles, multiprocessors: int) -> Launch:
    """cross_attention_split for query [B, heads, S, d] and key [B, kv heads, T, d].

    Row tiles of all heads and samples come first; what they leave of the GPU is filled by splitting the slow tokens,
    down to SMALLEST_SHARE each. Outputs: partial [B * kv heads, splits, group * S, d] and logsumexp, without d.
    """
    a = arithmetic
    batch, heads, sequence, width = (query[i] for i in range(4))
    kv_heads, slow = key[1], key[2]
    pairs, rows = a.product(batch, kv_heads), a.product(a.floordiv(heads, kv_heads), sequence)
    row_tiles = a.cdiv(rows, tiles.rows)
    room = a.floordiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, a.product(pairs, row_tiles))
    splits = a.maximum(1, a.minimum(room, a.cdiv(slow, SMALLEST_SHARE)))
    return Launch(
        grid=(row_tiles, splits, pairs),
        arguments=(sequence, rows, slow, kv_heads),
        outputs=((pairs, splits, rows, width), (pairs, splits, rows)),
    )


def plan_combine(arithmetic: Arithmetic, query: Any, partial: Any) -> Launch:
    """cross_attention_combine for query [B, heads, S, d] and plan_split's partial. Output: [B, S, heads * d]."""
    a = arithmetic
    batch, heads, sequence, width = (query[i] for i in range(4))
    splits, rows = partial[1], partial[2]
    return Launch(
        grid=(a.cdiv(sequence, COMBINE_POSITIONS), heads, batch),
        arguments=(sequence, splits, a.floordiv(rows, sequence)),
        outputs=((batch, sequence, a.product(heads, width)),),
    )
