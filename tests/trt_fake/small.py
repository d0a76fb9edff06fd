"""A graph of one node and the steps of its build, for tests of the recorder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

RANGE = ((1, 4), (2, 4), (8, 4))
WEIGHTS = np.arange(4, dtype=np.float32)


def write_sum(folder: Path) -> Path:
    """x [n, 4] -> y = x + w, whose weights lie in another file."""
    (folder / "weights.bin").write_bytes(WEIGHTS.tobytes())
    weights = TensorProto(name="w", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "weights.bin", "offset": "0", "length": "16"}.items():
        weights.external_data.add(key=key, value=value)
    return write_graph(folder / "sum.onnx", [helper.make_node("Add", ["x", "w"], ["y"], name="add")], [weights])


def write_graph(
    file: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[onnx.TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> Path:
    """From x [n, 4] to y [n, 4], float32."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], list(weights))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=9)
    file.write_bytes(model.SerializeToString())
    return file


class Build:
    """The steps of a build, each where a test can go another way."""

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.logger = trt.Logger(trt.Logger.WARNING)
        self.builder = trt.Builder(self.logger)
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.config = self.builder.create_builder_config()

    def add_profile(self, least: Any, typical: Any, most: Any, name: str = "x") -> int:
        profile = self.builder.create_optimization_profile()
        profile.set_shape(name, least, typical, most)
        return self.config.add_optimization_profile(profile)

    def run(self) -> Any:
        return self.builder.build_serialized_network(self.network, self.config)

    def plan(self, graph: Path) -> Any:
        assert self.parser.parse_from_file(str(graph))
        assert self.add_profile(*RANGE) == 0
        return self.run()

    def engine(self, plan: Any) -> Any:
        return self.trt.Runtime(self.logger).deserialize_cuda_engine(plan)
