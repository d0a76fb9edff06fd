"""Rules for one node that TensorRT's ONNX parser applies beyond operators and types: each yields what is wrong."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sfexport.dtypes import Precision, operator_table_name

QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
EXTERNAL_KEYS = ("location", "offset", "length", "checksum")  # the parser refuses a tensor with any other


@dataclass(frozen=True)
class Scope:
    """Types, constants and weights that the nodes of one graph see.

    Attributes:
        types: of values, by name.
        constants: tensors by name, of initializers and Constant nodes; None where a Constant is none.
        prefix: how the nodes' names begin.
        weights: directory of the external data; None: external values are not read.
    """

    types: Mapping[str, onnx.TypeProto]
    constants: Mapping[str, onnx.TensorProto | None] = field(default_factory=dict)
    prefix: str = ""
    weights: Path | None = None

    def dtype(self, name: str) -> str:
        """Return a value's type as the table of operators names it, or an empty string if unknown."""
        return dtype_name(self.types.get(name))

    def dims(self, name: str) -> list[int | None] | None:
        """Return a value's dimensions (None: dynamic), or None for an unknown rank."""
        kind = self.types.get(name, onnx.TypeProto()).tensor_type
        if not kind.HasField("shape"):
            return None
        return [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]


@dataclass(frozen=True)
class Node:
    """A node, its name in messages, and what it sees."""

    proto: onnx.NodeProto
    label: str
    scope: Scope

    def attribute(self, name: str, default: Any = None) -> Any:
        found = next((a for a in self.proto.attribute if a.name == name), None)
        return default if found is None else onnx.helper.get_attribute_value(found)

    def input(self, position: int) -> str:
        """Return an input's name; an empty string where there is none."""
        return next(iter(self.proto.input[position : position + 1]), "")


def limit_problems(node: Node, limits: Mapping[str, Any], parser: str) -> Iterator[str]:
    """Yield what passes the limits of the node's operator.

    Args:
        limits: the operator's limits in parser_support.toml.
        parser: the parser's name in messages.
    """
    inputs = node.proto.input
    for i in limits.get("constant", ()):
        if node.input(i) and inputs[i] not in node.scope.constants:
            yield f"Its input {inputs[i]!r} is computed; {parser} wants a constant."
    for i, attribute in limits.get("computed", {}).items():
        name = node.input(int(i))
        if name and name not in node.scope.constants and node.attribute(attribute) is None:
            yield f"Its input {name!r} is computed and it has no attribute {attribute!r}; {parser} wants it then."
            break
    for i, (minimum, maximum) in limits.get("rank", {}).items():
        dims = node.scope.dims(inputs[int(i)])
        if dims is not None and not minimum <= len(dims) <= maximum:
            wants = minimum if minimum == maximum else f"{minimum} to {maximum}"
            yield f"Its input {inputs[int(i)]!r} has rank {len(dims)}; {parser} wants {wants}."
    for kind, names in (("inputs", inputs), ("outputs", node.proto.output)):
        if any(names[limits.get(kind, len(names)) :]):
            yield f"It has more {kind} than {parser} takes: {limits[kind]}."
    for attribute in node.proto.attribute:
        takes = limits.get("attributes", {}).get(attribute.name)
        if takes is not None and any(value not in takes for value in _attribute_values(attribute)):
            values = f"only {', '.join(map(str, takes))}" if takes else "no such attribute"
            yield f"Its attribute {attribute.name!r} has another value: {parser} takes {values}."


def mixed_type_problem(node: Node, opset: int) -> str | None:
    """Yield inputs of different types where ONNX asks for one: TensorRT casts nothing in a strongly typed network."""
    first: dict[str, str] = {}
    for kind, name, variable in operands(node.proto, opset):
        if kind != "input" or not node.scope.dtype(name) or not _is_one_type(node.proto.op_type, opset, variable):
            continue
        other = first.setdefault(variable, name)
        types = node.scope.dtype(other), node.scope.dtype(name)
        if types[0] != types[1]:
            return f"Its inputs {other!r} and {name!r} must have the same type and are {types[0]} and {types[1]}."
    return None


def gather_problem(node: Node) -> str | None:
    """Find a negative index on a dynamic axis: TensorRT's header leaves undefined what it reads."""
    if node.proto.op_type not in ("Gather", "GatherElements"):
        return None
    index, dims = node.scope.constants.get(node.input(1)), node.scope.dims(node.input(0))
    values = None if index is None else _values(index, None)
    if values is None or not (values < 0).any():
        return None
    axis = node.attribute("axis", 0)
    if dims and dims[axis] is not None:
        return None
    return f"Its index {node.input(1)!r} is negative and axis {axis} dynamic, which TensorRT does not define."


def quantization_problems(node: Node, parser: str, int4_blocks: tuple[int, ...]) -> Iterator[str]:
    """Yield what TensorRT does not take: zero points, scales that are not positive, some INT4 blocks and widths."""
    zero = node.scope.constants.get(node.input(2))
    if zero is not None and (any(zero.raw_data) or any(zero.int32_data)):
        yield f"Its zero point {zero.name!r} is not zero; {parser} takes no other."
    scale = node.scope.constants.get(node.input(1))
    scales = None if scale is None else _values(scale, node.scope.weights)
    if scales is not None and not (np.isfinite(scales) & (scales > 0)).all():
        yield f"Its scale {node.input(1)!r} has values that are not positive numbers; TensorRT wants those."
    name = node.input(0) if node.proto.op_type == "DequantizeLinear" else node.proto.output[0]
    if node.scope.dtype(name) != "INT4":
        return
    block = node.attribute("block_size", 0)
    if block not in int4_blocks:
        has = f"in blocks of {block}" if block else "without blocks"
        yield f"It is INT4 {has}; TensorRT has kernels for blocks of {' or '.join(map(str, int4_blocks))}."
    dims = node.scope.dims(name)
    scale_dims, axis = node.scope.dims(node.input(1)), node.attribute("axis", 1)
    if block and dims and scale_dims and None not in (*dims, *scale_dims) and axis < len(dims):
        wanted = [*dims]
        wanted[axis] = -(-dims[axis] // block)
        if [*scale_dims] != wanted:
            yield f"Its scale {node.input(1)!r} is of shape {[*scale_dims]}; blocks along axis {axis} want {wanted}."
    if dims and dims[-1] is not None and dims[-1] % 2:
        yield f"The last dimension of {name!r} is odd, which INT4 cannot have."


def external_data_problem(tensor: onnx.TensorProto, parser: str) -> str | None:
    """Find external data that the parser refuses without saying why."""
    strange = next((e.key for e in tensor.external_data if e.key not in EXTERNAL_KEYS), None)
    if tensor.data_location != onnx.TensorProto.EXTERNAL or strange is None:
        return None
    takes = ", ".join(EXTERNAL_KEYS)
    return f"The external data of {tensor.name!r} has the key {strange!r}; {parser} takes only {takes}."


def constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto | None]:
    """Collect initializers and the values of Constant nodes, by name."""
    found: dict[str, onnx.TensorProto | None] = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            found |= dict.fromkeys(node.output, _constant(node))
    return found


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    attribute = next(iter(node.attribute), None)
    if attribute is None or attribute.name in ("sparse_value", "value_string", "value_strings"):
        return None
    if attribute.name == "value":
        tensor: onnx.TensorProto = attribute.t
        return tensor
    dtype = np.int64 if attribute.name.startswith("value_int") else np.float32
    return onnx.numpy_helper.from_array(np.array(onnx.helper.get_attribute_value(attribute), dtype))


def _values(tensor: onnx.TensorProto, weights: Path | None) -> np.ndarray | None:
    """Return a small tensor's values; None where they lie in a file that cannot be read from here."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    place = {entry.key: entry.value for entry in tensor.external_data}
    precision, location = Precision.from_onnx(tensor.data_type), place.get("location", "")
    if weights is None or precision is None or Path(location).name != location or not (weights / location).is_file():
        return None
    try:
        count, offset = int(np.prod(tensor.dims)), int(place.get("offset", 0))
        stored = np.fromfile(weights / location, precision.numpy, count, offset=offset)
    except (OSError, ValueError):
        return None
    return precision.to_float32(stored)


def dtype_name(value: onnx.TypeProto | None) -> str:
    """Return a type's name in the table of operators; an empty string if unknown."""
    if value is None:
        return ""
    kind = value.WhichOneof("value")
    if kind != "tensor_type":
        return (kind or "").upper()
    element = value.tensor_type.elem_type
    name = onnx.TensorProto.DataType.Name(element) if element else ""
    return operator_table_name(name)


@functools.cache
def _schema(op_type: str, opset: int) -> Any:
    """Return the operator's definition, or None for one that only older ONNX has."""
    try:
        return onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return None


def operands(node: onnx.NodeProto, opset: int) -> Iterator[tuple[str, str, str]]:
    """'input' or 'output', the value's name, and its type variable in the operator's definition, if it has one."""
    schema = _schema(node.op_type, opset)
    for kind, names in (("input", node.input), ("output", node.output)):
        parameters = getattr(schema, f"{kind}s") if schema else ()
        for i, name in enumerate(names):
            # The last parameter of a variadic operator stands for all that follow.
            if name:
                yield kind, name, parameters[min(i, len(parameters) - 1)].type_str if parameters else ""


def _is_one_type(op_type: str, opset: int, variable: str) -> bool:
    """Tell whether operands of this variable all have one type: it is a variable, and no variadic operand mixes it."""
    schema = _schema(op_type, opset)
    if schema is None or variable not in {c.type_param_str for c in schema.type_constraints}:
        return False
    return all(p.is_homogeneous for p in (*schema.inputs, *schema.outputs) if p.type_str == variable)


def _attribute_values(attribute: onnx.AttributeProto) -> list[Any]:
    value = onnx.helper.get_attribute_value(attribute)
    return [v.decode() if isinstance(v, bytes) else v for v in (value if isinstance(value, list) else [value])]
