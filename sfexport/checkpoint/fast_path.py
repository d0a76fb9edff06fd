"""Compute the fast path as matrices that the compressor graph takes, on the host, with NumPy only.

The formulas are in docs/reference.md, section 4. Frame sampling and temporal pooling are linear in the frames, spatial
pooling is linear in a frame's cells, so two small matrices cover every case with one graph.
"""

from __future__ import annotations

import math

import numpy as np

from sfexport.checkpoint.config import FastPathConfig


def source_frames(total: int, fast: FastPathConfig) -> list[list[int]]:
    """List for each fast frame the frames whose mean it is (equal weights)."""
    if total == 1:
        return [[0]]
    sampled = _sample(total, fast)
    n, stride = len(sampled), fast.temporal_stride
    if stride == 1:
        windows = [(i, i + 1) for i in range(n)]
    elif n // stride >= fast.min_frames:
        windows = [(i * stride, (i + 1) * stride) for i in range(n // stride)]
    else:
        count = min(n, fast.min_frames)
        windows = [(i * n // count, math.ceil((i + 1) * n / count)) for i in range(count)]
    return [sampled[a:b] for a, b in windows]


def _sample(total: int, fast: FastPathConfig) -> list[int]:
    if fast.sampling_stride == 1 or total < fast.min_frames:
        return list(range(total))
    count = max(total // fast.sampling_stride, fast.min_frames)
    # The reference's own float division and truncation: an exact fraction would pick other frames.
    return [min(int(i * (total / count)), total - 1) for i in range(count)]


def frame_weights(total: int, fast: FastPathConfig) -> np.ndarray:
    """Return float32 [F, total]: row f holds 1/n for the n frames that fast frame f averages (repeats add up)."""
    sources = source_frames(total, fast)
    out = np.zeros((len(sources), total), dtype=np.float32)
    for row, frames in zip(out, sources, strict=True):
        np.add.at(row, frames, np.float32(1 / len(frames)))
    return out


def cell_weights(cells: int, spatial_stride: int) -> np.ndarray:
    """Return float32 [P', P]: k x k means over a square grid of `cells`, odd rows and columns dropped."""
    side, k = math.isqrt(cells), spatial_stride
    grid = np.arange(cells).reshape(side, side)
    pooled = side // k
    out = np.zeros((pooled * pooled, cells), dtype=np.float32)
    for i in range(pooled):
        for j in range(pooled):
            out[i * pooled + j, grid[i * k : (i + 1) * k, j * k : (j + 1) * k].ravel()] = 1 / (k * k)
    return out


def fast_token_count(frames: int, cells: int, fast: FastPathConfig) -> int:
    """Count the fast tokens that `frames` frames of `cells` tokens make."""
    side = math.isqrt(cells) // fast.spatial_stride
    return len(source_frames(frames, fast)) * (cells if fast.spatial_stride == 1 else side * side)
