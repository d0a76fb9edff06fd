"""A machine with a GPU, played on host memory: a recorder for TensorRT, a driver, and what the plugins compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from trt_fake.execution import HostExecution
from trt_fake.host_cuda import HostDriver
from trt_fake.recorder import Recorder

from sfexport.artifacts.bundle import Bundle
from sfexport.graphs.cross_attention import DOMAIN, cross_attention_function
from sfexport.graphs.plugin_nodes import COMBINE, SPLIT
from sfexport.machines.machine import Cuda, Gpu, Machine, detect_machine

VERSIONS = ("10.3", "10.16", "11.4")
ORIN = Gpu("Orin", 87, 16, 64.0)
ATTRIBUTES = ["sm", "ptx_isa", "multiprocessors", "head_dim", "plugin_namespace", "plugin_version"]


def plugin_bodies() -> list[onnx.FunctionProto]:
    """The plugins' mathematics for ONNX Runtime: the first computes the whole context, the second passes it on."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    inputs = ["query", "key", "value", "attends", "lengths"]
    mask = helper.make_node("Cast", ["attends"], ["mask"], to=TensorProto.BOOL)
    arguments = ["mask" if name == "attends" else name for name in inputs]
    whole = helper.make_node("CrossAttention", arguments, ["partial"], domain=DOMAIN)
    nodes = [mask, whole, helper.make_node("Identity", ["partial"], ["logsumexp"])]
    split = helper.make_function(DOMAIN, SPLIT, inputs, ["partial", "logsumexp"], nodes, opsets, ATTRIBUTES)
    inputs = ["query", "partial", "logsumexp", "attends"]
    nodes = [helper.make_node("Identity", ["partial"], ["context"])]
    combine = helper.make_function(DOMAIN, COMBINE, inputs, ["context"], nodes, opsets, ATTRIBUTES)
    return [ir.to_proto(cross_attention_function(18)), split, combine]


@dataclasses.dataclass
class PlayedGpu:
    """`recorder` stands in for tensorrt, `driver` for cuda-python, `machine` is what is looked at."""

    recorder: Recorder
    driver: HostDriver
    machine: Machine


@contextmanager
def played_gpu(
    monkeypatch: pytest.MonkeyPatch, version: str, cache: Path, bundle: Bundle | None = None, **recorder: Any
) -> Iterator[PlayedGpu]:
    """An AGX Orin with TensorRT `version`; engines compute if a bundle's weights are named."""
    from sfexport.engines.tensorrt import cuda

    driver = HostDriver(sm=87, multiprocessors=16)
    execution = HostExecution(driver, bundle.weights_directory, plugin_bodies()) if bundle else None
    made = Recorder(version, execute=execution, **recorder)
    machine = dataclasses.replace(
        detect_machine(),
        jetson_model="NVIDIA Jetson AGX Orin Developer Kit",
        jetpack="6.2",
        memory_gb=64.0,
        cuda=Cuda(True, "540.4.0", "12.6", (ORIN,), None),
    )
    monkeypatch.setattr(cuda, "bindings", lambda: driver)
    monkeypatch.setattr("sfexport.engines.tensorrt.build.detect_machine", lambda: machine)
    monkeypatch.setattr("sfexport.engines.tensorrt.library.runtime_version", lambda: made.__version__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for function in (cuda.initialise, cuda.device_sm, cuda.load_module):
        function.cache_clear()
    with made.installed():
        yield PlayedGpu(made, driver, machine)
    for function in (cuda.initialise, cuda.device_sm, cuda.load_module):
        function.cache_clear()
