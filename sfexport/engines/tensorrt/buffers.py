"""Own device memory, and lend buffers of a pool, for as long as something refers to them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sfexport.engines.tensorrt.cuda import Buffer, release


@dataclass(frozen=True)
class DeviceTensor:
    """Describe a dense part of a buffer; `owner` keeps the memory alive."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype
    owner: Any

    @property
    def size(self) -> int:
        """Number of bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


ALIGNMENT = 256  # bytes; of every address that TensorRT gets


def block_stride(tensor: DeviceTensor) -> int:
    """Return the bytes from one K or V [rows, heads, length, width] of a block to the next.

    Each begins at an aligned address, and after a whole number of pieces [length, width], so that one copy reaches all.
    """
    piece = math.prod(tensor.shape[2:]) * tensor.dtype.itemsize
    unit = math.lcm(max(piece, 1), ALIGNMENT)
    return -(-tensor.size // unit) * unit


def lay_out(tensor: DeviceTensor, start: int, count: int, owner: Any) -> tuple[DeviceTensor, ...]:
    """Place `count` tensors like `tensor` one behind the other."""
    stride = block_stride(tensor)
    return tuple(replace(tensor, pointer=start + i * stride, owner=owner) for i in range(count))


class OwnedBuffer(Buffer):
    """Own device memory and free it with the last reference."""

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            release("cuMemFree", self.pointer)


class Pool:
    """Lend buffers of one size and take them back."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[Buffer] = []

    def lend(self) -> Lease:
        return Lease(self, self._free.pop() if self._free else OwnedBuffer(self.size))

    def take_back(self, buffer: Buffer) -> None:
        self._free.append(buffer)


class Lease:
    """Hold a buffer of a pool and return it there with the last reference."""

    def __init__(self, pool: Pool, buffer: Buffer) -> None:
        self._pool, self.buffer = pool, buffer

    def __del__(self) -> None:
        self._pool.take_back(self.buffer)
