"""Dequantize the matrices of a quantised bundle, so that PyTorch can compute with the same weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sfexport.artifacts.bundle import Bundle
from sfexport.checkpoint.checkpoint import Tensor, read_shard
from sfexport.exporting.rounding import dequantize, unpack_int4
from sfexport.exporting.weights_layout import FILE

_ROWS = re.compile(r"(?P<name>.+)\[(?P<first>\d+):\d+\]")


@dataclass(frozen=True)
class RoundedMatrix:
    """Rows of a tensor, dequantized.

    Attributes:
        name: of the tensor.
        first: index of the first row.
        weights: float32 [rows, in].
    """

    name: str
    first: int
    weights: np.ndarray


def rounded_matrices(bundle: Bundle) -> Iterator[RoundedMatrix]:
    """Yield every rounded matrix, or run of rows of one, reading each when it is asked for."""
    _, places = read_shard(bundle.weights_directory / FILE, FILE)
    for part in (bundle.quantization or {})["matrices"]:
        found = _ROWS.fullmatch(part)
        name, first = (found["name"], int(found["first"])) if found else (part, 0)
        yield RoundedMatrix(name, first, _weights(part, places))


def _weights(part: str, places: dict[str, Tensor]) -> np.ndarray:
    scales = places[f"{part}.scale"].rows()
    if f"{part}.int8" in places:
        return dequantize(_codes(places[f"{part}.int8"]), scales).T
    codes = unpack_int4(_codes(places[f"{part}.int4"]))
    if f"{part}.zero" in places:
        zeros = unpack_int4(_codes(places[f"{part}.zero"])) & 15
        codes = (codes & 15) - np.repeat(zeros, len(codes) // len(zeros), axis=0)
    return dequantize(codes, scales).T


def _codes(place: Tensor) -> np.ndarray:
    """Read codes as they are stored, int8 or two to a byte."""
    stored = np.int8 if place.dtype == "I8" else np.uint8
    return np.fromfile(place.shard, stored, place.length, offset=place.offset).reshape(place.shape)
