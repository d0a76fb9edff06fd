"""Make cases for the kernel (shapes, masks and lengths, random or swept) and their float64 answers. NumPy only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sfexport.dtypes import Precision
from sfexport.kernels.launch_config import HEAD_DIMS, SMS

MASKS = ("all", "none", "mixed", "tail", "visual first")
DTYPES = (Precision.FP32.value, Precision.FP16.value)
LARGEST = 700  # slow tokens of a random case: the interpreter is slow, and splits and tails show long before


@dataclass(frozen=True)
class Case:
    """One call of the kernel.

    Attributes:
        slow: length of the K/V tensors.
        lengths: slow tokens of each sample (up to `slow`); one length: all samples share one K/V.
        mask: which positions attend, one of MASKS.
        multiprocessors: number on the GPU; decides the splits.
        sm: compute capability times 10; decides the tiles.
        scale: standard deviation of the scores: large ones make the softmax pick single tokens.
    """

    batch: int
    kv_heads: int
    group: int
    sequence: int
    slow: int
    lengths: tuple[int, ...]
    head_dim: int
    mask: str
    dtype: str
    sm: int
    multiprocessors: int
    scale: float
    seed: int


@dataclass(frozen=True)
class Tensors:
    """float32 arrays of a case: query [B, heads, S, d] (scaled), key, value [B or 1, kv heads, T, d], bool [B, S]."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    attends: np.ndarray
    lengths: np.ndarray


def random_case(rng: np.random.Generator) -> Case:
    batch = int(rng.integers(1, 4))
    slow = int(rng.choice([0, 1, 2, int(rng.integers(1, 130)), int(rng.integers(130, LARGEST))]))
    lengths = (slow,) * batch
    if rng.random() < 0.5:
        lengths = tuple(int(n) for n in rng.integers(0, slow + 1, batch if rng.random() < 0.5 else 1))
    return Case(
        batch=batch,
        kv_heads=int(rng.integers(1, 4)),
        group=int(rng.integers(1, 9)),
        sequence=int(rng.choice([1, 1, 2, int(rng.integers(3, 40)), int(rng.integers(40, 150))])),
        slow=slow,
        lengths=lengths,
        head_dim=int(rng.choice(HEAD_DIMS)),
        mask=str(rng.choice(MASKS)),
        dtype=str(rng.choice(DTYPES)),
        sm=int(rng.choice(SMS)),
        multiprocessors=int(rng.choice([1, 8, 16, 132])),
        scale=float(rng.choice([0.1, 1.0, 8.0])),
        seed=int(rng.integers(1 << 31)),
    )


def swept_cases() -> Iterator[Case]:
    """Yield cases of every group size, head size, mask and kind of length, in both types."""
    lengths = {"0": (0, (0, 0)), "1": (1, (1, 1)), "odd": (131, (131, 77)), "large": (515, (515, 0))}
    for dtype in DTYPES:
        for group in range(1, 9):
            slow, by_sample = list(lengths.values())[group % 4]
            d, mask = HEAD_DIMS[group % 3], MASKS[group % len(MASKS)]
            yield Case(2, 2, group, 9, slow, by_sample, d, mask, dtype, SMS[group % 7], 16, 1.0, group)
        for d in HEAD_DIMS:
            for i, (slow, by_sample) in enumerate(lengths.values()):
                yield Case(2, 1, 7, 1 + 32 * (i % 2), slow, by_sample, d, "mixed", dtype, 87, 132, 2.0, i)
        for mask in MASKS:
            yield Case(1, 2, 7, 30, 260, (260,), 64, mask, dtype, 90, 132, 1.0, 5)
        for length in (300, 77):  # three samples about one video
            yield Case(3, 2, 7, 2, 300, (length,), 64, "mixed", dtype, 87, 132, 1.0, 6)


def make_tensors(case: Case) -> Tensors:
    """Draw normal numbers; K and V beyond a sample's length are NaN: they must not be read into the result."""
    rng = np.random.default_rng(case.seed)
    heads, width = case.group * case.kv_heads, case.head_dim
    query = rng.standard_normal((case.batch, heads, case.sequence, width)).astype(np.float32)
    query *= np.float32(case.scale / np.sqrt(width))
    shape = (len(case.lengths), case.kv_heads, case.slow, width)
    key, value = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    for b, length in enumerate(case.lengths):
        key[b, :, length:] = value[b, :, length:] = np.nan
    return Tensors(query, key, value, _mask(case, rng), np.array(case.lengths, dtype=np.int64))


def _mask(case: Case, rng: np.random.Generator) -> np.ndarray:
    attends = np.zeros((case.batch, case.sequence), dtype=bool)
    if case.mask == "all":
        attends[:] = True
    elif case.mask == "mixed":
        attends[:] = rng.random(attends.shape) < 0.5
    elif case.mask == "tail":
        attends[:, -1:] = True
    elif case.mask == "visual first":
        attends[:, case.sequence * 9 // 10 :] = True
    return attends


def reference(tensors: Tensors) -> np.ndarray:
    """Compute the node's definition in float64: [B, S, heads * d]."""
    query, key, value = (x.astype(np.float64) for x in (tensors.query, tensors.key, tensors.value))
    batch, heads, sequence, width = query.shape
    group = heads // key.shape[1]
    out = np.zeros((batch, sequence, heads, width))
    lengths = np.broadcast_to(tensors.lengths, batch)
    key, value = (np.broadcast_to(x, (batch, *x.shape[1:])) for x in (key, value))
    for b, length in enumerate(lengths):
        rows = np.flatnonzero(tensors.attends[b])
        if length == 0 or not len(rows):
            continue
        for h in range(heads):
            scores = query[b, h, rows] @ key[b, h // group, :length].T
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, rows, h] = (p / p.sum(-1, keepdims=True)) @ value[b, h // group, :length]
    return out.reshape(batch, sequence, heads * width)
