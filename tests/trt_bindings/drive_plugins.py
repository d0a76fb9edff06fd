"""sfexport's own plugins in the real registry, of one kind; prints JSON. Runs inside an environment.

`python -m trt_bindings.drive_plugins DOOR DTYPE SETTINGS SHAPES`: the fields of PluginSettings, and for each operation
its inputs' shapes, as JSON. The kernels are texts that name what they were asked for; nothing is compiled.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import tensorrt as trt

from sfexport.engines.tensorrt.plugin import register_plugins
from sfexport.engines.tensorrt.plugin_operations import OPERATIONS, Operation
from sfexport.graphs.plugin_nodes import PLUGIN_NAMESPACE, PLUGIN_VERSION, PluginSettings
from sfexport.kernels.compile import Kernel
from trt_bindings.expressions import Driven, Tensor, drive_quick, drive_v3, restore


def kernels(dtype: str, head_dim: int, sm: int, ptx_isa: int) -> tuple[Kernel, Kernel]:
    text = f"// {dtype} {head_dim} {sm} {ptx_isa}"
    return Kernel("split", text, 128, 1024, sm, dtype, head_dim), Kernel("combine", text, 64, 0, sm, dtype, head_dim)


def inputs_of(operation: Operation, dtype: str, shapes: list[list[int]]) -> list[Tensor]:
    """Every axis dynamic but heads (axis 1) and elements (axis 3) of a tensor of four."""
    types = [dtype if name == "T" else name for name in operation.types]
    dynamic = [(0, 2) if len(shape) == 4 else tuple(range(len(shape))) for shape in shapes]
    return [Tensor(t, tuple(s), d) for t, s, d in zip(types, shapes, dynamic, strict=False)]


def fields(settings: PluginSettings, dtype: Any, kind: Any) -> list[Any]:
    return [trt.PluginField(name, np.array([v], dtype=dtype), kind) for name, v in asdict(settings).items()]


def drive_python(operation: Operation, settings: PluginSettings, inputs: list[Tensor]) -> tuple[Driven, bool]:
    creator = trt.get_plugin_registry().get_creator(operation.name, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    given = fields(settings, np.int32, trt.PluginFieldType.INT32)
    plugin = creator.create_plugin("node", trt.PluginFieldCollection(given), trt.TensorRTPhase.BUILD)
    driven = drive_v3(trt, plugin, inputs)
    again = restore(trt, plugin, creator)
    return driven, (again.settings, again.kernel) == (plugin.settings, plugin.kernel)


def main(kind: str, dtype: str, settings: PluginSettings, shapes: dict[str, list[list[int]]]) -> None:
    register_plugins(trt, kind, kernels)
    report = {}
    for operation in OPERATIONS:
        inputs = inputs_of(operation, dtype, shapes[operation.name])
        if kind == "python":
            driven, restored = drive_python(operation, settings, inputs)
            report[operation.name] = asdict(driven) | {"restored": restored}
        else:
            given = fields(settings, np.int64, trt.PluginFieldType.INT64)
            report[operation.name] = asdict(drive_quick(trt, f"{PLUGIN_NAMESPACE}::{operation.name}", inputs, given))
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], PluginSettings(**json.loads(sys.argv[3])), json.loads(sys.argv[4]))
