"""Compute a window of a resized picture alone, bit for bit as Pillow's bicubic resize does.

Pillow resizes whole pictures, or boxes whose edges it rounds to 24 bits; a strip of 16x4000 pixels becomes 576x144000
before its middle is cut out.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

PRECISION = 22  # bits of Pillow's fixed-point weights
SUPPORT = 2.0  # of the bicubic kernel, in source pixels


def resized_window(
    frame: np.ndarray, size: tuple[int, int], offset: tuple[int, int], shape: tuple[int, int]
) -> np.ndarray:
    """Compute a window of a frame resized bicubically with antialiasing.

    Args:
        frame: uint8 [H, W, 3].
        size: height and width that the whole frame would be resized to.
        offset: row and column of the window in it.
        shape: height and width of the window.

    Returns:
        uint8 [*shape, 3].
    """
    rows = _Taps.of(frame.shape[0], size[0], offset[0], shape[0])
    columns = _Taps.of(frame.shape[1], size[1], offset[1], shape[1])
    # Each direction is rounded to 8 bits, so the result depends on their order.
    if _is_down_first(frame.shape[:2], size):
        down = rows.apply(frame[:, columns.start : columns.stop])
        return columns.apply(down.transpose(1, 0, 2), origin=columns.start).transpose(1, 0, 2)
    across = columns.apply(frame[rows.start : rows.stop].transpose(1, 0, 2)).transpose(1, 0, 2)
    return rows.apply(across, origin=rows.start)


def _is_down_first(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Return whether the installed Pillow resizes the height first, for these heights and widths."""
    (height, width), (target_height, target_width) = source, target
    is_much_lower = height > target_height and height - target_height > 2 * (width - target_width)
    return is_much_lower and _pillow_compares_sides()


@cache
def _pillow_compares_sides() -> bool:
    """Find out, with a small picture, whether Pillow chooses the order by the sides (13 does; earlier: width first)."""
    frame = np.random.default_rng(0).integers(0, 256, (60, 10, 3), np.uint8)
    resized = np.asarray(Image.fromarray(frame).resize((20, 20), Image.Resampling.BICUBIC))
    rows, columns = _Taps.of(60, 20, 0, 20), _Taps.of(10, 20, 0, 20)
    across_first = rows.apply(columns.apply(frame.transpose(1, 0, 2)).transpose(1, 0, 2))
    return not np.array_equal(resized, across_first)


class _Taps:
    """The source positions and weights of each output position, along one direction.

    Attributes:
        first: first source position of each output, int64 [outputs].
        weights: fixed-point weights from there on, int64 [outputs, taps].
        start: first source position that is needed.
        stop: end of the source positions that are needed.
    """

    def __init__(self, first: np.ndarray, weights: np.ndarray, stop: int) -> None:
        self.first, self.weights = first, weights
        self.start, self.stop = int(first[0]), stop

    @classmethod
    def of(cls, source: int, target: int, offset: int, count: int) -> _Taps:
        """Compute the taps of outputs offset..offset+count-1 in Pillow's order of operations, in float64."""
        if source == target:
            first = np.arange(offset, offset + count, dtype=np.int64)
            return cls(first, np.full((count, 1), 1 << PRECISION, np.int64), offset + count)
        scale = source / target
        stretch = max(scale, 1.0)
        support = SUPPORT * stretch
        centre = (np.arange(offset, offset + count) + 0.5) * scale
        first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
        stop = np.minimum((centre + support + 0.5).astype(np.int64), source)
        taps = int((stop - first).max())
        weights, total = np.zeros((count, taps)), np.zeros(count)
        for tap in range(taps):
            inside = first + tap < stop
            weights[:, tap] = np.where(inside, _bicubic((tap + first - centre + 0.5) * (1.0 / stretch)), 0.0)
            total += weights[:, tap]
        weights = weights * (1.0 / total)[:, None]
        fixed = np.trunc(np.copysign(0.5, weights) + weights * (1 << PRECISION)).astype(np.int64)
        return cls(first, fixed, int(stop.max()))

    def apply(self, pixels: np.ndarray, origin: int = 0) -> np.ndarray:
        """Resize uint8 `pixels`, whose first row is the source's row `origin`, along the first axis."""
        total = np.full((len(self.first), *pixels.shape[1:]), 1 << (PRECISION - 1), np.int64)
        for tap in range(self.weights.shape[1]):
            # After the last source position the weights are 0.
            at = np.minimum(self.first + tap - origin, len(pixels) - 1)
            total += pixels[at] * self.weights[:, tap].reshape(-1, *(1,) * (pixels.ndim - 1))
        resized: np.ndarray = np.clip(total >> PRECISION, 0, 255)
        return resized.astype(np.uint8)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Return the weights of Keys' kernel with a = -0.5."""
    x = np.abs(x)
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    weights: np.ndarray = np.where(x < 1.0, near, np.where(x < SUPPORT, far, 0.0))
    return weights
