"""Round weights to 4 and 8 bits: the arithmetic, on arrays in memory.

Matrices are [in, out] here, as they are stored: ONNX Runtime turns no other layout into its 4-bit product.

INT4: blocks of 128 consecutive inputs of one output share a scale; a weight is code * scale, code in -8..7. The scale
is searched: shrinking it from max/7 clips a block's largest weights and rounds all others more finely. Of a few
candidates each block takes the one with the least squared error; the first is max/7, plain rounding, so that the
search never makes a block worse.

INT8: one scale per output, max/127.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sfexport.dtypes import Precision

BLOCKS = (128, 64)  # what TensorRT has kernels for
# Of normal weights these leave an error of 10.2 %, twelve between 1 and 0.66 10.1 %, the first alone 11.7 %.
SHRINK = (1.0, 0.92, 0.84, 0.76)
LOWEST, HIGHEST = -8, 7
# Weights worked on at a time: smaller pieces fit a core's caches better and lose more to Python.
_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class Rounded:
    """Some outputs of a matrix, rounded.

    Attributes:
        codes: int8 [in, out].
        scales: float32 with values that the stored type has; [in / block, out], or [out] for INT8.
        weight: sum over all weights of w^2.
        plain: sum of the squared errors of plain rounding.
        searched: sum of the squared errors of the searched scales.
    """

    codes: np.ndarray
    scales: np.ndarray
    weight: float
    plain: float
    searched: float


def block_for(inputs: int, outputs: int) -> int | None:
    """Choose the block that a matrix [in, out] is rounded in; None: it has no form that TensorRT takes."""
    fitting = (block for block in BLOCKS if inputs % block == 0)
    # Two codes share a byte, along the outputs.
    return next(fitting, None) if outputs % 2 == 0 else None


def round_to_int4(weights: np.ndarray, block: int, scale_type: str) -> Rounded:
    """Round float32 weights [in, out], `block` inputs to a scale.

    Raises:
        ValueError: a weight is not finite, or a scale leaves the range of `scale_type`.
    """
    inputs, outputs = weights.shape
    blocks = weights.reshape(inputs // block, block, outputs)
    codes, scales = np.empty(blocks.shape, np.int8), np.empty((len(blocks), outputs), np.float32)
    step, sums = max(1, _AT_ONCE // (block * outputs)), np.zeros(3)
    for i in range(0, len(blocks), step):
        part = slice(i, i + step)
        sums += _round_blocks(blocks[part], scale_type, codes[part], scales[part])
    return Rounded(codes.reshape(inputs, outputs), scales, *map(float, sums))


def _round_blocks(blocks: np.ndarray, scale_type: str, codes: np.ndarray, scales: np.ndarray) -> tuple[float, ...]:
    """Fill the codes and scales of some blocks [n, block, out]; return the sums of Rounded."""
    largest = _largest(blocks)
    scaled, rounded = np.empty_like(blocks), np.empty_like(blocks)
    plain, smallest = 0.0, np.full(largest.shape, np.inf, np.float32)
    for factor in SHRINK:
        scale = _stored(largest * np.float32(factor / HIGHEST), scale_type)
        _round(blocks, scale, scaled, rounded)
        error = _sum_of_squares(np.subtract(scaled, rounded, out=scaled)) * scale * scale
        if factor == 1:
            plain = error.sum(dtype=np.float64)
        better = error < smallest
        np.copyto(smallest, error, where=better)
        np.copyto(scales, scale, where=better)
    _round(blocks, scales, scaled, rounded)
    codes[:] = rounded
    return _sum_of_squares(blocks).sum(dtype=np.float64), plain, smallest.sum(dtype=np.float64)


def _round(blocks: np.ndarray, scale: np.ndarray, scaled: np.ndarray, rounded: np.ndarray) -> None:
    """Fill `scaled` with blocks / scale and `rounded` with the nearest codes."""
    np.multiply(blocks, (1 / scale)[:, None], out=scaled)
    np.clip(np.rint(scaled, out=rounded), LOWEST, HIGHEST, out=rounded)


def round_to_int8(weights: np.ndarray, scale_type: str) -> Rounded:
    """Round float32 weights [in, out], a scale per output. Raises ValueError as round_to_int4."""
    scales = _stored(_largest(weights[None])[0] / np.float32(127), scale_type)
    scaled = weights * (1 / scales)
    rounded = np.clip(np.rint(scaled), -127, 127)
    error = _sum_of_squares((scaled - rounded)[None])[0] * scales * scales
    total = float(error.sum(dtype=np.float64))
    weight = float(_sum_of_squares(weights[None]).sum(dtype=np.float64))
    return Rounded(rounded.astype(np.int8), scales, weight, total, total)


def _sum_of_squares(blocks: np.ndarray) -> np.ndarray:
    """Sum squares over each block, [n, block, out] -> [n, out]."""
    squares: np.ndarray = np.einsum("nbo,nbo->no", blocks, blocks)
    return squares


def _largest(blocks: np.ndarray) -> np.ndarray:
    """Find the largest magnitudes, [n, block, out] -> [n, out]. Raises ValueError for what is not a finite number."""
    largest: np.ndarray = np.abs(blocks).max(axis=1)
    if not np.isfinite(largest).all():
        raise ValueError("values that are not finite numbers")
    return largest


def _stored(scales: np.ndarray, scale_type: str) -> np.ndarray:
    """Round scales to the stored type; 1 where that gives 0, since TensorRT takes positive scales only."""
    precision = Precision.from_safetensors(scale_type)
    kept = precision.to_float32(precision.from_float32(scales))
    if not np.isfinite(kept).all():
        raise ValueError(f"values so large that their scale leaves the range of {scale_type}")
    # The reciprocal of a smaller one could be infinite.
    return np.where(kept < np.finfo(np.float32).tiny, np.float32(1), kept)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Pack int8 codes [in, out], out even, into uint8 [in, out / 2], the first of two in the low bits, as in ONNX."""
    pairs = codes.view(np.dtype("<u2"))
    return ((pairs & 15) | ((pairs >> 4) & 0xF0)).astype(np.uint8)


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """Unpack uint8 [in, out / 2] into int8 codes [in, out]."""
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
    # An arithmetic shift brings the sign along.
    codes[:, 0::2] = (packed << 4).view(np.int8) >> 4
    codes[:, 1::2] = packed.view(np.int8) >> 4
    return codes


def dequantize(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Multiply codes [in, out] by scales [in / block, out] or [out]: float32 weights [in, out]."""
    by_block = np.atleast_2d(scales)
    return codes * np.repeat(by_block, len(codes) // len(by_block), axis=0).astype(np.float32)


def relative_error(error: float, weight: float) -> float:
    """Take the root of squared error over squared weights: 0.1 is an error a tenth as large as the weights."""
    return float(np.sqrt(error / weight)) if weight else 0.0
