"""A builder's calls on a plugin, without a builder: runs inside an environment with the bindings (venvs.py).

`Expressions` makes real trt.IExprBuilder, trt.IDimensionExpr and trt.DimsExprs objects: the objects behind them come
from expressions.cpp. A dynamic dimension behaves like one (`is_constant()` is false), and the test sees afterwards what
its expression comes to. `drive_v3` and `drive_quick` call a plugin in the order the builder does, `restore` as a
runtime does.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

OPERATIONS = (
    "SUM",
    "PROD",
    "MAX",
    "MIN",
    "SUB",
    "EQUAL",
    "LESS",
    "FLOOR_DIV",
    "CEIL_DIV",
)  # as expressions.cpp has them
POINTER = ctypes.sizeof(ctypes.c_void_p)
LAUNCH = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")


@dataclass(frozen=True)
class Tensor:
    """A plugin's input: type by name ('HALF'), sizes, and which axes are dynamic."""

    dtype: str
    shape: tuple[int, ...]
    dynamic: tuple[int, ...] = ()


@dataclass
class Driven:
    """What a plugin answered. `launch` and `extra` only for an ahead-of-time plugin; `constant` says for each
    output dimension whether the builder would know it at build time."""

    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    constant: list[list[bool]] = field(default_factory=list)
    workspace: int = 0
    launch: dict[str, int] = field(default_factory=dict)
    extra: list[int] = field(default_factory=list)
    kernel: str = ""
    code: str = ""


class Expressions:
    """Raises RuntimeError if this TensorRT numbers its operations otherwise than expressions.cpp."""

    def __init__(self, trt: Any) -> None:
        self._trt = trt
        if [int(getattr(trt.DimensionOperation, name)) for name in OPERATIONS] != list(range(len(OPERATIONS))):
            raise RuntimeError(f"the operations of TensorRT {trt.__version__} are not those of expressions.cpp")
        self._library = ctypes.CDLL(os.environ["SFEXPORT_EXPRESSIONS"])
        self.builder = self._builder("builder_calls")
        self._dynamic = self._builder("dynamic_calls")

    def _builder(self, calls: str) -> Any:
        """An IExprBuilder whose calls go to ours: its second word says where (its first is the class's own)."""
        function = getattr(self._library, calls)
        function.restype = ctypes.c_void_p
        made = self._trt.IExprBuilder()
        address = ctypes.c_void_p.from_address(id(made) + object.__basicsize__).value
        ctypes.c_void_p.from_address(address + POINTER).value = function()
        return made

    def dims(self, tensor: Tensor) -> Any:
        """trt.DimsExprs of a shape."""
        sizes = enumerate(tensor.shape)
        return self._trt.DimsExprs(
            [(self._dynamic if axis in tensor.dynamic else self.builder).constant(size) for axis, size in sizes]
        )

    def value(self, expression: Any) -> int:
        """What an expression comes to, dynamic or not."""
        self._library.reveal(1)
        try:
            return expression.get_constant_value()
        finally:
            self._library.reveal(0)

    def answer(self, driven: Driven, shapes: list[Any]) -> None:
        for dims in shapes:
            if not isinstance(dims, self._trt.DimsExprs):
                raise TypeError(f"an output's shape must be trt.DimsExprs, not {type(dims).__name__}")
            driven.shapes.append([self.value(dims[i]) for i in range(len(dims))])
            driven.constant.append([dims[i].is_constant() for i in range(len(dims))])


def described(trt: Any, tensor: Tensor) -> Any:
    """trt.DynamicPluginTensorDesc: -1 for a dynamic axis, the given size as minimum, optimum and maximum."""
    made = trt.DynamicPluginTensorDesc()
    desc = trt.PluginTensorDesc()
    desc.dims = trt.Dims([-1 if axis in tensor.dynamic else size for axis, size in enumerate(tensor.shape)])
    desc.type, desc.format = getattr(trt.DataType, tensor.dtype), trt.TensorFormat.LINEAR
    made.desc = desc
    made.min = made.opt = made.max = trt.Dims(list(tensor.shape))
    return made


def outputs_of(driven: Driven) -> list[Tensor]:
    dynamic = [tuple(i for i, known in enumerate(row) if not known) for row in driven.constant]
    return [Tensor(*parts) for parts in zip(driven.dtypes, map(tuple, driven.shapes), dynamic, strict=True)]


def drive_v3(trt: Any, plugin: Any, inputs: list[Tensor]) -> Driven:
    """Types, shapes, formats, configuration and workspace of a trt.IPluginV3.

    Raises:
        TypeError: an answer is not of the type that TensorRT takes.
        ValueError: the plugin refuses these inputs, or its own outputs, in linear format.
    """
    keep_forever(plugin)
    expressions, driven = Expressions(trt), Driven()
    build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    for kind in (trt.PluginCapabilityType.CORE, trt.PluginCapabilityType.RUNTIME):
        if plugin.get_capability_interface(kind) is None:
            raise TypeError(f"the plugin has no interface {kind}")
    dtypes = build.get_output_data_types([getattr(trt.DataType, t.dtype) for t in inputs])
    driven.dtypes = [_type_name(trt, dtype) for dtype in dtypes]
    dims = [expressions.dims(t) for t in inputs]
    expressions.answer(driven, build.get_output_shapes(dims, [], expressions.builder))
    if not build.num_outputs == len(driven.dtypes) == len(driven.shapes):
        raise TypeError(f"{build.num_outputs} outputs, {len(driven.dtypes)} types, {len(driven.shapes)} shapes")
    ins, outs = ([described(trt, t) for t in side] for side in (inputs, outputs_of(driven)))
    for position in range(len(ins) + len(outs)):
        if not build.supports_format_combination(position, [*ins, *outs], len(ins)):
            raise ValueError(f"the plugin does not support tensor {position} of {[*inputs, *outputs_of(driven)]}")
    build.configure_plugin(ins, outs)
    driven.workspace = build.get_workspace_size(ins, outs)
    return driven


def restore(trt: Any, plugin: Any, creator: Any) -> Any:
    """The plugin that an engine's fields bring back, as a runtime does it.

    Raises:
        TypeError: the plugin does not keep the collection it returns: TensorRT keeps only a pointer into it.
    """
    keep_forever(plugin)
    collection, nobody_else_has = plugin.get_fields_to_serialize(), object()
    if sys.getrefcount(collection) <= sys.getrefcount(nobody_else_has):
        raise TypeError("get_fields_to_serialize must return a collection that the plugin keeps, data included")
    scribble()
    restored = creator.create_plugin(plugin.plugin_name, collection, trt.TensorRTPhase.RUNTIME)
    keep_forever(restored)
    return restored


def keep_forever(plugin: Any) -> None:
    """TensorRT owns the plugins it asks for. One that Python frees instead is freed twice by the bindings of 10.3."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(plugin))


def scribble() -> None:
    """Use freed memory again, so that what points there reads something else: Python's small objects, and malloc's."""
    gc.collect()
    library = ctypes.CDLL(None)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    sizes = [size for size in range(8, 400, 8) for _ in range(50)]
    objects = [bytes([65 + size % 26]) * size for size in sizes]
    blocks = [library.malloc(size) for size in sizes]
    for block, size in zip(blocks, sizes, strict=True):
        ctypes.memset(block, 0x5A, size)
    for block in blocks:
        library.free(block)
    del objects


def _type_name(trt: Any, dtype: Any) -> str:
    if not isinstance(dtype, trt.DataType):
        raise TypeError(f"an output's type must be trt.DataType, not {type(dtype).__name__}")
    return dtype.name


def drive_quick(trt: Any, plugin_id: str, inputs: list[Tensor], fields: list[Any] | None = None) -> Driven:
    """An ahead-of-time plugin that `tensorrt.plugin` registered, from its creator in the registry to its kernel.

    Args:
        fields: trt.PluginField objects, as the parser makes them of a node's attributes.
    """
    expressions, driven = Expressions(trt), Driven()
    plugin = _create_quick(trt, plugin_id, fields or [])
    dtypes = plugin.get_output_data_types(
        [getattr(trt.DataType, t.dtype) for t in inputs], [len(t.shape) for t in inputs]
    )
    driven.dtypes = [_type_name(trt, dtype) for dtype in dtypes]
    dims = [expressions.dims(t) for t in inputs]
    expressions.answer(driven, plugin.get_output_shapes(dims, [], expressions.builder))
    ins, outs = ([described(trt, t) for t in side] for side in (inputs, outputs_of(driven)))
    plugin.get_supported_format_combinations([*ins, *outs], len(ins))
    plugin.configure_plugin(ins, outs)
    plugin.set_tactic((plugin.get_valid_tactics() or [0])[0])
    _launch(expressions, plugin, driven, dims, ins, outs)
    kernel, code = plugin.get_kernel([d.desc for d in ins], [d.desc for d in outs])
    driven.kernel, driven.code = _text(kernel), _text(code)
    return driven


def _create_quick(trt: Any, plugin_id: str, fields: list[Any]) -> Any:
    namespace, name = plugin_id.split("::")
    creator = trt.get_plugin_registry().get_creator(name, "1", namespace)
    collection = trt.PluginFieldCollection(fields)
    wanted = trt.QuickPluginCreationRequest.STRICT_AOT
    return creator.create_plugin(name, namespace, collection, trt.TensorRTPhase.BUILD, wanted)


def _launch(expressions: Expressions, plugin: Any, driven: Driven, dims: Any, ins: list[Any], outs: list[Any]) -> None:
    """The expressions are read where the plugin returns them: what TensorRT makes of them can only be written."""
    kept: list[Any] = []
    implementation = plugin.aot_impl_function

    def listening(*arguments: Any) -> Any:
        kept[:] = implementation(*arguments)
        return tuple(kept)

    plugin.aot_impl_function = listening
    parameters, holder = SimpleNamespace(), _Holder()
    plugin.get_launch_params(dims, [*ins, *outs], len(ins), parameters, holder, expressions.builder)
    driven.launch = {name: expressions.value(getattr(kept[2], name)._expr) for name in LAUNCH}
    if sorted(vars(parameters)) != sorted(LAUNCH):
        raise TypeError(f"launch parameters given: {sorted(vars(parameters))}")
    driven.extra = [expressions.value(expression._expr) for expression in kept[3]]
    if sorted(holder.items) != list(range(holder.nbSymExprs)):
        raise TypeError(f"{holder.nbSymExprs} extra arguments announced, {sorted(holder.items)} given")


class _Holder:
    """Stands for trt.ISymExprs, which only TensorRT can make."""

    def __init__(self) -> None:
        self.nbSymExprs = 0
        self.items: dict[int, Any] = {}

    def __setitem__(self, index: int, value: Any) -> None:
        self.items[index] = value


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
