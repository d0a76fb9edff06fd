"""Read all weights of a bundle once: they must be the bundle's, and numbers that its graphs can compute with.

A bundle is exported without reading its weights, so a diverged training, a damaged file, or a weight that float16
cannot hold would only show as nonsense in answers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sfexport.artifacts.bundle import GRAPHS, Bundle
from sfexport.checkpoint.checkpoint import NO_NUMBERS
from sfexport.dtypes import Precision
from sfexport.engines.external_data import stored_tensors
from sfexport.errors import BundleError, CheckpointError
from sfexport.printable import size_text
from sfexport.progress import OnStep, no_step

_CHUNK_BYTES = 8 << 20
_WAITING = 8  # chunks that are read and not yet checked
_ANNOUNCED_BYTES = 1 << 30  # weights of more bytes take seconds to read: on_step is told


@dataclass(frozen=True)
class _Span:
    """A range of bytes of a weight file; name and format of the floats in them, or None for other bytes."""

    offset: int
    length: int
    name: str | None = None
    dtype: Precision | None = None


def check_weights(bundle: Bundle, on_step: OnStep = no_step) -> dict[str, Any]:
    """Read every weight file from end to end; for the engines' manifest: name -> sha256, and the time of the file.

    Raises:
        BundleError: a file is not the one that was exported; a graph's weights lie elsewhere.
        CheckpointError: a number is not finite, or becomes infinite in a float16 graph; the tensor is named.
    """
    tensors: dict[str, dict[int, _Span]] = {name: {} for name in bundle.weight_sizes}
    for span, shard in _floats(bundle):
        known = tensors[shard].get(span.offset)
        if known is None or known.length < span.length:
            tensors[shard][span.offset] = span
    total = sum(bundle.weight_sizes.values())
    if total > _ANNOUNCED_BYTES:
        on_step(f"checking {size_text(total)} of weights")
    found = {}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for name, spans in tensors.items():
            file = bundle.weights_directory / name
            time = file.stat().st_mtime_ns
            digest = _check_file(file, sorted(spans.values(), key=lambda s: s.offset), bundle, pool)
            found[name] = {"sha256": digest, "mtime_ns": time}
            if bundle.weight_digests[name] not in (None, digest):
                raise BundleError(
                    f"The weight shard {file} is not the one this bundle was exported from: its sha256 is another.",
                    "Export again.",
                )
    return found


def _floats(bundle: Bundle) -> Iterator[tuple[_Span, str]]:
    """Yield the spans of floats that the graphs compute with, and of the embedding table; each with its file's name."""
    for graph in GRAPHS:
        for tensor in stored_tensors(bundle.graph_file(graph), bundle):
            if dtype := Precision.from_onnx(tensor.dtype):
                yield _Span(tensor.offset, tensor.length, tensor.name, dtype), tensor.file.name
    table = bundle.embedding()
    dtype = Precision.from_safetensors(table.dtype)
    yield _Span(table.offset, table.length, table.name, dtype), table.shard.name


def _check_file(file: Path, spans: list[_Span], bundle: Bundle, pool: ThreadPoolExecutor) -> str:
    """Hash a file while other threads check its floats."""
    digest, half = sha256(), bundle.precision == Precision.FP16
    waiting: deque[tuple[_Span, Future[tuple[str, str] | None]]] = deque()
    with file.open("rb", buffering=0) as stream:
        for piece in _pieces(spans, bundle.weight_sizes[file.name]):
            data = _read(stream, piece.length, file)
            digest.update(data)
            if piece.dtype is not None:
                waiting.append((piece, pool.submit(_problem, data, piece.dtype, half)))
            while len(waiting) > _WAITING:
                _settle(*waiting.popleft(), file)
        while waiting:
            _settle(*waiting.popleft(), file)
    return digest.hexdigest()


def _pieces(spans: list[_Span], size: int) -> Iterator[_Span]:
    """Cut the whole file into pieces of bounded length, each either floats of one tensor or other bytes.

    Where tensors overlap, which only a shared table does, the bytes belong to the one that begins first.
    """
    position = 0
    for span in [*spans, _Span(size, 0)]:
        yield from _cut(_Span(position, span.offset - position))
        begin = max(position, span.offset)
        position = max(position, span.offset + span.length)
        yield from _cut(_Span(begin, position - begin, span.name, span.dtype))


def _cut(span: _Span) -> Iterator[_Span]:
    for start in range(0, span.length, _CHUNK_BYTES):
        yield _Span(span.offset + start, min(_CHUNK_BYTES, span.length - start), span.name, span.dtype)


def _read(stream: BinaryIO, length: int, file: Path) -> bytes:
    data = stream.read(length)
    while len(data) < length:
        more = stream.read(length - len(data))
        if not more:
            raise BundleError(f"The weight shard {file} has become shorter while it was read.", "Export again.")
        data += more
    return data


def _settle(span: _Span, result: Future[tuple[str, str] | None], file: Path) -> None:
    if problem := result.result():
        raise CheckpointError(f"Tensor '{span.name}' in {file.name} has {problem[0]}.", problem[1])


def _problem(data: bytes, dtype: Precision, half: bool) -> tuple[str, str] | None:
    """Return (what is wrong, what to do about it), or None."""
    exponent = dtype.exponent_mask
    values = np.frombuffer(data, exponent.dtype, len(data) // exponent.itemsize)
    # Without the sign, numbers are in the order of their bits: infinity and NaN are largest.
    largest = (values & (np.iinfo(exponent.dtype).max >> 1)).max(initial=0)
    if largest >= exponent:
        return "values that are not finite numbers", NO_NUMBERS
    if half and largest >= dtype.fp16_overflow:
        return "values that float16 cannot hold", "Export with --precision bf16 or fp32."
    return None
