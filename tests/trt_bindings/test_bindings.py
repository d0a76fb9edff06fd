"""TensorRT's own Python bindings of three versions, without its libraries: what they offer, and plugins in them.

The environments are made once (44 MB of downloads per major version) and found again; see trt_bindings/venvs.py.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from sfexport.engines.tensorrt.plugin_operations import OPERATIONS
from sfexport.graphs.plugin_nodes import PluginSettings
from sfexport.kernels.launch_config import Integers, combine_launch, split_launch, tiles_for
from sfexport.versions import FIRST_AOT_PLUGINS, FIRST_MAPPED_WEIGHTS, version_text
from trt_bindings.stubs import Unavailable, make_stubs
from trt_bindings.surface import VERSIONS, Surface
from trt_bindings.usage import collect
from trt_bindings.venvs import COMMAND, Environment, cache, find, make

PACKAGE = Path(__file__).parents[2] / "sfexport"
# Variables that mean something else than elsewhere.
SPECIAL = {"plugin_v3.py": {"builder": "IExprBuilder"}, "backend.py": {"cache": "", "engine": ""}}
# What the package uses of TensorRT only where it is there, and the version that has it first.
SINCE = {
    "OnnxParser.load_model_proto": version_text(FIRST_MAPPED_WEIGHTS),
    "OnnxParser.load_initializer": version_text(FIRST_MAPPED_WEIGHTS),
    "OnnxParser.parse_model_proto": version_text(FIRST_MAPPED_WEIGHTS),
    "NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS": version_text(FIRST_AOT_PLUGINS),
    "plugin": version_text(FIRST_AOT_PLUGINS),
}
AHEAD = VERSIONS[1:]  # versions with tensorrt.plugin's ahead-of-time plugins
PLUGIN_KINDS = [("python", version) for version in VERSIONS] + [("ahead", version) for version in AHEAD]


@pytest.fixture
def bindings(version: str) -> Environment:
    """The environment of the test's version; skipped where it is neither there nor asked for."""
    try:
        found = make(version) if os.environ.get("SFEXPORT_BINDINGS") == "1" else find(version)
    except Unavailable as error:
        pytest.skip(f"TensorRT {version}'s bindings: {error}")
    if found is None:
        pytest.skip(f"TensorRT {version}'s bindings are not in {cache()}: {COMMAND}, or SFEXPORT_BINDINGS=1")
    return found


def required(version: str) -> list[str]:
    """What the package uses of this version, from its source."""
    usage = collect(package_files(), SPECIAL, SINCE)
    return usage.required(version)


def package_files() -> list[Path]:
    """Files that use TensorRT; those for TensorRT for RTX, which offers other names, are not among them."""
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if not file.name.startswith("rtx_")]
    return [file for file in files if re.search(r"\btrt\b", file.read_text(encoding="utf-8"))]


@pytest.mark.bindings
@pytest.mark.parametrize("version", VERSIONS)
class TestReal:
    def test_import(self, version, bindings):
        program = """
import json, tensorrt as trt
registry = trt.get_plugin_registry()
print(json.dumps([trt.__version__, trt.Logger.__module__, len(registry.all_creators) > 0]))
"""
        found = bindings.code(program)
        assert found == [Surface.load(version).version, "tensorrt.tensorrt", True]
        assert found[0].startswith(version)

    def test_surface_is_the_stored_one(self, version, bindings):
        """Every name, kind and signature; `python -m tests.trt_bindings --write` stores them."""
        found = bindings.json("-m", "trt_bindings.dump_surface")
        stored = Surface.load(version).content
        differing = [section for section in stored if found[section] != stored[section]]
        assert differing == []
        assert set(found) == set(stored)

    def test_names_by_hand(self, version, bindings):
        """The stored surface and the bindings agree, name by name, on what exists and what does not."""
        names = [
            "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
            "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
            "BuilderFlag.FP16",
            "IBuilderConfig.set_memory_pool_limit",
            "IBuilderConfig.int8_calibrator",
            "OnnxParser.load_model_proto",
            "ICudaEngine.device_memory_size",
            "ILogger.Severity.ERROR",
            "plugin.aot_impl",
            "float16",
            "no_such_name",
        ]
        assert sorted(bindings.attributes_missing(names)) == Surface.load(version).missing(names)

    def test_package_uses_what_is_there(self, version, bindings):
        assert bindings.attributes_missing([n for n in required(version) if "." not in n.partition(".")[2]]) == []

    def test_plugin(self, version, bindings):
        """A Python IPluginV3, made by its creator from fields, asked what a builder asks, and brought back."""
        found = bindings.json("-m", "trt_bindings.toy_plugin", "HALF")
        assert found["registered"] and found["same"]
        assert found["names"] == ["times"]
        driven = found["driven"]
        assert (driven["dtypes"], driven["shapes"], driven["workspace"]) == (["HALF"], [[6, 5, 7]], 24)
        assert driven["constant"] == [[False, True, True]]
        assert found["restored"] == [4, "a label of some length"]

    def test_plugin_refusing_a_type(self, version, bindings):
        done = bindings.run("-m", "trt_bindings.toy_plugin", "FLOAT")
        assert done.returncode == 1
        assert "does not support tensor 0" in done.stderr

    def test_quick_plugin(self, version, bindings):
        done = bindings.run("-m", "trt_bindings.toy_quick")
        if version not in AHEAD:
            assert "No module named 'tensorrt.plugin'" in done.stderr
            return
        assert done.returncode == 0, done.stderr
        driven = json.loads(done.stdout.splitlines()[-1])
        assert (driven["shapes"], driven["constant"]) == ([[2, 3, 3]], [[True, False, True]])
        assert (driven["launch"]["grid_x"], driven["launch"]["block_x"], driven["launch"]["shared_mem"]) == (
            15,
            128,
            256,
        )
        assert (driven["extra"], driven["kernel"], driven["code"]) == ([60], "shorten", "// PTX")


@pytest.mark.bindings
@pytest.mark.parametrize(("dtype", "sequence", "slow"), [("HALF", 57, 2304), ("FLOAT", 1, 2304), ("HALF", 2000, 64)])
@pytest.mark.parametrize(("kind", "version"), PLUGIN_KINDS)
def test_cross_attention_plugins(kind, version, dtype, sequence, slow, bindings):
    """Both plugins, of each kind: what TensorRT works out with symbols is what the plan says with numbers."""
    query, key = [1, 28, sequence, 128], [1, 4, slow, 128]
    split, combine = OPERATIONS
    split_inputs = [query, key, key, [1, sequence], [1]]
    settings = PluginSettings(sm=87, ptx_isa=85, multiprocessors=16, head_dim=128)
    partial, logsumexp = split.output_shapes(Integers(), split_inputs, settings)
    combine_inputs = [query, list(partial), list(logsumexp), [1, sequence]]
    shapes = {split.name: split_inputs, combine.name: combine_inputs}
    given = json.dumps(asdict(settings)), json.dumps(shapes)
    found = bindings.json("-m", "trt_bindings.drive_plugins", kind, dtype, *given)

    assert found[split.name]["shapes"] == [list(partial), list(logsumexp)]
    assert found[split.name]["dtypes"] == ["FLOAT", "FLOAT"]
    assert found[combine.name]["shapes"] == [[1, sequence, 28 * 128]]
    assert found[combine.name]["dtypes"] == [dtype]
    if kind == "python":
        assert [found[o.name]["restored"] for o in OPERATIONS] == [True, True]
        return
    name = {"HALF": "fp16", "FLOAT": "fp32"}[dtype]
    tiles = tiles_for(name, 128, settings.sm)
    planned = split_launch(Integers(), query, key, tiles, settings.multiprocessors)
    assert launched(found[split.name]) == (planned.grid, planned.arguments, 128, 1024)
    planned = combine_launch(Integers(), query, partial)
    assert launched(found[combine.name]) == (planned.grid, planned.arguments, 64, 0)
    assert found[combine.name]["code"] == f"// {name} 128 87 85"


def launched(driven: dict) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    launch = driven["launch"]
    grid = tuple(launch[f"grid_{axis}"] for axis in "xyz")
    return grid, tuple(driven["extra"]), launch["block_x"], launch["shared_mem"]


# What needs no bindings: the stored surfaces, and the reader of sources.


@pytest.mark.parametrize("version", VERSIONS)
def test_package_uses_only_what_is_offered(version):
    assert Surface.load(version).missing(required(version)) == []


def test_package_is_read():
    """A reader that finds nothing would agree with every version."""
    usage = collect(package_files(), SPECIAL, SINCE)
    used = {
        "Builder.build_serialized_network",
        "IExecutionContext.execute_async_v3",
        "plugin.aot_impl",
        "ParserError.desc",
    }
    assert used <= set(usage.where)
    assert usage.unused() == []


SAMPLE = """
import tensorrt as trt


class Profile:
    def __init__(self, builder_config):
        self.name = "a"
        self._builder_config = builder_config
        builder_config.set_flag(trt.BuilderFlag.FP16)

    def use(self, parser, other):
        names = trt.MemoryPoolType
        self._builder_config.set_memory_pool_limit(names.WORKSPACE, 1)
        error = parser.get_error(0)
        if hasattr(parser, "no_such") and getattr(trt, "also_none", None):
            parser.load_model_proto(b"")
        return error.desc(), other.engine.num_io_tensors, getattr(trt, "float32"), trt.Dims((1,)).no_such


def take(profile: Profile, plain):
    return profile.name, profile.set_shape, plain.anything, trt.__version__
"""


def test_usage_of_a_sample(tmp_path):
    file = tmp_path / "sample.py"
    file.write_text(SAMPLE, encoding="utf-8")
    since, until = {"OnnxParser.load_model_proto": "10.13", "IMissing": "10.0"}, {"BuilderFlag.FP16": "11.0"}
    usage = collect([file], since=since, until=until)
    assert sorted(usage.where) == [
        "BuilderFlag",
        "BuilderFlag.FP16",
        "Dims",
        "Dims.no_such",
        "IBuilderConfig.set_flag",
        "IBuilderConfig.set_memory_pool_limit",
        "ICudaEngine.num_io_tensors",
        "IOptimizationProfile.set_shape",
        "MemoryPoolType",
        "MemoryPoolType.WORKSPACE",
        "OnnxParser.get_error",
        "OnnxParser.load_model_proto",
        "ParserError.desc",
        "float32",
    ]
    assert usage.where["BuilderFlag.FP16"] == ["sample.py:9"]
    assert usage.unused() == ["IMissing"]
    assert Surface.load("10.3").missing(usage.required("10.3")) == ["Dims.no_such"]
    assert Surface.load("11.4").missing(usage.required("11.4")) == ["Dims.no_such"]
    usage.since, usage.until = {}, {}
    assert Surface.load("10.3").missing(usage.required("10.3")) == ["Dims.no_such", "OnnxParser.load_model_proto"]
    assert Surface.load("11.4").missing(usage.required("11.4")) == ["BuilderFlag.FP16", "Dims.no_such"]


def test_surface_follows_properties():
    surface = Surface.load("10.16")
    assert surface.has("IExecutionContext.engine.num_io_tensors")
    assert surface.has("ITensor.dtype.name")
    assert surface.has("Logger.ERROR")
    assert not surface.has("IExecutionContext.engine.no_such")
    assert not surface.has("BuilderFlag.TF32.no_such")


def test_stubs_refuse_what_are_no_bindings(tmp_path):
    with pytest.raises(Unavailable, match="does not hold TensorRT's Python bindings"):
        make_stubs(tmp_path / "out", tmp_path, lean=None)
    (tmp_path / "tensorrt.so").write_bytes(b"libnvinfer.so.10\0")
    with pytest.raises(Unavailable, match="not what is known of the bindings"):
        make_stubs(tmp_path / "out", tmp_path, lean=None)
