"""Register the TensorRT plugins CrossAttentionSplit and CrossAttentionCombine, of the kind that this TensorRT takes.

Both kinds launch the same PTX:

    ahead    ahead of time (AOT): a quick plugin whose PTX is stored in the engine; running it needs nothing of sfexport
    python   an IPluginV3 in Python that launches the PTX itself; its class must be registered to run

What the plugins take is in plugin_operations.py; the kinds are plugin_aot.py and plugin_v3.py.
"""

from __future__ import annotations

from typing import Any

from sfexport.engines.tensorrt.plugin_operations import OPERATIONS, KernelSource
from sfexport.errors import SfexportError
from sfexport.graphs.plugin_nodes import PLUGIN_NAMESPACE, PLUGIN_VERSION
from sfexport.kernels.compile import compile_kernels
from sfexport.versions import NEW_NUMPY, aot_needs_old_numpy, has_aot_plugins, is_older


def choose_plugin(tensorrt_version: str, numpy_version: str) -> str:
    """Return the kind: 'ahead' where this TensorRT has it and its Python part works with this NumPy, else 'python'."""
    new_numpy = not is_older(numpy_version, NEW_NUMPY)
    if not has_aot_plugins(tensorrt_version) or (new_numpy and aot_needs_old_numpy(tensorrt_version)):
        return "python"
    return "ahead"


def register_plugins(trt: Any, kind: str, source: KernelSource = compile_kernels) -> None:
    """Register both plugins in TensorRT's registry. Quick plugins stay as they are if they are registered already.

    Args:
        trt: the tensorrt module.
        source: makes the kernels; compiles them with Triton by default.

    Raises:
        SfexportError: the registry refuses.
    """
    registry = trt.get_plugin_registry()
    if registry is None:
        raise SfexportError("TensorRT has no plugin registry.", "Its libraries are incomplete; install them again.")
    for operation in OPERATIONS:
        if kind == "python":
            from sfexport.engines.tensorrt.plugin_v3 import register

            register(trt, operation, source)
        elif registry.get_creator(operation.name, PLUGIN_VERSION, PLUGIN_NAMESPACE) is None:
            from sfexport.engines.tensorrt.plugin_aot import register

            register(trt, operation, source)
