"""Preprocessing: bit-identical to transformers' CLIPImageProcessor, and shapes for every size of frame."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfexport.checkpoint.image_processor import CLIP_MEAN, CLIP_STD, ImageProcessorConfig
from sfexport.errors import InputError
from sfexport.video.preprocessing import preprocess
from sfexport.video.resampling import resized_window

GOLDEN = Path(__file__).parents[1] / "data" / "preprocess_size64.npz"
CLIP_64 = ImageProcessorConfig(size=64, crop=64, keep_aspect=True, mean=CLIP_MEAN, std=CLIP_STD)
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def golden_sizes() -> list[str]:
    with np.load(GOLDEN) as arrays:
        return sorted(name[3:] for name in arrays if name.startswith("in_"))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", golden_sizes())
def test_bit_identical_to_the_image_processor(size: str) -> None:
    with np.load(GOLDEN) as arrays:
        frames, expected = arrays[f"in_{size}"], arrays[f"out_{size}"]
    pixels = preprocess(list(frames), CLIP_64)
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels, expected)


def test_values_are_float32_roundings_of_the_formula() -> None:
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), (16, 16, 3)).copy()
    config = ImageProcessorConfig(size=16, crop=16, keep_aspect=True, mean=CLIP_MEAN, std=CLIP_STD)
    scaled = (ramp.astype(np.float64) * (1 / 255)).astype(np.float32)
    expected = (scaled - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    assert np.array_equal(preprocess([ramp], config)[0], expected.transpose(2, 0, 1))


def test_crop_takes_the_middle() -> None:
    frame = noise(64, 101)
    pixels = preprocess([frame], ImageProcessorConfig(size=64, crop=64, keep_aspect=True, **RAW))
    left = (101 - 64) // 2
    assert np.array_equal(np.rint(pixels[0] * 255), frame[:, left : left + 64].transpose(2, 0, 1))


def test_crop_larger_than_the_frame_pads_with_black() -> None:
    frame = noise(9, 9) | 1
    pixels = np.rint(preprocess([frame], ImageProcessorConfig(size=9, crop=12, keep_aspect=True, **RAW))[0] * 255)
    expected = np.zeros((3, 12, 12))
    # Three rows to share: the image processor puts two of them on top.
    expected[:, 2:11, 2:11] = frame.transpose(2, 0, 1)
    assert np.array_equal(pixels, expected)


def test_crop_larger_than_one_side_pads_that_side_alone() -> None:
    frame = noise(8, 20) | 1
    pixels = np.rint(preprocess([frame], ImageProcessorConfig(size=8, crop=12, keep_aspect=True, **RAW))[0] * 255)
    assert np.array_equal(pixels[:, 2:10], frame[:, 4:16].transpose(2, 0, 1))
    assert not pixels[:, :2].any() and not pixels[:, 10:].any()


def test_without_keep_aspect_the_whole_frame_is_squeezed() -> None:
    frame = noise(30, 70)
    pixels = preprocess([frame], ImageProcessorConfig(size=24, crop=24, keep_aspect=False, **RAW))
    expected = np.asarray(Image.fromarray(frame).resize((24, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(np.rint(pixels[0] * 255), expected.transpose(2, 0, 1))


def test_frames_of_different_sizes_and_read_only_frames() -> None:
    frames = [noise(48, 80), noise(80, 48, seed=1)]
    frames[0].flags.writeable = False
    together = preprocess(frames, CLIP_64)
    assert np.array_equal(together[1:], preprocess(frames[1:], CLIP_64))


def test_no_frames() -> None:
    assert preprocess([], CLIP_64).shape == (0, 3, 64, 64)


@given(
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    target=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    seed=st.integers(0, 99),
)
def test_a_window_is_bit_identical_to_the_whole(height: int, width: int, target: tuple[int, int], seed: int) -> None:
    frame = noise(height, width, seed)
    whole = np.asarray(Image.fromarray(frame).resize(target[::-1], Image.Resampling.BICUBIC))
    top, left = target[0] // 3, target[1] // 4
    window = resized_window(frame, target, (top, left), (target[0] - top, max(target[1] // 2, 1)))
    assert np.array_equal(window, whole[top:, left : left + max(target[1] // 2, 1)])


@pytest.mark.parametrize(("height", "width"), [(4000, 16), (16, 4000), (30, 700), (1000, 7), (3, 90), (2100, 500)])
@pytest.mark.parametrize("crop", [24, 57, 90])
def test_thin_frames_have_the_same_pixels_as_when_resized_whole(height: int, width: int, crop: int) -> None:
    frame = noise(height, width) | 1
    short = min(height, width)
    target = [int(57 * side / short) for side in (width, height)]
    whole = np.asarray(Image.fromarray(frame).resize(target, Image.Resampling.BICUBIC))
    config = ImageProcessorConfig(size=57, crop=crop, keep_aspect=True, **RAW)
    pixels = np.rint(preprocess([frame], config)[0] * 255).transpose(1, 2, 0)
    # The image processor's own rule for the crop, padding included.
    expected = np.zeros((crop, crop, 3))
    rows, columns = (_overlap(side, crop) for side in whole.shape[:2])
    expected[rows[1], columns[1]] = whole[rows[0], columns[0]]
    assert np.array_equal(pixels, expected)


def _overlap(side: int, crop: int) -> tuple[slice, slice]:
    """Where the middle lies in the picture and in the crop."""
    if side >= crop:
        first = (side - crop) // 2
        return slice(first, first + crop), slice(0, crop)
    first = -(-(crop - side) // 2)
    return slice(0, side), slice(first, first + side)


def test_one_column_of_pixels_takes_little_memory() -> None:
    config = ImageProcessorConfig(size=576, crop=576, keep_aspect=True, **RAW)
    frame = noise(100_000, 1)
    tracemalloc.start()
    try:
        pixels = preprocess([frame], config)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    # The middle pixel alone is seen, blended with its neighbours.
    assert pixels[0, :, 288].std(axis=-1).max() < 1e-6


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(1, 40),
    crop=st.integers(1, 40),
    keep_aspect=st.booleans(),
    count=st.integers(1, 3),
)
def test_shape_for_every_size(height: int, width: int, size: int, crop: int, keep_aspect: bool, count: int) -> None:
    config = ImageProcessorConfig(size=size, crop=crop, keep_aspect=keep_aspect, mean=CLIP_MEAN, std=CLIP_STD)
    pixels = preprocess([noise(height, width)] * count, config)
    assert pixels.shape == (count, 3, crop, crop)
    assert pixels.dtype == np.float32 and pixels.flags.c_contiguous
    assert np.isfinite(pixels).all()


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(frame: np.ndarray) -> None:
    with pytest.raises(InputError, match="uint8"):
        preprocess([frame], CLIP_64)
