"""Whether the weights that graphs point to are numbers that the graphs can compute with. Imports onnx and NumPy.

A bundle is exported without reading its weights, so a diverged training, a damaged file, or a weight that float16
cannot hold would only show as nonsense in answers. Building reads them all anyway.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from sfexport.checkpoint import NO_NUMBERS
from sfexport.errors import CheckpointError
from sfexport.graphs.quantize import NOT_FINITE
from sfexport.manifest import GRAPHS, Bundle

_CHUNK_BYTES = 8 << 20
# Fewer bytes are read before anyone wonders.
_WORTH_REPORTING = 1 << 30
_FLOATS = {onnx.TensorProto.FLOAT: "F32", onnx.TensorProto.FLOAT16: "F16", onnx.TensorProto.BFLOAT16: "BF16"}
# The bits, without the sign, of the first number that rounds to infinity in float16: 65520; in bfloat16 65536.
_BEYOND_FP16 = {"F32": 0x477FF000, "BF16": 0x4780}


@dataclass(frozen=True)
class _Span:
    """Some bytes of a stored tensor."""

    name: str
    file: Path
    offset: int
    length: int
    dtype: str


def check_weights(bundle: Bundle, report: Callable[[str], None] = lambda line: None) -> None:
    """Read all floating-point weights of a bundle's graphs once.

    Raises:
        CheckpointError: one is not finite, or becomes infinite in a float16 graph; the tensor is named.
    """
    spans = list(_spans(bundle))
    total = sum(span.length for span in spans)
    if total > _WORTH_REPORTING:
        report(f"checking {total / 1e9:,.1f} GB of weights")
    half = bundle.precision == "fp16"
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for span, problem in zip(spans, pool.map(lambda span: _problem(span, half), spans), strict=True):
            if problem:
                pool.shutdown(wait=False, cancel_futures=True)
                raise CheckpointError(f"Tensor '{span.name}' in {span.file.name} has {problem[0]}.", problem[1])


def _spans(bundle: Bundle) -> Iterator[_Span]:
    seen = set()
    for graph in GRAPHS:
        for tensor in _initializers(bundle.graph_file(graph)):
            place = {entry.key: entry.value for entry in tensor.external_data}
            key = (place.get("location"), place.get("offset"))
            if not place or tensor.data_type not in _FLOATS or key in seen:
                continue
            seen.add(key)
            file, first, length = bundle.weights_directory / place["location"], *map(int, (key[1], place["length"]))
            for start in range(0, length, _CHUNK_BYTES):
                size = min(_CHUNK_BYTES, length - start)
                yield _Span(tensor.name, file, first + start, size, _FLOATS[tensor.data_type])


def _initializers(file: Path) -> Sequence[onnx.TensorProto]:
    """Of a graph; none where it cannot be read, which the runtime says better."""
    try:
        return onnx.load(file, load_external_data=False).graph.initializer
    except DecodeError:
        return ()


def _problem(span: _Span, half: bool) -> tuple[str, str] | None:
    """(what is wrong, what to do about it), or None."""
    exponent = NOT_FINITE[span.dtype]
    values = np.fromfile(span.file, exponent.dtype, span.length // exponent.itemsize, offset=span.offset)
    # Without the sign, numbers are in the order of their bits: infinity and NaN are largest.
    largest = (values & (np.iinfo(exponent.dtype).max >> 1)).max(initial=0)
    if largest >= exponent:
        return "values that are not finite numbers", NO_NUMBERS
    if half and largest >= _BEYOND_FP16.get(span.dtype, exponent):
        return "values that float16 cannot hold", "Export with --precision bf16 or fp32."
    return None
