"""Check a graph against what TensorRT's ONNX parser takes, per version (parser_support.toml).

Needs no TensorRT. A gap is something that the parser's source refuses or its documents do not list; a graph without one
can still fail to build.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner

from sfexport.engines.tensorrt.parser_rules import (
    QUANTIZING,
    Node,
    Scope,
    constants_of,
    dtype_name,
    external_data_problem,
    gather_problem,
    limit_problems,
    mixed_type_problem,
    operands,
    quantization_problems,
)
from sfexport.errors import InputError
from sfexport.tables import read_table
from sfexport.versions import OLDEST_JETPACK, version_numbers, version_text

PLUGIN_ATTRIBUTES = frozenset({"plugin_namespace", "plugin_version"})
_Key = tuple[str, str]  # a node's domain and operator
_ONNX_DOMAINS = ("", "ai.onnx")
_HINTS = {"DOUBLE": "Cast it to float32.", "UINT8": "Cast it to another type right at the graph's input or output."}


@dataclass(frozen=True)
class ParserSupport:
    """What one version of the parser takes.

    Attributes:
        version: the TensorRT version asked for.
        row: the version whose row of the table is used for it.
        operators: types by operator, as in 'FP32' and 'INT64'. The others: as in parser_support.toml.
    """

    version: str
    row: str
    source: str
    inferred: str
    opset: int
    int4_opset: int
    operators: Mapping[str, frozenset[str]]
    subjects: Mapping[str, str]
    limits: Mapping[str, Mapping[str, Any]]
    tensors: frozenset[str]
    quantized: frozenset[str]
    io: frozenset[str]
    int4_blocks: tuple[int, ...]
    functions_shadow: bool


@dataclass(frozen=True)
class Gap:
    """Something in a graph that the parser does not take.

    Attributes:
        graph: as named by the caller. node, op_type: empty where the graph itself is meant; a node inside a function
            is named after the call, 'call: node'.
        problem: one sentence.
        hint: what to do, or an empty string.
    """

    graph: str
    node: str
    op_type: str
    problem: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.graph}, node {self.node} ({self.op_type})" if self.node else self.graph
        return " ".join(part for part in (f"{place}: {self.problem}", self.hint) if part)


def support_for(version: str) -> ParserSupport:
    """Return what the parser of a TensorRT version ('10.3', '10.16.1.11') takes.

    Raises:
        InputError: no version, or older than the table.
        MissingDependency: Python 3.10 without tomli.
    """
    wanted = version_numbers(version)[:2]
    if len(wanted) < 2:
        raise InputError(f"{version!r} is not a TensorRT version.", "Write it as in 10.3 or 10.16.1.")
    rows = _rows()
    known = [row for row in rows if version_numbers(row.row) <= wanted]
    if not known:
        raise InputError(
            f"TensorRT {version} is older than {rows[0].row}, the oldest version sfexport's graphs are for.",
            f"JetPack {version_text(OLDEST_JETPACK)} and later have it.",
        )
    return replace(known[-1], version=version_text(wanted))


def check_graph(
    model: onnx.ModelProto,
    name: str,
    support: ParserSupport,
    plugins: frozenset[tuple[str, str]] = frozenset(),
    weights: Path | None = None,
) -> list[Gap]:
    """Find everything in a model that the parser is known not to take: nodes, subgraphs and local functions.

    Args:
        model: loaded without its external data.
        name: what to call the graph in the gaps.
        plugins: (domain, op_type) of nodes that plugins compute: only their attributes are checked, and the
            function of that name is not. Where onnx cannot tell the type of such a node's output (no function, no
            value_info), its first input's is assumed.
        weights: directory of the model's external data, of which scales are read; None: they are not read.
    """
    return _Checker(model, name, support, plugins, weights).check()


@functools.cache
def _rows() -> tuple[ParserSupport, ...]:
    """Read the table, every row merged with those before it."""
    table = read_table("sfexport.engines.tensorrt", "parser_support.toml")
    rows: list[ParserSupport] = []
    fields: dict[str, Any] = {}
    operators: dict[str, frozenset[str]] = {}
    limits: dict[str, dict[str, Any]] = {}
    for row in table["version"]:
        fields |= {"inferred": "", **row}
        for types, names in row.get("operators", {}).items():
            operators |= dict.fromkeys(names, frozenset(types.split()))
        limits |= row.get("limits", {})
        rows.append(
            ParserSupport(
                version=fields["tensorrt"],
                row=fields["tensorrt"],
                operators=dict(operators),
                subjects=table["subject"],
                limits=dict(limits),
                int4_blocks=tuple(fields["int4_blocks"]),
                int4_opset=max(fields["opset"], fields["int4_opset"]),
                tensors=frozenset(fields["tensors"].split()),
                quantized=frozenset(fields["quantized"].split()),
                io=frozenset(fields["io"].split()),
                source=fields["source"],
                inferred=fields["inferred"],
                opset=fields["opset"],
                functions_shadow=fields["functions_shadow"],
            )
        )
    return tuple(rows)


class _Checker:
    def __init__(
        self,
        model: onnx.ModelProto,
        name: str,
        support: ParserSupport,
        plugins: frozenset[_Key],
        weights: Path | None,
    ) -> None:
        self._model, self._name, self._support, self._plugins = model, name, support, plugins
        self._weights = weights
        self._functions = {(f.domain, f.name): f for f in model.functions}
        self._opset = max((o.version for o in model.opset_import if o.domain in _ONNX_DOMAINS), default=0)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._edges = {value.name for value in (*model.graph.input, *model.graph.output)}
        self._parser = f"the parser of TensorRT {support.version}"
        self._gaps: list[Gap] = []

    def check(self) -> list[Gap]:
        self._check_opset()
        self._check_edges("input", self._model.graph.input)
        self._check_edges("output", self._model.graph.output)
        try:
            self._check_nodes(self._infer(self._model).graph, Scope({}, weights=self._weights))
        except onnx.shape_inference.InferenceError as error:
            self._add(None, f"onnx cannot infer its types: {' '.join(str(error).split())}")
        return self._gaps

    def _add(self, node: Node | None, problem: str, hint: str = "") -> None:
        place = (node.label, node.proto.op_type) if node else ("", "")
        self._gaps.append(Gap(self._name, *place, problem, hint))

    def _infer(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return the model with the types of its values, plugins' outputs included.

        Nodes that onnx has no definition of are left out meanwhile: its version 1.16 infers nothing after one of them.
        """
        unknown = [self._is_unknown(node) for node in model.graph.node]
        nodes = list(zip(model.graph.node, unknown, strict=True))
        plugins = [n for n in model.graph.node if _key(n) in self._plugins and n.input]
        known = onnx.ModelProto()
        known.CopyFrom(model)
        del known.graph.node[:]
        known.graph.node.extend(n for n, left_out in nodes if not left_out)
        while True:
            known = onnx.shape_inference.infer_shapes(known)
            scope = Scope(_types(known.graph))
            typed = [n for n in plugins if scope.dtype(n.input[0])]
            new = {o: scope.types[n.input[0]] for n in typed for o in n.output if o and not scope.dtype(o)}
            if not new:
                break
            kept = [value for value in known.graph.value_info if value.name not in new]
            # The element type alone: the shape is the plugin's own affair.
            kept += [onnx.helper.make_tensor_value_info(o, t.tensor_type.elem_type, None) for o, t in new.items()]
            del known.graph.value_info[:]
            known.graph.value_info.extend(kept)
        inferred = iter(list(known.graph.node))
        whole = [n if left_out else next(inferred) for n, left_out in nodes]
        del known.graph.node[:]
        known.graph.node.extend(whole)
        return known

    def _is_unknown(self, node: onnx.NodeProto) -> bool:
        return node.domain not in _ONNX_DOMAINS and _key(node) not in self._functions

    def _check_opset(self) -> None:
        int4 = any(tensor.data_type == onnx.TensorProto.INT4 for tensor in self._initializers.values())
        highest = self._support.int4_opset if int4 else self._support.opset
        if self._opset > highest:
            problem = f"It has opset {self._opset}; {self._parser} is documented up to {highest}."
            self._add(None, problem, "Export it with a lower opset.")

    def _check_edges(self, kind: str, values: Iterable[onnx.ValueInfoProto]) -> None:
        for value in values:
            dtype = dtype_name(value.type)
            if value.name not in self._initializers and dtype not in self._support.io:
                problem = self._wrong_type(f"{kind} {value.name!r}", dtype, self._support.io)
                self._add(None, problem, _HINTS.get(dtype, ""))

    def _check_nodes(self, graph: onnx.GraphProto, outside: Scope) -> None:
        for tensor in graph.initializer:
            if problem := external_data_problem(tensor, self._parser):
                self._add(None, problem)
        types, constants = {**outside.types, **_types(graph)}, {**outside.constants, **constants_of(graph)}
        scope = replace(outside, types=types, constants=constants)
        for node in graph.node:
            name = node.name or f"{node.op_type} -> {', '.join(node.output)}"
            self._check_node(Node(node, f"{scope.prefix}{name}", scope))
            for attribute in node.attribute:
                for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                    self._check_nodes(inner, scope)

    def _check_node(self, node: Node) -> None:
        if _key(node.proto) in self._plugins:
            self._check_plugin(node)
        elif _key(node.proto) in self._functions:
            self._check_call(node)
        elif node.proto.domain not in _ONNX_DOMAINS:
            self._add(node, f"It is of the domain {node.proto.domain!r}; no plugin or local function computes it.")
        elif node.proto.op_type not in self._support.operators:
            since = next((row.row for row in _rows() if node.proto.op_type in row.operators), None)
            hint = f"TensorRT {since} and later have it." if since else ""
            self._add(node, f"{node.proto.op_type} is nothing that {self._parser} knows.", hint)
        else:
            self._check_types(node)
            self._check_rules(node)

    def _check_plugin(self, node: Node) -> None:
        present = {a.name for a in node.proto.attribute if a.type == onnx.AttributeProto.STRING}
        for name in sorted(PLUGIN_ATTRIBUTES - present):
            self._add(node, f"A plugin computes it, and it has no string attribute {name!r}.")

    def _check_call(self, node: Node) -> None:
        """Check a local function's nodes with this call's types and attributes, functions inside too."""
        names, formals = node.proto.input, self._functions[_key(node.proto)].input
        if len(names) != len(formals):
            self._add(node, f"It passes {len(names)} inputs to a function of {len(formals)}; the parser wants all.")
            return
        if unknown := [name for name in names if name and not node.scope.dtype(name)]:
            self._add(node, self._wrong_type(f"input {unknown[0]!r}", "", frozenset()))
            return
        for formal, name in zip(formals, names, strict=True):
            if not self._support.functions_shadow and formal != name and formal in node.scope.types:
                problem = f"Its function's input {formal!r} has the name of another tensor, which {self._parser} takes."
                self._add(node, problem, "Rename the function's input.")
        body = self._infer(self._inline(node)).graph
        if any(_key(inner) == _key(node.proto) for inner in body.node):
            self._add(node, "onnx cannot inline its function, so that nothing in it was checked.")
            return
        constants = {name: node.scope.constants[name] for name in names if name in node.scope.constants}
        self._check_nodes(body, replace(node.scope, types={}, constants=constants, prefix=f"{node.label}: "))

    def _inline(self, node: Node) -> onnx.ModelProto:
        """Return a model of the call alone, the functions inside it inlined except plugins'."""
        inputs = [onnx.helper.make_value_info(i, node.scope.types[i]) for i in dict.fromkeys(node.proto.input) if i]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.proto.output if name]
        call = onnx.helper.make_model(
            onnx.helper.make_graph([node.proto], "call", inputs, outputs),
            functions=list(self._model.functions),
            opset_imports=list(self._model.opset_import),
            ir_version=self._model.ir_version,
        )
        return onnx.inliner.inline_selected_functions(call, sorted(self._plugins), exclude=True)

    def _check_types(self, node: Node) -> None:
        """Add a gap for the first input or output of a wrong type only: the others follow from it."""
        allowed = self._support.operators[node.proto.op_type]
        others = self._support.tensors | allowed
        if node.proto.op_type in QUANTIZING:
            others |= self._support.quantized
        values = list(operands(node.proto, self._opset))
        subject = self._support.subjects.get(node.proto.op_type, values[0][2])
        for kind, name, variable in values:
            dtype, takes = node.scope.dtype(name), allowed if variable == subject else others
            if dtype == "UINT8" and name not in self._edges:
                takes = takes - {dtype}
            if dtype not in takes:
                self._add(node, self._wrong_type(f"{kind} {name!r}", dtype, takes), _HINTS.get(dtype, ""))
                return

    def _check_rules(self, node: Node) -> None:
        op_type, support = node.proto.op_type, self._support
        problems = list(limit_problems(node, support.limits.get(op_type, {}), self._parser))
        if op_type in QUANTIZING:
            problems += quantization_problems(node, self._parser, support.int4_blocks)
        for problem in problems:
            self._add(node, problem)
        if mixed_types := mixed_type_problem(node, self._opset):
            self._add(node, mixed_types, "Cast one of them.")
        if gathered := gather_problem(node):
            self._add(node, gathered, "Use Slice and Squeeze.")

    def _wrong_type(self, operand: str, dtype: str, takes: frozenset[str]) -> str:
        if not dtype:
            return f"The type of its {operand} cannot be inferred."
        return f"Its {operand} is {dtype}; {self._parser} takes {', '.join(sorted(takes))} there."


def _key(node: onnx.NodeProto) -> _Key:
    return node.domain, node.op_type


def _types(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    """Collect types by name. Initializers need no data for it."""
    values = (*graph.value_info, *graph.output, *graph.input)
    known = {value.name: value.type for value in values if value.type.WhichOneof("value")}
    make = onnx.helper.make_tensor_type_proto
    return known | {tensor.name: make(tensor.data_type, list(tensor.dims)) for tensor in graph.initializer}
