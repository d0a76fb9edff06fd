"""Rounding weights to 4 and 8 bits: the arithmetic, for arrays of any kind."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sfexport.dtypes import Precision
from sfexport.exporting.rounding import (
    BLOCKS,
    block_for,
    dequantize,
    pack_int4,
    relative_error,
    round_to_int4,
    round_to_int8,
    unpack_int4,
)
from sfexport.graphs.initializers import even_parts

STORED = tuple(precision.safetensors for precision in Precision)


def as_stored(values: np.ndarray, name: str) -> np.ndarray:
    """float32 values rounded to the dtype of that name, as float32 again."""
    precision = Precision.from_safetensors(name)
    return precision.to_float32(precision.from_float32(values))


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """float32 [in, out] and a block: normal or heavy-tailed weights, with blocks of zeros and outliers, any size."""
    block, blocks, outputs = draw(st.sampled_from(BLOCKS)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = rng.standard_t(draw(st.sampled_from([2, 5, 100])), (block * blocks, outputs))
    weights[: draw(st.integers(0, block)), 0] = 0
    weights[draw(st.integers(0, block - 1)), -1] *= draw(st.sampled_from([1, 100]))
    return (weights * 10.0 ** draw(st.integers(-9, 3))).astype(np.float32), block


def exact_error(weights: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Squared error of each block [in / block, out], in float64."""
    by_block = np.repeat(scales.astype(np.float64), len(codes) // len(scales), axis=0)
    squares = (weights.astype(np.float64) - codes * by_block) ** 2
    return squares.reshape(len(scales), -1, codes.shape[1]).sum(1)


@given(matrices(), st.sampled_from(STORED))
def test_the_search_is_never_worse_than_plain_rounding(case: tuple[np.ndarray, int], stored: str) -> None:
    weights, block = case
    assume(stored != "F16" or np.abs(weights).max() / 7 < 65504)  # larger scales are refused
    rounded = round_to_int4(weights, block, stored)
    assert rounded.codes.min() >= -8 and rounded.codes.max() <= 7
    assert (rounded.scales > 0).all(), "TensorRT takes no other"
    assert (as_stored(rounded.scales, stored) == rounded.scales).all()
    largest = np.abs(weights.reshape(-1, block, weights.shape[1])).max(1)
    plain = as_stored(largest * np.float32(1 / 7), stored)
    plain[plain < np.finfo(np.float32).tiny] = 1
    by_row = np.repeat(plain, block, axis=0)
    plain_codes = np.clip(np.rint(weights / by_row), -8, 7)
    found, bound = exact_error(weights, rounded.codes, rounded.scales), exact_error(weights, plain_codes, plain)
    assert (found <= bound * (1 + 1e-5) + 1e-12 * largest**2).all()
    np.testing.assert_allclose([rounded.searched, rounded.plain], [found.sum(), bound.sum()], rtol=1e-3, atol=1e-30)
    assert np.isclose(rounded.weight, (weights.astype(np.float64) ** 2).sum(), rtol=1e-4)


@given(matrices(), st.integers(-4, 4))
def test_zero_stays_zero_and_codes_do_not_depend_on_the_unit(case: tuple[np.ndarray, int], power: int) -> None:
    weights, block = case
    here, there = (round_to_int4(w, block, "F32") for w in (weights, weights * np.float32(2.0**power)))
    assert not here.codes[weights == 0].any()
    assert (here.codes == there.codes).all()
    used = here.scales != 1  # what stands for a block of zeros
    assert (there.scales[used] == here.scales[used] * np.float32(2.0**power)).all()


def test_weights_on_the_grid_are_kept_exactly() -> None:
    codes = np.random.default_rng(0).integers(-7, 8, (256, 6)).astype(np.float32)
    codes[::128] = 7
    rounded = round_to_int4(codes * np.float32(0.25), 128, "F16")
    assert (rounded.codes == codes).all() and (rounded.scales == 0.25).all()
    assert rounded.plain == rounded.searched == 0


def test_normal_weights_lose_an_eighth_less_error_than_by_plain_rounding() -> None:
    weights = np.random.default_rng(0).standard_normal((1024, 256), dtype=np.float32)
    rounded = round_to_int4(weights, 128, "F16")
    plain, searched = (relative_error(e, rounded.weight) for e in (rounded.plain, rounded.searched))
    assert 0.115 < plain < 0.12
    assert searched < 0.875 * plain


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_packing_and_unpacking_are_opposites(inputs: int, pairs: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-8, 8, (inputs, 2 * pairs)).astype(np.int8)
    packed = pack_int4(codes)
    assert (packed.dtype, packed.shape) == (np.uint8, (inputs, pairs))
    assert (unpack_int4(packed) == codes).all()
    # As onnx itself packs: two to a byte, the first in the low half.
    tensor = onnx.helper.make_tensor("codes", onnx.TensorProto.INT4, codes.shape, packed.tobytes(), raw=True)
    assert (onnx.numpy_helper.to_array(tensor).astype(np.int8) == codes).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from(STORED))
def test_int8_is_off_by_half_a_step_at_most(seed: int, stored: str) -> None:
    weights = np.random.default_rng(seed).standard_normal((32, 10), dtype=np.float32)
    rounded = round_to_int8(weights, stored)
    assert rounded.scales.shape == (10,)
    # A scale that is itself rounded may be a little too small for the largest weight.
    slack = {"F32": 1e-6, "F16": 1e-3, "BF16": 1e-2}[stored] * np.abs(weights).max(0)
    off = np.abs(dequantize(rounded.codes, rounded.scales) - weights)
    assert (off <= rounded.scales / 2 + slack).all()
    assert np.isclose(rounded.searched, (off.astype(np.float64) ** 2).sum(), rtol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_not_rounded(bad: float) -> None:
    weights = np.ones((128, 4), np.float32)
    weights[5, 2] = bad
    for rounding in (lambda: round_to_int4(weights, 128, "F32"), lambda: round_to_int8(weights, "F32")):
        with pytest.raises(ValueError, match="not finite"):
            rounding()


def test_a_scale_that_float16_cannot_hold_is_refused() -> None:
    weights = np.full((128, 4), 1e6, np.float32)
    with pytest.raises(ValueError, match="F16"):
        round_to_int4(weights, 128, "F16")
    assert round_to_int4(weights, 128, "BF16").searched < 1e-4 * (weights**2).sum()


@given(st.integers(1, 5000), st.integers(1, 64))
def test_parts_of_a_head_follow_one_another(total: int, parts: int) -> None:
    parts = min(parts, total)
    found = even_parts(total, parts)
    assert len(found) == parts
    assert [first for first, _ in found] == [0, *(last for _, last in found[:-1])] and found[-1][1] == total
    assert all(last > first for first, last in found)


def test_blocks_are_128_where_that_divides_else_64_else_none() -> None:
    assert [block_for(n, 4) for n in (3584, 18944, 896, 192, 64, 96)] == [128, 128, 128, 64, 64, None]
    assert block_for(128, 3) is None, "INT4 comes in pairs"
