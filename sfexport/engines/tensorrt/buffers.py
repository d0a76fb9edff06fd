"""Own device memory, and lend buffers of a pool, for as long as something refers to them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfexport.engines.tensorrt.cuda import Buffer
from sfexport.errors import SfexportError


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


class OwnedBuffer(Buffer):
    """Own device memory and free it with the last reference."""

    def __del__(self) -> None:
        # At interpreter exit CUDA may already be shut down; ignore the error.
        with contextlib.suppress(SfexportError):
            if hasattr(self, "pointer"):
                self.free()


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
