"""Blocks of K and V on the GPU: every one aligned, none over another, all within reach of one copy."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sfexport.engines.tensorrt.buffers import ALIGNMENT, DeviceTensor, block_stride, lay_out

sizes = st.integers(1, 40)


@given(rows=sizes, heads=sizes, length=sizes, width=st.sampled_from([1, 32, 64, 80, 128]), wide=st.booleans())
def test_a_block(rows: int, heads: int, length: int, width: int, wide: bool) -> None:
    dtype = np.dtype(np.float32 if wide else ml_dtypes.bfloat16)
    tensors = lay_out(DeviceTensor(0, (rows, heads, length, width), dtype, None), 1 << 20, 5, "owner")
    stride, piece = block_stride(tensors[0]), length * width * dtype.itemsize
    assert stride % piece == 0 and tensors[0].size <= stride < tensors[0].size + math.lcm(piece, ALIGNMENT)
    assert [t.pointer for t in tensors] == [(1 << 20) + i * stride for i in range(5)]
    assert all(t.pointer % ALIGNMENT == 0 and t.owner == "owner" for t in tensors)


def test_tensors_without_elements_take_no_memory() -> None:
    assert block_stride(DeviceTensor(0, (1, 2, 0, 32), np.dtype(np.float16), None)) == 0
