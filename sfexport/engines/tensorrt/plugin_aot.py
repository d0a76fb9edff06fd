"""Register the ahead-of-time plugins (TensorRT 10.9 and later): quick plugins whose PTX is stored in the engine.

No `from __future__ import annotations` here: TensorRT reads the annotations of the described functions as objects.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

from sfexport.engines.tensorrt.plugin_operations import KernelSource, Operation, dtype_name
from sfexport.errors import SfexportError
from sfexport.graphs.plugin_nodes import PLUGIN_NAMESPACE, SPLIT, PluginSettings

if TYPE_CHECKING:
    # Annotations that TensorRT reads: classes of the installed version, known when `register` is called.
    tensor: TypeAlias = Any
    compiled: TypeAlias = Any


def register(trt: Any, operation: Operation, source: KernelSource) -> None:
    """Register `operation` as a quick plugin with only an ahead-of-time implementation."""
    try:
        import tensorrt.plugin as quick
    except ImportError as error:
        raise SfexportError(f"TensorRT {trt.__version__} has no quick plugins ({error}).") from None
    describe, implement = (
        _split(trt, quick, operation, source) if operation.name == SPLIT else _combine(trt, quick, operation, source)
    )
    identity = f"{PLUGIN_NAMESPACE}::{operation.name}"
    quick.register(identity)(describe)
    quick.aot_impl(identity)(implement)


def _split(trt: Any, quick: Any, operation: Operation, source: KernelSource) -> tuple[Any, Any]:
    if not TYPE_CHECKING:
        tensor, compiled = quick.TensorDesc, _compiled(quick)

    def describe(
        query: tensor,
        key: tensor,
        value: tensor,
        attends: tensor,
        lengths: tensor,
        sm: int,
        ptx_isa: int,
        multiprocessors: int,
        head_dim: int,
    ) -> tuple[tensor, tensor]:
        settings = PluginSettings(sm, ptx_isa, multiprocessors, head_dim)
        return _describe(trt, quick, operation, (query, key, value, attends, lengths), settings)

    def implement(
        query: tensor,
        key: tensor,
        value: tensor,
        attends: tensor,
        lengths: tensor,
        sm: int,
        ptx_isa: int,
        multiprocessors: int,
        head_dim: int,
        outputs: tuple[tensor],
        tactic: int,
    ) -> compiled:
        settings = PluginSettings(sm, ptx_isa, multiprocessors, head_dim)
        return _implement(quick, operation, source, (query, key, value, attends, lengths), settings)

    return describe, implement


def _combine(trt: Any, quick: Any, operation: Operation, source: KernelSource) -> tuple[Any, Any]:
    if not TYPE_CHECKING:
        tensor, compiled = quick.TensorDesc, _compiled(quick)

    def describe(
        query: tensor,
        partial: tensor,
        logsumexp: tensor,
        attends: tensor,
        sm: int,
        ptx_isa: int,
        multiprocessors: int,
        head_dim: int,
    ) -> tensor:
        settings = PluginSettings(sm, ptx_isa, multiprocessors, head_dim)
        (output,) = _describe(trt, quick, operation, (query, partial, logsumexp, attends), settings)
        return output

    def implement(
        query: tensor,
        partial: tensor,
        logsumexp: tensor,
        attends: tensor,
        sm: int,
        ptx_isa: int,
        multiprocessors: int,
        head_dim: int,
        outputs: tuple[tensor],
        tactic: int,
    ) -> compiled:
        settings = PluginSettings(sm, ptx_isa, multiprocessors, head_dim)
        return _implement(quick, operation, source, (query, partial, logsumexp, attends), settings)

    return describe, implement


def _compiled(quick: Any) -> Any:
    """Return the annotation that TensorRT asks for of an implementation's result."""
    return tuple[str | bytes, str | bytes, quick.KernelLaunchParams, quick.SymIntExprs]


class _SymbolicArithmetic:
    """Arithmetic on tensorrt.plugin's ShapeExpr."""

    def __init__(self, quick: Any) -> None:
        self._quick = quick

    def _symbol(self, value: Any) -> Any:
        return self._quick.ShapeExpr(value) if isinstance(value, int) else value

    def cdiv(self, a: Any, b: Any) -> Any:
        return self._quick.cdiv(self._symbol(a), b)

    def floordiv(self, a: Any, b: Any) -> Any:
        return self._symbol(a) // b

    def product(self, a: Any, b: Any) -> Any:
        return self._symbol(a) * b

    def minimum(self, a: Any, b: Any) -> Any:
        return self._quick.min(self._symbol(a), b)

    def maximum(self, a: Any, b: Any) -> Any:
        return self._quick.max(self._symbol(a), b)


def _describe(
    trt: Any, quick: Any, operation: Operation, inputs: tuple[Any, ...], settings: PluginSettings
) -> tuple[Any, ...]:
    """Return the tensor descriptions of the outputs."""
    shapes = [desc.shape_expr for desc in inputs]
    operation.check_shapes([_known(shape) for shape in shapes], settings)
    outputs = operation.output_shapes(_SymbolicArithmetic(quick), shapes, settings)
    names = operation.types[len(operation.inputs) :]
    types = [inputs[0].dtype if name == "T" else getattr(trt.DataType, name) for name in names]
    return tuple(quick.from_shape_expr(tuple(s), t) for s, t in zip(outputs, types, strict=True))


def _known(shape: Any) -> list[int | None]:
    """Return the constant dimensions; None for a dynamic one and for the placeholders that TensorRT gives at first."""
    return [d.constant_value() if not d.is_fake and d.is_constant else None for d in shape]


def _implement(
    quick: Any, operation: Operation, source: KernelSource, inputs: tuple[Any, ...], settings: PluginSettings
) -> tuple[Any, Any, Any, Any]:
    """Return entry point, PTX, launch parameters and extra arguments."""
    dtype = dtype_name(inputs[0].dtype)
    kernel = operation.kernel(source, dtype, settings)
    launch = operation.launch(_SymbolicArithmetic(quick), [d.shape_expr for d in inputs], dtype, settings)
    parameters = quick.KernelLaunchParams()
    parameters.grid_x, parameters.grid_y, parameters.grid_z = launch.grid
    parameters.block_x, parameters.shared_mem = kernel.threads, kernel.shared
    arguments = quick.SymIntExprs(len(launch.arguments))
    for i, argument in enumerate(launch.arguments):
        arguments[i] = quick.SymInt32(argument)
    return kernel.name, kernel.ptx, parameters, arguments
