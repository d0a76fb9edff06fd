"""Compute slow tokens and fast tokens from projected features (docs/reference.md, section 4).

Written as the reference computes it, frame by frame and window by window: the ONNX graph uses one matrix
instead, and is checked against this.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sfexport.checkpoint.config import FastPathConfig


def pool_cells(tokens: Tensor, k: int) -> Tensor:
    """Average square token grids over k x k cells, without odd rows and columns: [T, n, H] -> [T, n', H]."""
    if k == 1:
        return tokens
    frames, cells, width = tokens.shape
    side = math.isqrt(cells)
    grid = tokens.reshape(frames, side, side, width).permute(0, 3, 1, 2)
    # In float32: a CPU has no 16-bit pooling, and the rounded mean is the same.
    pooled = F.avg_pool2d(grid.float(), k, k).to(tokens.dtype)
    return pooled.flatten(2).transpose(1, 2)


def slow_tokens(projected: Tensor, pooling_stride: int) -> Tensor:
    """Pool all frames' tokens of a video, [T, n, H] -> [T, P, H]; a single image's tokens stay as they are."""
    return pool_cells(projected, pooling_stride) if projected.shape[0] > 1 else projected


def fast_tokens(slow: Tensor, fast: FastPathConfig) -> Tensor:
    """Sample frames and pool them in time and space: [T, P, H] -> [F * P', H], time-major."""
    frames = slow
    if slow.shape[0] > 1:
        frames = frames[sampled_frames(slow.shape[0], fast)]
        frames = pool_time(frames, fast)
    return pool_cells(frames, fast.spatial_stride).flatten(0, 1)


def sampled_frames(total: int, fast: FastPathConfig) -> list[int]:
    """Return the indices of the fast path's frames, by the reference's float division and truncation."""
    if fast.sampling_stride == 1 or total < fast.min_frames:
        return list(range(total))
    count = max(total // fast.sampling_stride, fast.min_frames)
    stride = total / count
    return [min(int(i * stride), total - 1) for i in range(count)]


def pool_time(frames: Tensor, fast: FastPathConfig) -> Tensor:
    """Average each `temporal_stride` frames, or min_frames overlapping windows if that leaves too few."""
    total, stride = frames.shape[0], fast.temporal_stride
    if stride == 1:
        return frames
    if total // stride >= fast.min_frames:
        kept = frames[: total // stride * stride]
        return kept.unflatten(0, (-1, stride)).float().mean(1).to(frames.dtype)
    count = min(total, fast.min_frames)
    windows = [(i * total // count, -(-(i + 1) * total // count)) for i in range(count)]
    return torch.stack([frames[a:b].float().mean(0).to(frames.dtype) for a, b in windows])
