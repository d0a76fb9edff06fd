"""Check that a graph's weights lie in the bundle's own weight files, before any of them is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from sfexport.artifacts.bundle import Bundle
from sfexport.artifacts.manifest_fields import AGAIN
from sfexport.dtypes import onnx_bits
from sfexport.errors import BundleError

_T = onnx.TensorProto


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is stored as `length` bytes at `offset` of `file`; `dtype` is ONNX's number."""

    name: str
    dtype: int
    file: Path
    offset: int
    length: int


def stored_tensors(graph: Path, bundle: Bundle) -> list[StoredTensor]:
    """List a graph's tensors that lie in other files; none if the graph cannot be read: the runtime reports that.

    Raises:
        BundleError: one lies outside the bundle's weight files, or its place does not fit its shape.
    """
    try:
        model = onnx.load(graph, load_external_data=False)
    except DecodeError:
        return []
    if next(_hidden(model), None) is not None:
        raise BundleError(f"{graph} keeps weights in places that sfexport does not use.", AGAIN)
    return [_stored(tensor, graph, bundle) for tensor in model.graph.initializer if _is_external(tensor)]


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == _T.EXTERNAL or len(tensor.external_data) > 0


def _hidden(model: onnx.ModelProto) -> Iterator[str]:
    """List tensors with external data, and graphs, in places where sfexport's graphs have none."""
    for sparse in model.graph.sparse_initializer:
        yield sparse.values.name
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.HasField("g") or attribute.graphs or attribute.HasField("sparse_tensor"):
            yield attribute.name
        tensors = [attribute.t] if attribute.HasField("t") else []
        yield from (tensor.name for tensor in (*tensors, *attribute.tensors) if _is_external(tensor))


def _stored(tensor: onnx.TensorProto, graph: Path, bundle: Bundle) -> StoredTensor:
    place = {entry.key: entry.value for entry in tensor.external_data}
    name, sizes = place.get("location", ""), bundle.weight_sizes
    if name not in sizes:
        raise _wrong(tensor, graph, f"lies in {name!r}, which is not one of the bundle's weight files")
    try:
        offset, length = int(place["offset"]), int(place["length"])
    except (KeyError, ValueError):
        raise _wrong(tensor, graph, "has no offset and length that are numbers") from None
    if offset < 0 or length < 0 or offset + length > sizes[name]:
        raise _wrong(tensor, graph, f"reaches out of {name}")
    bits = onnx_bits(tensor.data_type) * math.prod(tensor.dims)
    if any(size < 0 for size in tensor.dims) or length != (bits + 7) // 8 or not length:
        raise _wrong(tensor, graph, f"has {length} bytes, which its shape {list(tensor.dims)} does not take")
    return StoredTensor(tensor.name, tensor.data_type, bundle.weights_directory / name, offset, length)


def _wrong(tensor: onnx.TensorProto, graph: Path, problem: str) -> BundleError:
    return BundleError(f"The tensor '{tensor.name[:200]}' in {graph} {problem}.", AGAIN)
