"""A small IPluginV3 in the real registry, from creator to serialised fields; prints JSON. Runs inside an environment.

It repeats its input along the first axis. `python -m trt_bindings.toy_plugin DTYPE` sets the input's type.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import tensorrt as trt

from trt_bindings.expressions import Tensor, drive_v3, restore

INTERFACES = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)


class Stack(*INTERFACES):
    def __init__(self, times: int, label: str) -> None:
        for interface in INTERFACES:
            interface.__init__(self)
        self.times, self.label, self.num_outputs = times, label, 1
        self.plugin_name, self.plugin_namespace, self.plugin_version = "Stack", "toy", "1"
        data = [np.array([times], dtype=np.int32), label.encode()]
        types = [trt.PluginFieldType.INT32, trt.PluginFieldType.CHAR]
        fields = [trt.PluginField(*parts) for parts in zip(("times", "label"), data, types, strict=True)]
        self.kept = data, fields, trt.PluginFieldCollection(fields)

    def get_capability_interface(self, type: Any) -> Any:
        return self

    def get_output_data_types(self, input_types: list[Any]) -> list[Any]:
        return input_types

    def get_output_shapes(self, inputs: list[Any], shape_inputs: list[Any], expr_builder: Any) -> list[Any]:
        (shape,) = inputs
        product = expr_builder.operation(trt.DimensionOperation.PROD, shape[0], expr_builder.constant(self.times))
        return [trt.DimsExprs([product, *(shape[i] for i in range(1, len(shape)))])]

    def supports_format_combination(self, pos: int, in_out: list[Any], num_inputs: int) -> bool:
        return in_out[pos].desc.type == trt.float16

    def configure_plugin(self, inputs: list[Any], outputs: list[Any]) -> None:
        pass

    def get_workspace_size(self, inputs: list[Any], outputs: list[Any]) -> int:
        return 4 * outputs[0].max[0]

    def get_fields_to_serialize(self) -> Any:
        return self.kept[-1]


class StackCreator(trt.IPluginCreatorV3One):
    def __init__(self) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = "Stack", "toy", "1"
        empty = np.array([], dtype=np.int32)
        self.field_names = trt.PluginFieldCollection([trt.PluginField("times", empty, trt.PluginFieldType.INT32)])

    def create_plugin(self, name: str, fc: Any, phase: Any) -> Any:
        found = {field.name: field.data for field in fc}
        label = found["label"].tobytes().decode() if "label" in found else ""
        return Stack(int(found["times"][0]), label)


def main(dtype: str) -> None:
    registry = trt.get_plugin_registry()
    creator = StackCreator()
    registered = registry.register_creator(creator, "toy")
    found = registry.get_creator("Stack", "1", "toy")
    times = np.array([3], dtype=np.int32)
    field = trt.PluginField("times", times, trt.PluginFieldType.INT32)
    plugin = found.create_plugin("node", trt.PluginFieldCollection([field]), trt.TensorRTPhase.BUILD)
    driven = drive_v3(trt, plugin, [Tensor(dtype, (2, 5, 7), dynamic=(0,))])
    again = restore(trt, Stack(4, "a label of some length"), found)
    report = {"registered": registered, "same": found is creator, "names": [f.name for f in creator.field_names]}
    print(json.dumps(report | {"driven": asdict(driven), "restored": [again.times, again.label]}))


if __name__ == "__main__":
    main(sys.argv[1])
