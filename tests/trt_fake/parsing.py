"""The stand-in for TensorRT's ONNX parser: reads the file for real, without its external weights. See guard.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .guard import Field

# ONNX element type to trt.DataType, by name.
TYPES = {
    "FLOAT": "FLOAT",
    "FLOAT16": "HALF",
    "BFLOAT16": "BF16",
    "INT8": "INT8",
    "UINT8": "UINT8",
    "INT32": "INT32",
    "INT64": "INT64",
    "BOOL": "BOOL",
    "INT4": "INT4",
    "FLOAT8E4M3FN": "FP8",
}
PLUGIN_NOT_FOUND = "Plugin not found, are the plugin name, version, and namespace correct?"


class ParserError:
    def _begin(self, **about: Any) -> None:
        self._about = {"node": -1, "node_name": "", "node_operator": "", "func": "importModel"} | about

    def code(self) -> Any:
        return self._about["code"]

    def desc(self) -> str:
        return self._about["desc"]

    def node(self) -> int:
        return self._about["node"]

    def node_name(self) -> str:
        return self._about["node_name"]

    def node_operator(self) -> str:
        return self._about["node_operator"]

    def func(self) -> str:
        return self._about["func"]

    def file(self) -> str:
        return "ModelImporter.cpp"

    def line(self) -> int:
        return 0

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0

    def __str__(self) -> str:
        about = self._about
        return f"In node {about['node']} with name: {about['node_name']}: {about['code'].name}: {about['desc']}"


class Parser:
    """Errors are collected as TensorRT collects them: all nodes are looked at before it gives up."""

    flags = Field(0)

    def _begin(self, network: Any, logger: Any) -> None:
        self._network = network
        self._errors: list[Any] = []
        self._loaded: tuple[Any, str | None] | None = None
        self._given: dict[str, int] = {}
        self._subgraphs: list[tuple[list[int], bool]] = []

    def set_flag(self, flag: Any) -> None:
        self._fields["flags"] = self.flags | 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self._fields["flags"] = self.flags & ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags & 1 << int(flag))

    def set_builder_config(self, builder_config: Any) -> bool:
        return builder_config is not None

    def parse_from_file(self, model: str) -> bool:
        if not Path(model).is_file():
            return self._fail("INVALID_VALUE", f"Input file cannot be found, or is not a regular file: {model}")
        return self._import(Path(model).read_bytes(), model)

    def parse(self, model: Any, path: str | None = None) -> bool:
        return self._import(bytes(model), path)

    def load_model_proto(self, model: Any, path: str | None = None) -> bool:
        read = self._read(bytes(model))
        self._loaded = None if read is None else (read, path)
        return read is not None

    def load_initializer(self, name: str, data: int, size: int) -> bool:
        """False for a name that the model does not have, or a size that is not its."""
        initializers = {} if self._loaded is None else {i.name: i for i in self._loaded[0].graph.initializer}
        if name not in initializers or (not data and size) or byte_size(initializers[name]) != size:
            self._trt._error(f"initializer {name} of {size} bytes is not in the model")
            return False
        self._given[name] = data
        return True

    def parse_model_proto(self) -> bool:
        if self._loaded is None:
            self._trt._error("An ONNX model has not been loaded yet - cannot parse empty model.")
            return False
        return self._fill(*self._loaded)

    def supports_operator(self, op_name: str) -> bool:
        return self._trt._knows_operator(op_name, "")

    def supports_model_v2(self, model: Any, path: str | None = None) -> bool:
        read = self._read(bytes(model))
        if read is None:
            return False
        supported = [self._refusal(node, read) == "" for node in read.graph.node]
        self._subgraphs = []
        for index, good in enumerate(supported):
            if not self._subgraphs or self._subgraphs[-1][1] != good:
                self._subgraphs.append(([], good))
            self._subgraphs[-1][0].append(index)
        return all(supported)

    @property
    def num_subgraphs(self) -> int:
        return len(self._subgraphs)

    def is_subgraph_supported(self, index: int) -> bool:
        return self._subgraphs[index][1]

    def get_subgraph_nodes(self, index: int) -> list[int]:
        return self._subgraphs[index][0]

    def get_used_vc_plugin_libraries(self) -> list[str]:
        return []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def _fail(self, code: str, desc: str, **about: Any) -> bool:
        self._errors.append(self._trt._make("ParserError", code=self._trt.ErrorCode[code], desc=desc, **about))
        self._trt._error(desc)
        return False

    def _read(self, data: bytes) -> Any:
        import onnx

        try:
            read = onnx.load_model_from_string(data)
        except Exception:  # protobuf's own, by another name in each of its versions
            read = None
        if read is None or not read.graph.output:
            self._fail("MODEL_DESERIALIZE_FAILED", "Failed to parse the ONNX model.")
            return None
        return read

    def _import(self, data: bytes, path: str | None) -> bool:
        if self._network.num_layers:
            self._trt._error("Parse was called with a non-empty network definition")
            return False
        read = self._read(data)
        return read is not None and self._fill(read, path)

    def _fill(self, model: Any, path: str | None) -> bool:
        for index, node in enumerate(model.graph.node):
            if refusal := self._refusal(node, model):
                about = {"node": index, "node_name": node.name, "node_operator": node.op_type}
                self._fail("UNSUPPORTED_NODE", refusal, **about)
        self._check_weights(model, Path(path).parent if path else Path())
        if self._errors:
            return False
        network, graph = self._network, model.graph
        stored = {i.name for i in graph.initializer}
        network._inputs = [self._tensor(v, True) for v in graph.input if v.name not in stored]
        network._outputs = [self._tensor(v, False) for v in graph.output]
        network._model, network._source = model, path
        return True

    def _check_weights(self, model: Any, folder: Path) -> None:
        """External data that the caller has not handed over must lie beside the model, whole."""
        for tensor in model.graph.initializer:
            if tensor.name in self._given or not tensor.external_data:
                continue
            where = {entry.key: entry.value for entry in tensor.external_data}
            file = folder / where["location"]
            end = int(where.get("offset", 0)) + int(where.get("length", byte_size(tensor)))
            if not file.is_file() or file.stat().st_size < end:
                self._fail(
                    "INVALID_GRAPH", f"Failed to read external weights of {tensor.name} from {where['location']}"
                )

    def _tensor(self, value: Any, is_input: bool) -> Any:
        import onnx

        described = value.type.tensor_type
        dtype = TYPES[onnx.TensorProto.DataType.Name(described.elem_type)]
        sizes = [d.dim_value if d.HasField("dim_value") else -1 for d in described.shape.dim]
        names = [d.dim_param for d in described.shape.dim]
        return self._trt._make("ITensor", value.name, self._trt.DataType[dtype], sizes, names, is_input)

    def _refusal(self, node: Any, model: Any) -> str:
        """Why a node cannot be imported, or ''; Recorder.chosen notes whether a plugin or a function body plays it."""
        functions = {f.name: f for f in model.functions}
        attributes = {a.name: a.s.decode() for a in node.attribute if a.name.startswith("plugin_")}
        plugin = self._plugin(node.op_type, attributes)
        function = functions.get(node.op_type)
        if plugin and (function is None or self._plugin_wins(attributes)):
            self._trt.chosen[node.op_type] = "plugin"
            return ""
        if function is not None:
            self._trt.chosen[node.op_type] = "function"
            return next((text for inner in function.node if (text := self._refusal(inner, model))), "")
        return "" if self._trt._knows_operator(node.op_type, node.domain) else PLUGIN_NOT_FOUND

    def _plugin(self, op_type: str, attributes: dict[str, str]) -> bool:
        version, namespace = attributes.get("plugin_version", "1"), attributes.get("plugin_namespace", "")
        return (op_type, version, namespace) in self._trt._registry._creators

    def _plugin_wins(self, attributes: dict[str, str]) -> bool:
        """Over a function of the same name: never up to 10.6, always up to 10.14, then only if the node asks."""
        version = self._trt._numbers
        if version < (10, 7):
            return False
        override = getattr(self._trt.OnnxParserFlag, "ENABLE_PLUGIN_OVERRIDE", None)
        asked = "plugin_namespace" in attributes or (override is not None and self.get_flag(override))
        return version < (10, 15) or asked


def byte_size(tensor: Any) -> int:
    import math

    import onnx

    # onnx 1.16 has NumPy types of other sizes stand for these.
    own = {"BFLOAT16": 16, "INT4": 4, "UINT4": 4}
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    bits = own.get(name) or onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    return math.ceil(math.prod(tensor.dims) * bits / 8)
