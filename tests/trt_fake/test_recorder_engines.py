"""The recorder's parser, engines and contexts (tests/trt_fake/parsing.py, engines.py), and host memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from trt_bindings.surface import VERSIONS

from trt_fake.execution import HostExecution
from trt_fake.host_cuda import HostDriver
from trt_fake.recorder import Recorder
from trt_fake.small import RANGE, WEIGHTS, Build, write_graph, write_sum

every_version = pytest.mark.parametrize("version", VERSIONS)
# Versions with load_model_proto.
POINTERS = VERSIONS[1:]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_sum(tmp_path)


def errors(parser) -> list[tuple[str, str, str]]:
    found = [parser.get_error(i) for i in range(parser.num_errors)]
    return [(e.code().name, e.node_name(), e.desc()) for e in found]


# The parser.


@every_version
def test_parser_finds_no_file(version, tmp_path):
    build = Build(Recorder(version))
    assert not build.parser.parse_from_file(str(tmp_path / "none.onnx"))
    ((code, _, text),) = errors(build.parser)
    assert code == "INVALID_VALUE"
    assert "cannot be found" in text
    assert build.run() is None


@every_version
def test_parser_takes_no_garbage(version, tmp_path):
    build = Build(Recorder(version))
    assert not build.parser.parse(b"no protobuf", str(tmp_path / "a.onnx"))
    assert errors(build.parser)[0][0] == "MODEL_DESERIALIZE_FAILED"


@every_version
def test_parser_misses_weights(version, graph):
    (graph.parent / "weights.bin").write_bytes(b"short")
    build = Build(Recorder(version))
    assert not build.parser.parse_from_file(str(graph))
    assert "external weights of w" in errors(build.parser)[0][2]


@every_version
def test_parser_names_every_unknown_node(version, tmp_path):
    nodes = [helper.make_node(op, ["x"], [out], name=op) for op, out in (("Foo", "a"), ("Bar", "b"), ("Relu", "y"))]
    build = Build(Recorder(version))
    assert not build.parser.parse_from_file(str(write_graph(tmp_path / "g.onnx", nodes)))
    assert [(code, node) for code, node, _ in errors(build.parser)] == [
        ("UNSUPPORTED_NODE", "Foo"),
        ("UNSUPPORTED_NODE", "Bar"),
    ]
    build.parser.clear_errors()
    assert build.parser.num_errors == 0
    assert not build.parser.supports_model_v2((tmp_path / "g.onnx").read_bytes())
    parts = [(build.parser.get_subgraph_nodes(i), build.parser.is_subgraph_supported(i)) for i in range(2)]
    assert parts == [([0, 1], False), ([2], True)]


def test_parser_knows_only_given_operators(graph):
    assert Build(Recorder("10.3", operators={"Add"})).parser.parse_from_file(str(graph))
    assert not Build(Recorder("10.3", operators={"Mul"})).parser.parse_from_file(str(graph))


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < 23, reason="this onnx has no RMSNormalization")
@pytest.mark.parametrize(("version", "known"), [("10.3", False), ("10.16", True), ("11.4", True)])
def test_operators_of_newer_opsets(version, known):
    assert Build(Recorder(version)).parser.supports_operator("RMSNormalization") == known
    assert Build(Recorder(version)).parser.supports_operator("LayerNormalization")


@every_version
@pytest.mark.parametrize("attributes", [{}, {"plugin_namespace": "own", "plugin_version": "1"}])
@pytest.mark.parametrize("registered", [False, True])
def test_plugin_or_function(version, attributes, registered, tmp_path):
    """Up to 10.6 the function; from 10.15 the plugin if the node asks for it."""
    body = [helper.make_node("Relu", ["a"], ["b"])]
    function = helper.make_function("own", "Act", ["a"], ["b"], body, [helper.make_opsetid("", 18)], [*attributes])
    node = helper.make_node("Act", ["x"], ["y"], domain="own", **attributes)
    recorder = Recorder(version)
    if registered:
        register(recorder, "Act", attributes.get("plugin_namespace", ""))
    file = write_graph(tmp_path / "g.onnx", [node], functions=[function])
    assert Build(recorder).parser.parse_from_file(str(file))
    wins = registered and bool(attributes) and version != "10.3"
    assert recorder.chosen == {"Act": "plugin" if wins else "function"}


def register(trt: Recorder, name: str, namespace: str) -> None:
    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = name, namespace, "1"

    registry = trt.get_plugin_registry()
    assert registry.register_creator(Creator(), namespace)
    assert not registry.register_creator(Creator(), namespace)


@pytest.mark.parametrize("version", POINTERS)
def test_weights_by_pointer(version, graph):
    model = graph.read_bytes()
    (graph.parent / "weights.bin").unlink()
    parser = Build(Recorder(version)).parser
    assert not parser.parse_model_proto()
    assert parser.load_model_proto(model, str(graph))
    assert not parser.load_initializer("v", WEIGHTS.ctypes.data, 16)
    assert not parser.load_initializer("w", WEIGHTS.ctypes.data, 12)
    assert not parser.load_initializer("w", 0, 16)
    assert parser.load_initializer("w", WEIGHTS.ctypes.data, 16)
    assert parser.parse_model_proto()


# Engines.


@every_version
def test_engine_describes_its_tensors(version, graph):
    build = Build(Recorder(version))
    engine = build.engine(build.plan(graph))
    trt = build.trt
    found = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    assert found == ["x", "y"]
    assert [engine.get_tensor_mode(n) for n in found] == [trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT]
    assert tuple(engine.get_tensor_shape("y")) == (-1, 4)
    assert trt.nptype(engine.get_tensor_dtype("x")) == np.float32
    assert [tuple(shape) for shape in engine.get_tensor_profile_shape("x", 0)] == list(RANGE)
    assert engine.num_optimization_profiles == 1
    again = build.engine(engine.serialize())
    assert again.num_io_tensors == 2


def test_plan_of_another_version(graph):
    plan = bytes(Build(Recorder("10.3")).plan(graph))
    recorder = Recorder("10.16")
    assert Build(recorder).engine(plan) is None
    assert "expecting library version 10.16" in recorder.log[-1][1]
    assert Build(recorder).engine(b"no plan") is None


def test_version_compatible_plan(graph):
    old = Build(Recorder("10.3"))
    old.config.set_flag(old.trt.BuilderFlag.VERSION_COMPATIBLE)
    plan = bytes(old.plan(graph))
    for version, taken in (("10.16", True), ("11.4", False)):
        trt = Recorder(version)
        runtime = trt.Runtime(trt.Logger())
        assert runtime.deserialize_cuda_engine(plan) is None
        runtime.engine_host_code_allowed = True
        assert (runtime.deserialize_cuda_engine(plan) is not None) == taken


@every_version
def test_context_wants_everything_set(version, graph):
    build = Build(Recorder(version))
    engine = build.engine(build.plan(graph))
    context = engine.create_execution_context()
    assert context.infer_shapes() == ["x"]
    assert tuple(context.get_tensor_shape("y")) == (-1, 4)
    assert not context.set_input_shape("x", (9, 4))
    assert not context.set_input_shape("x", (2, 4, 1))
    assert not context.set_input_shape("z", (2, 4))
    assert not context.execute_async_v3(0)
    assert context.set_input_shape("x", (3, 4))
    assert context.infer_shapes() == []
    assert tuple(context.get_tensor_shape("y")) == (3, 4)
    assert not context.execute_async_v3(0)
    assert context.set_tensor_address("x", 4096)
    assert not context.set_tensor_address("z", 4096)
    assert context.set_tensor_address("y", 8192)
    assert context.execute_async_v3(0)
    with pytest.raises(RuntimeError, match="set optimization profile async"):
        context.set_optimization_profile_async(1, 0)
    assert context.set_optimization_profile_async(0, 0)
    assert context.infer_shapes() == ["x"]


@every_version
def test_context_with_memory_of_its_own(version, graph):
    build = Build(Recorder(version))
    engine = build.engine(build.plan(graph))
    context = engine.create_execution_context(build.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    assert context.set_input_shape("x", (3, 4))
    assert all(context.set_tensor_address(name, 4096) for name in "xy")
    assert not context.execute_async_v3(0)
    context.set_device_memory(4096, engine.device_memory_size_v2 - 1)
    assert not context.execute_async_v3(0)
    context.set_device_memory(4096, engine.device_memory_size_v2)
    assert context.execute_async_v3(0)


# Host memory.


@every_version
def test_execution_on_host_memory(version, graph):
    driver = HostDriver()
    build = Build(Recorder(version, execute=HostExecution(driver)))
    context = build.engine(build.plan(graph)).create_execution_context()
    given = np.full((3, 4), 10, dtype=np.float32)
    _, x = driver.cuMemAlloc(given.nbytes)
    _, y = driver.cuMemAlloc(given.nbytes)
    assert driver.cuMemcpyHtoDAsync(x, given.ctypes.data, given.nbytes, 1) == (0,)
    assert context.set_input_shape("x", given.shape)
    assert context.set_tensor_address("x", x)
    assert context.set_tensor_address("y", y)
    assert context.execute_async_v3(1)
    found = np.empty_like(given)
    assert driver.cuMemcpyDtoHAsync(found.ctypes.data, y, found.nbytes, 1) == (0,)
    np.testing.assert_array_equal(found, given + WEIGHTS)

    assert context.set_tensor_address("y", x)
    with pytest.raises(AssertionError, match="y lies over x"):
        context.execute_async_v3(1)
    assert context.set_tensor_address("y", y + 4)
    with pytest.raises(AssertionError, match="memory of y is not allocated"):
        context.execute_async_v3(1)


def test_execution_of_a_plugin_by_its_body(tmp_path):
    """A graph without functions, as a build with a plugin has it."""
    node = helper.make_node("Act", ["x"], ["y"], domain="own", plugin_namespace="own", plugin_version="1")
    file = write_graph(tmp_path / "g.onnx", [node])
    body = [helper.make_node("Neg", ["a"], ["b"])]
    opsets = [onnx.helper.make_opsetid("", 18)]
    attributes = ["plugin_namespace", "plugin_version"]
    function = helper.make_function("own", "Act", ["a"], ["b"], body, opsets, attributes)
    driver = HostDriver()
    recorder = Recorder("10.16", execute=HostExecution(driver, bodies=[function]))
    register(recorder, "Act", "own")
    build = Build(recorder)
    context = build.engine(build.plan(file)).create_execution_context()
    (_, x), (_, y) = driver.cuMemAlloc(32), driver.cuMemAlloc(32)
    given = np.arange(8, dtype=np.float32)
    driver.cuMemcpyHtoDAsync(x, given.ctypes.data, 32, 1)
    assert context.set_input_shape("x", (2, 4))
    assert context.set_tensor_address("x", x)
    assert context.set_tensor_address("y", y)
    assert context.execute_async_v3(1)
    found = np.empty_like(given)
    driver.cuMemcpyDtoHAsync(found.ctypes.data, y, 32, 1)
    np.testing.assert_array_equal(found, -given)


def test_driver_refuses_what_a_gpu_would_punish():
    driver, host = HostDriver(), np.zeros(8, dtype=np.float32)
    _, address = driver.cuMemAlloc(16)
    assert driver.cuMemcpyHtoDAsync(address, host.ctypes.data, 32, 1) == (1,)
    assert driver.cuMemFree(address) == (0,)
    assert driver.cuMemFree(address) == (1,)
    assert (driver.live, driver.peak) == (0, 16)
