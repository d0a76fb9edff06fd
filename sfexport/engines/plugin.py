"""The TensorRT plugins CrossAttentionSplit and CrossAttentionCombine: which door they come through.

Two doors lead into TensorRT and both launch the same PTX:

    ahead of time   a quick plugin whose PTX is stored in the engine; nothing of sfexport is needed to run it
    python          an IPluginV3 in Python that launches the PTX itself; its class must be registered to run

What the plugins take is in plugin_operations.py; the doors are plugin_ahead.py and plugin_python.py. Imports neither
tensorrt nor triton.
"""

from __future__ import annotations

from typing import Any

from sfexport.engines.plugin_operations import OPERATIONS, KernelSource
from sfexport.errors import SfexportError
from sfexport.graphs.plugin_nodes import PLUGIN_NAMESPACE, PLUGIN_VERSION
from sfexport.kernels.compile import compile_kernels

FIRST_AHEAD = (10, 9)
# Quick plugins of TensorRT up to this version use NumPy functions that 2.4 has removed.
LAST_WITH_OLD_NUMPY, FIRST_NEW_NUMPY = (10, 16), (2, 4)


def choose_door(tensorrt_version: str, numpy_version: str) -> str:
    """'ahead' where this TensorRT has it and its Python part works with this NumPy, else 'python'."""
    version = _numbers(tensorrt_version)
    if version < FIRST_AHEAD:
        return "python"
    if version <= LAST_WITH_OLD_NUMPY and _numbers(numpy_version) >= FIRST_NEW_NUMPY:
        return "python"
    return "ahead"


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def register_plugins(trt: Any, door: str, source: KernelSource = compile_kernels) -> None:
    """Register both plugins in TensorRT's registry. Quick plugins stay as they are if they are registered already.

    Args:
        trt: the tensorrt module. source: makes the kernels; compiles them with Triton by default.

    Raises:
        SfexportError: the registry refuses.
    """
    registry = trt.get_plugin_registry()
    if registry is None:
        raise SfexportError("TensorRT has no plugin registry.", "Its libraries are incomplete; install them again.")
    for operation in OPERATIONS:
        if door == "python":
            from sfexport.engines.plugin_python import register

            register(trt, operation, source)
        elif registry.get_creator(operation.name, PLUGIN_VERSION, PLUGIN_NAMESPACE) is None:
            from sfexport.engines.plugin_ahead import register

            register(trt, operation, source)
