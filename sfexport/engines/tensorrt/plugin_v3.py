"""Register the plugins in Python (TensorRT 10.0 and later): IPluginV3 classes that launch PTX by CUDA's driver API.

An engine's fields hold what its kernel was compiled for; the PTX itself lies beside the engine (kernels/store.py), so
that running needs no Triton. It is not a field, because with NumPy 2 the bindings before 10.16 give back only the first
element of a field rightly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from sfexport.dtypes import PRECISIONS
from sfexport.engines.tensorrt.plugin_operations import KernelSource, Operation, dtype_name
from sfexport.errors import SfexportError
from sfexport.graphs.plugin_nodes import PLUGIN_NAMESPACE, PLUGIN_VERSION, PluginSettings
from sfexport.kernels.compile import Kernel
from sfexport.kernels.launch_config import Integers

SETTINGS = tuple(field.name for field in fields(PluginSettings))
DTYPE = "dtype"  # place in PRECISIONS; only an engine's nodes have it

# TensorRT's registry keeps bare pointers.
_creators: dict[str, Any] = {}


def register(trt: Any, operation: Operation, source: KernelSource) -> None:
    """Register a creator for `operation`, in the place of an earlier one."""
    registry = trt.get_plugin_registry()
    earlier = _creators.pop(operation.name, None)
    if earlier is not None and registry.get_creator(operation.name, PLUGIN_VERSION, PLUGIN_NAMESPACE) is not None:
        registry.deregister_creator(earlier)
    creator = _creator_class(trt)(operation, source)
    if not registry.register_creator(creator, PLUGIN_NAMESPACE):
        raise SfexportError(f"TensorRT's registry refuses the plugin {operation.name}.")
    _creators[operation.name] = creator


@dataclass(frozen=True)
class ExpressionArithmetic:
    """Arithmetic on IDimensionExpr."""

    trt: Any
    builder: Any

    def symbol(self, value: Any) -> Any:
        return self.builder.constant(value) if isinstance(value, int) else value

    def _operation(self, name: str, a: Any, b: Any) -> Any:
        operation = getattr(self.trt.DimensionOperation, name)
        return self.builder.operation(operation, self.symbol(a), self.symbol(b))

    def cdiv(self, a: Any, b: Any) -> Any:
        return self._operation("CEIL_DIV", a, b)

    def floordiv(self, a: Any, b: Any) -> Any:
        return self._operation("FLOOR_DIV", a, b)

    def product(self, a: Any, b: Any) -> Any:
        return self._operation("PROD", a, b)

    def minimum(self, a: Any, b: Any) -> Any:
        return self._operation("MIN", a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        return self._operation("MAX", a, b)


def known_dimensions(shape: Any) -> list[int | None]:
    """Return the constants of a DimsExprs; None for a dynamic dimension."""
    dims = [shape[i] for i in range(len(shape))]
    return [d.get_constant_value() if d.is_constant() else None for d in dims]


class _Plugin:
    """One node: what IPluginV3 and its capabilities ask for. `kernel` is set when the types are known.

    A base without TensorRT's classes, which `_plugin_class` adds: this module is imported without TensorRT.
    """

    def __init__(
        self,
        trt: Any,
        operation: Operation,
        settings: PluginSettings,
        source: KernelSource,
        kernel: Kernel | None = None,
    ) -> None:
        self._trt = trt
        self.operation, self.settings, self.source, self.kernel = operation, settings, source, kernel
        self.num_outputs = operation.outputs
        self.plugin_name, self.plugin_namespace = operation.name, PLUGIN_NAMESPACE
        self.plugin_version = PLUGIN_VERSION
        self._function: Any = None

    def get_capability_interface(self, type: Any) -> Any:
        return self

    def clone(self) -> Any:
        return self.__class__(self._trt, self.operation, self.settings, self.source, self.kernel)

    def get_output_data_types(self, input_types: list[Any]) -> list[Any]:
        names = self.operation.types[len(self.operation.inputs) :]
        return [input_types[0] if name == "T" else getattr(self._trt.DataType, name) for name in names]

    def get_output_shapes(self, inputs: list[Any], shape_inputs: list[Any], exprBuilder: Any) -> list[Any]:
        self.operation.check_shapes([known_dimensions(shape) for shape in inputs], self.settings)
        arithmetic = ExpressionArithmetic(self._trt, exprBuilder)
        shapes = self.operation.output_shapes(arithmetic, inputs, self.settings)
        return [self._dims(arithmetic, shape) for shape in shapes]

    def _dims(self, arithmetic: ExpressionArithmetic, shape: tuple[Any, ...]) -> Any:
        dims = self._trt.DimsExprs(len(shape))
        for i, value in enumerate(shape):
            dims[i] = arithmetic.symbol(value)
        return dims

    def supports_format_combination(self, pos: int, in_out: list[Any], num_inputs: int) -> bool:
        types = [d.desc.type.name for d in in_out[: pos + 1]]
        is_linear: bool = in_out[pos].desc.format == self._trt.TensorFormat.LINEAR
        return is_linear and self.operation.accepts(pos, types)

    def configure_plugin(self, inp: list[Any], out: list[Any]) -> None:
        self.kernel = self.operation.kernel(self.source, dtype_name(inp[0].desc.type), self.settings)

    def on_shape_change(self, inp: list[Any], out: list[Any]) -> None:
        self.operation.check_shapes([list(desc.dims) for desc in inp], self.settings)

    def get_workspace_size(self, *arguments: Any) -> int:
        return 0

    def attach_to_context(self, resource_context: Any) -> Any:
        return self.clone()

    def set_tactic(self, tactic: int) -> None:
        pass

    def get_fields_to_serialize(self) -> Any:
        # TensorRT reads through pointers: fields and collection live as long as the plugin.
        self._fields = _fields(self._trt, self.settings, self.kernel)
        self._collection = self._trt.PluginFieldCollection(self._fields)
        return self._collection

    def enqueue(
        self,
        input_desc: list[Any],
        output_desc: list[Any],
        inputs: list[int],
        outputs: list[int],
        workspace: int,
        stream: int,
    ) -> int:
        kernel = self.kernel
        assert kernel is not None, "set by configure_plugin while building, and from the engine's fields while running"
        if self._function is None:
            from sfexport.engines.tensorrt.cuda import Function

            self._function = Function(kernel.ptx, kernel.name, kernel.threads, kernel.shared)
        shapes = [tuple(desc.dims) for desc in input_desc]
        launch = self.operation.launch(Integers(), shapes, kernel.dtype, self.settings)
        self._function.launch(launch.grid, inputs, launch.arguments, outputs, stream)
        return 0


def _plugin_class(trt: Any) -> type[_Plugin]:
    """Return the class of nodes that this TensorRT takes."""

    class CrossAttentionPlugin(
        _Plugin, trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime
    ):
        def __init__(self, *arguments: Any) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            _Plugin.__init__(self, *arguments)

    return CrossAttentionPlugin


def _fields(trt: Any, settings: PluginSettings, kernel: Kernel | None) -> list[Any]:
    values = asdict(settings)
    if kernel is not None:
        values[DTYPE] = PRECISIONS.index(kernel.dtype)
    return [trt.PluginField(k, np.array([v], dtype=np.int32), trt.PluginFieldType.INT32) for k, v in values.items()]


def _creator_class(trt: Any) -> type:
    plugin_class = _plugin_class(trt)

    class CrossAttentionCreator(trt.IPluginCreatorV3One):
        """Makes nodes from ONNX attributes (build) or from an engine's fields (run)."""

        def __init__(self, operation: Operation, source: KernelSource) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.operation, self.source = operation, source
            self.name, self.plugin_namespace, self.plugin_version = operation.name, PLUGIN_NAMESPACE, PLUGIN_VERSION
            empty = np.array([], dtype=np.int32)
            names = [trt.PluginField(name, empty, trt.PluginFieldType.INT32) for name in SETTINGS]
            self.field_names = trt.PluginFieldCollection(names)

        def create_plugin(self, name: str, fc: Any, phase: Any) -> Any:
            settings, dtype = _read_fields(fc, self.operation.name)
            kernel = self.operation.kernel(self.source, dtype, settings) if dtype else None
            return plugin_class(trt, self.operation, settings, self.source, kernel)

    return CrossAttentionCreator


def _read_fields(collection: Any, plugin: str) -> tuple[PluginSettings, str | None]:
    """Read the settings, and the type where an engine's fields are read."""
    values = {field.name: _integer(field.data) for field in collection if field.name in (*SETTINGS, DTYPE)}
    missing = [name for name in SETTINGS if name not in values]
    if missing:
        raise SfexportError(f"The node of {plugin} lacks the attribute {missing[0]}.", "Build the engines again.")
    dtype = PRECISIONS[values.pop(DTYPE)] if DTYPE in values else None
    return PluginSettings(**values), dtype


def _integer(data: Any) -> int:
    return int(np.asarray(data).reshape(-1)[0])
