"""Compute the shapes that an engine accepts for every dynamic tensor, from the numbers of frames and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfexport.artifacts.bundle import Bundle
from sfexport.checkpoint.config import FastPathConfig
from sfexport.checkpoint.fast_path import fast_token_count, source_frames
from sfexport.engines.interface import FIRST_CAPACITY, VISION_CHUNK
from sfexport.errors import SfexportError
from sfexport.values import whole_number

DEFAULT_QUESTION_TOKENS, DEFAULT_NEW_TOKENS, DEFAULT_ROWS = 512, 256, 8
VIDEO, PICTURE = "video", "picture"  # of the compressor: a picture's tokens are not pooled
PREFILL, DECODE = "prefill", "decode"
Range = tuple[int, int, int]  # min, opt, max


@dataclass(frozen=True)
class Limits:
    """The sizes that engines are built for.

    Attributes:
        frames: largest number of frames of a video.
        question_tokens: largest number of text tokens of a prompt (system, question, template).
        new_tokens: largest number of tokens of an answer.
        rows: largest number of questions that are decoded together.
    """

    frames: int
    question_tokens: int = DEFAULT_QUESTION_TOKENS
    new_tokens: int = DEFAULT_NEW_TOKENS
    rows: int = DEFAULT_ROWS

    def __post_init__(self) -> None:
        names = {"frames": self.frames, "max-question-tokens": self.question_tokens, "max-new-tokens": self.new_tokens}
        for name, value in (names | {"max-batch": self.rows}).items():
            whole_number(value, f"--{name}")


@dataclass(frozen=True)
class TensorProfile:
    """Shapes of one tensor in a profile: the smallest, the one to tune for, the largest."""

    name: str
    dtype: str
    is_input: bool
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """One optimisation profile of one graph, resolved for every input and output."""

    name: str
    tensors: tuple[TensorProfile, ...]

    def inputs(self) -> list[TensorProfile]:
        return [t for t in self.tensors if t.is_input]


def resolve_profiles(bundle: Bundle, limits: Limits) -> dict[str, list[Profile]]:
    """Return every graph's profiles.

    The decoder has two, prefill and decode, in this order; the compressor video and, where it differs, picture.

    Raises:
        InputError: more tokens than the model takes.
        SfexportError: a graph has a dimension that this module does not know.
    """
    ranges = _dimension_ranges(bundle, limits)
    out: dict[str, list[Profile]] = {}
    for graph, profiles in ranges.items():
        tensors = bundle.content["graphs"][graph]
        out[graph] = [Profile(name, _resolve(graph, tensors, dims)) for name, dims in profiles.items()]
    return out


def _dimension_ranges(bundle: Bundle, limits: Limits) -> dict[str, dict[str, dict[str, Range]]]:
    """Return the range of every symbolic dimension, by graph and profile."""
    config, frames = bundle.config, limits.frames
    cells, picture_cells = (bundle.tokens_per_frame(single_image=x) for x in (False, True))
    compress = {VIDEO: _compressor_ranges(config.slow_fast.fast, 1, frames, cells)}
    if picture_cells != cells:
        compress[PICTURE] = _compressor_ranges(config.slow_fast.fast, 1, 1, picture_cells)
    fast_tokens, slow = (max(r[d][2] for r in compress.values()) for d in ("fast_tokens", "slow_tokens"))
    chunk = min(VISION_CHUNK, frames)
    return {
        "vision_encoder": {"encode": {"frames": (1, chunk, chunk)}},
        "compressor": compress,
        "decoder": _decoder_ranges(limits, fast_tokens, slow),
    }


def _compressor_ranges(fast: FastPathConfig, fewest: int, frames: int, cells: int) -> dict[str, Range]:
    """Return the compressor's ranges for `fewest` to `frames` frames of `cells` tokens each."""
    counts = range(fewest, frames + 1)
    fast_frames = [len(source_frames(n, fast)) for n in counts]
    fast_tokens = [fast_token_count(n, cells, fast) for n in counts]
    fast_cells = fast_tokens[0] // fast_frames[0]
    return {
        "frames": (fewest, frames, frames),
        "cells": (cells, cells, cells),
        "fast_frames": (min(fast_frames), fast_frames[-1], max(fast_frames)),
        "fast_cells": (fast_cells, fast_cells, fast_cells),
        "fast_tokens": (min(fast_tokens), fast_tokens[-1], max(fast_tokens)),
        "slow_tokens": (fewest * cells, frames * cells, frames * cells),
    }


def _decoder_ranges(limits: Limits, fast_tokens: int, slow: int) -> dict[str, dict[str, Range]]:
    prefix, longest = limits.question_tokens + fast_tokens, max(fast_tokens, limits.question_tokens)
    own = limits.question_tokens + limits.new_tokens
    prefill = {"batch": (1, 1, 1), "sequence": (1, longest, longest), "prefix": (0, 0, prefix)}
    # No question has K/V of its own before it; a largest size of 0 would make the tensor useless to the builder.
    prefill["capacity"] = (0, 0, min(FIRST_CAPACITY, own))
    decode = {"batch": (1, 1, limits.rows), "sequence": (1, 1, 1), "prefix": (0, prefix, prefix)}
    decode["capacity"] = (min(FIRST_CAPACITY, own), min(2 * FIRST_CAPACITY, own), own)
    shared = {"videos": (1, 1, 1), "slow": (1, slow, slow)}
    return {PREFILL: shared | prefill, DECODE: shared | decode}


def _resolve(
    graph: str, tensors: Mapping[str, Sequence[Mapping[str, Any]]], ranges: Mapping[str, Range]
) -> tuple[TensorProfile, ...]:
    out = []
    for side in ("inputs", "outputs"):
        for tensor in tensors[side]:
            dims = [_range(graph, tensor["name"], d, ranges) for d in tensor["shape"]]
            shapes = (tuple(d[i] for d in dims) for i in range(3))
            out.append(TensorProfile(tensor["name"], tensor["dtype"], side == "inputs", *shapes))
    return tuple(out)


def _range(graph: str, tensor: str, dimension: int | str, ranges: Mapping[str, Range]) -> Range:
    if isinstance(dimension, int):
        return dimension, dimension, dimension
    if dimension not in ranges:
        raise SfexportError(f"The {graph}'s tensor {tensor} has an unknown dynamic dimension {dimension!r}.")
    return ranges[dimension]
