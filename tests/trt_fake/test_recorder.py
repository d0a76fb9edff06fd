"""The recorder (tests/trt_fake/recorder.py) offers what each TensorRT offers, and refuses what TensorRT refuses."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
from trt_bindings.signatures import parameters
from trt_bindings.surface import VERSIONS, Surface

from trt_fake.guard import NotRecorded
from trt_fake.recorder import OPEN, PLAYED, Call, Recorder
from trt_fake.small import RANGE, Build, write_sum

every_version = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_sum(tmp_path)


# What it offers.


@every_version
def test_signatures_are_the_bindings(version):
    """Each stand-in takes the arguments that every signature of this version takes, by position and by name."""
    surface, checked = Surface.load(version), 0
    for name, stand_in in PLAYED.items():
        kinds = surface.members(name)
        for member, played in vars(stand_in).items():
            kind = kinds.get(member)
            if member.startswith("_") or kind is None:
                continue
            assert inspect.isfunction(played) == (kind == "methods"), (name, member, kind)
            if kind == "methods":
                takes = inspect.signature(played)
                for text in surface.signatures(name, member):
                    given = parameters(text)
                    takes.bind(None, *given)
                    takes.bind(None, *[p for p in given if not p.optional])
                    by_name = {p.name: p for p in given if not p.positional_only}
                    takes.bind(None, *[p for p in given if p.positional_only], **by_name)
                    checked += 1
    assert checked > 80


def test_stand_ins_invent_nothing():
    """Every public name of a stand-in exists in some version."""
    surfaces = [Surface.load(version) for version in VERSIONS]
    for name, stand_in in PLAYED.items():
        known = set().union(*(s.members(name) for s in surfaces if name in s.classes))
        invented = {m for m in vars(stand_in) if not m.startswith("_")} - known
        assert not invented, (name, invented)
    assert all(any(name in s.classes for s in surfaces) for name in OPEN)


@every_version
def test_its_own_names_hide_nothing(version):
    own = {name for name in {*vars(Recorder), *vars(Recorder(version))} if not name.startswith("_")}
    assert [name for name in own if Surface.load(version).has(name)] == []


@pytest.mark.parametrize(
    ("name", "versions"),
    [
        ("BuilderFlag.FP16", ["10.3", "10.16"]),
        ("NetworkDefinitionCreationFlag.EXPLICIT_BATCH", ["10.3", "10.16"]),
        ("NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS", ["10.16", "11.4"]),
        ("IBuilderConfig.set_calibration_profile", ["10.3", "10.16"]),
        ("OnnxParser.load_model_proto", ["10.16", "11.4"]),
        ("ICudaEngine.device_memory_size", ["10.3", "10.16"]),
        ("ICudaEngine.device_memory_size_v2", ["10.3", "10.16", "11.4"]),
        ("fp4", ["10.16", "11.4"]),
        ("plugin.aot_impl", ["10.16", "11.4"]),
    ],
)
def test_names_come_and_go(name, versions):
    def offered(version: str) -> bool:
        owner = Recorder(version)
        for part in name.split("."):
            if not hasattr(owner, part):
                return False
            owner = getattr(owner, part)
        return True

    assert [version for version in VERSIONS if offered(version)] == versions


@every_version
def test_enumerations(version):
    trt = Recorder(version)
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert int(flag) == Surface.load(version).enums["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"]
    assert flag != int(flag)
    with pytest.raises(TypeError):
        1 << flag
    assert trt.float16 is trt.DataType.HALF
    assert trt.Logger.ERROR is trt.ILogger.Severity.ERROR is trt.Logger.Severity.ERROR


@every_version
def test_refusals_like_pybind(version, graph):
    build = Build(Recorder(version))
    trt, config = build.trt, build.config
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        _ = trt.no_such
    with pytest.raises(AttributeError, match="no attribute 'max_workspace_size'"):
        config.max_workspace_size = 1
    with pytest.raises(TypeError, match="incompatible function arguments"):
        config.set_flag("TF32")
    with pytest.raises(TypeError, match="incompatible function arguments"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        build.parser.parse_from_file(graph)
    with pytest.raises(TypeError, match="No constructor defined"):
        trt.IBuilderConfig()
    with pytest.raises(TypeError, match="incompatible function arguments"):
        config.builder_optimization_level = "5"
    with pytest.raises(NotRecorded):
        build.builder.reset()
    assert trt.Dims((2, 3)) == (2, 3)
    with pytest.raises(TypeError):
        _ = trt.Dims((2, 3)) == trt.Dims((2, 3))


@every_version
def test_constructors_must_be_called(version):
    trt = Recorder(version)

    class Forgetful(trt.IProgressMonitor):
        def __init__(self) -> None:
            self.seen = []

    with pytest.raises(TypeError, match=r"IProgressMonitor.__init__\(\) must be called"):
        Forgetful()


def test_installed(monkeypatch):
    with Recorder("10.16").installed() as recorder:
        import tensorrt
        import tensorrt.plugin as quick

        assert tensorrt is recorder

        @quick.register("own::Double")
        def describe(x): ...

        @quick.aot_impl("own::Double")
        def implement(x): ...

        assert tensorrt.get_plugin_registry().get_creator("Double", "1", "own") is not None
    assert "tensorrt" not in sys.modules or sys.modules["tensorrt"] is not recorder
    assert Call("plugin.aot_impl", {"plugin_id": "own::Double"}) in recorder.calls
    with Recorder("10.3").installed(), pytest.raises(ImportError):
        import tensorrt.plugin  # noqa: F401


# A build.


@every_version
def test_build_records_calls_in_order(version, graph):
    recorder = Recorder(version)
    build = Build(recorder)
    build.config.set_memory_pool_limit(build.trt.MemoryPoolType.WORKSPACE, 1 << 20)
    build.config.builder_optimization_level = 4
    assert build.parser.parse_from_file(str(graph))
    network = build.network
    described = [(t.name, tuple(t.shape), t.dtype.name) for t in (network.get_input(0), network.get_output(0))]
    assert described == [("x", (-1, 4), "FLOAT"), ("y", (-1, 4), "FLOAT")]
    assert (network.num_inputs, network.num_outputs) == (1, 1)
    assert build.add_profile(*RANGE) == 0
    plan = build.run()
    assert plan.nbytes == len(bytes(plan)) == memoryview(plan).nbytes > 0
    with pytest.raises(TypeError):
        len(plan)
    assert recorder.names() == [
        "Logger",
        "Builder",
        "Builder.create_network",
        "OnnxParser",
        "Builder.create_builder_config",
        "IBuilderConfig.set_memory_pool_limit",
        "IBuilderConfig.builder_optimization_level",
        "OnnxParser.parse_from_file",
        "INetworkDefinition.get_input",
        "INetworkDefinition.get_output",
        "Builder.create_optimization_profile",
        "IOptimizationProfile.set_shape",
        "IBuilderConfig.add_optimization_profile",
        "Builder.build_serialized_network",
    ]
    assert recorder.arguments("IBuilderConfig.set_memory_pool_limit") == [
        {"pool": "MemoryPoolType.WORKSPACE", "pool_size": 1 << 20}
    ]
    assert recorder.arguments("IBuilderConfig.builder_optimization_level") == [{"value": 4}]


@every_version
@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (None, "no optimization profile has been defined"),
        ([(2, 4), (1, 4), (8, 4)], "are not in order"),
        ([(1, 5), (2, 5), (8, 5)], "static dimension mismatch"),
        ([(1, 4, 1), (2, 4, 1), (8, 4, 1)], "has 2 dimensions, its profile 3"),
        ("y", "missing dimensions"),
    ],
)
def test_build_refuses_profiles(version, graph, shapes, reason):
    recorder = Recorder(version)
    build = Build(recorder)
    assert build.parser.parse_from_file(str(graph))
    if shapes == "y":
        build.add_profile(*RANGE, name="y")
    elif shapes is not None:
        assert build.add_profile(*shapes) == (-1 if "order" in reason else 0)
    assert build.run() is None
    assert any(reason in text for _, text in recorder.log)


def test_profile_of_mixed_ranks(graph):
    with pytest.raises(RuntimeError, match="opt is inconsistent"):
        Build(Recorder("10.3")).add_profile((1, 4), (1, 4, 1), (1, 4))


def test_build_refuses_precision_flags_of_a_typed_network(graph):
    recorder = Recorder("10.3")
    build = Build(recorder)
    assert build.parser.parse_from_file(str(graph))
    build.add_profile(*RANGE)
    build.config.set_flag(recorder.BuilderFlag.FP16)
    assert build.run() is None
    assert "strongly typed" in recorder.log[-1][1]


@every_version
def test_build_fails_when_told_and_says_so_to_the_logger(version, graph):
    recorder = Recorder(version, fail_build="out of memory")
    heard = []

    class Logger(recorder.ILogger):
        def __init__(self) -> None:
            recorder.ILogger.__init__(self)

        def log(self, severity, msg) -> None:
            heard.append((severity, msg))

    builder = recorder.Builder(Logger())
    network = builder.create_network(0)
    assert builder.build_serialized_network(network, builder.create_builder_config()) is None
    assert heard == [(recorder.ILogger.Severity.ERROR, "out of memory")]


@every_version
@pytest.mark.parametrize("stop", [False, True])
def test_progress(version, graph, stop):
    recorder = Recorder(version)

    class Monitor(recorder.IProgressMonitor):
        def __init__(self) -> None:
            recorder.IProgressMonitor.__init__(self)
            self.open, self.most = [], 0

        def phase_start(self, phase_name, parent_phase, num_steps) -> None:
            assert parent_phase in (None, *self.open)
            self.open.append(phase_name)
            self.most = max(self.most, num_steps)

        def phase_finish(self, phase_name) -> None:
            self.open.remove(phase_name)

        def step_complete(self, phase_name, step) -> bool:
            assert phase_name in self.open
            return not stop

    build = Build(recorder)
    assert build.parser.parse_from_file(str(graph))
    build.add_profile(*RANGE)
    monitor = Monitor()
    build.config.progress_monitor = monitor
    assert (build.run() is None) == stop
    assert monitor.open == []
    assert monitor.most > 0


@every_version
def test_timing_cache(version, graph):
    build = Build(Recorder(version))
    config = build.config
    assert config.create_timing_cache(b"garbage") is None
    cache = config.create_timing_cache(b"")
    before = bytes(cache.serialize())
    assert config.set_timing_cache(cache, False)
    assert build.parser.parse_from_file(str(graph))
    build.add_profile(*RANGE)
    assert build.run() is not None
    after = bytes(config.get_timing_cache().serialize())
    assert after != before
    assert config.set_timing_cache(config.create_timing_cache(after), False)
    other = Build(Recorder("10.16" if version != "10.16" else "10.3")).config
    assert not other.set_timing_cache(other.create_timing_cache(after), False)
