"""The build against the API of TensorRT 10.3, 10.16 and 11.4 (tests/trt_fake/recorder.py), to the order of calls."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import onnx
import pytest
from gpu import ORIN, VERSIONS, PlayedGpu, played_gpu
from helpers import promise_again, sfexport

from sfexport.artifacts.bundle import GRAPHS, Bundle
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.shipped import SHIPPED
from sfexport.engines.build import build
from sfexport.engines.profiles import Limits, resolve_profiles
from sfexport.engines.tensorrt.build import TensorRTOptions
from sfexport.errors import InputError, MissingDependency, SfexportError
from sfexport.exporting.export import ExportOptions, export
from sfexport.kernels.compile import compile_kernels
from sfexport.kernels.store import save_kernels
from sfexport.machines.targets import find_target
from sfexport.versions import NEW_NUMPY, is_older

pytest.importorskip("triton", reason="the plugin's kernel is written in Triton, which is not installed")
# What a build of one graph does, in order, whatever the version; the parser's own calls differ.
ORDER = [
    "Builder",
    "Builder.create_network",
    "OnnxParser",
    "Builder.create_builder_config",
    "IBuilderConfig.profiling_verbosity",
    "IBuilderConfig.create_timing_cache",
    "IBuilderConfig.set_timing_cache",
    "Builder.create_optimization_profile",
    "IOptimizationProfile.set_shape",
    "IBuilderConfig.add_optimization_profile",
    "IBuilderConfig.progress_monitor",
    "Builder.build_serialized_network",
    "IBuilderConfig.get_timing_cache",
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("built") / "bundle"
    return export(Checkpoint.open(SHIPPED), out, ExportOptions(precision="fp16"))


def run(played: PlayedGpu, bundle: Bundle, out: Path, **options) -> tuple[dict, list[str]]:
    """Build; the engine manifest's content, and the lines reported."""
    lines: list[str] = []
    force = options.pop("force", False)
    on_progress = options.pop("on_progress", lambda phase, done, total: None)
    built = build(bundle, out, "tensorrt", lines.append, force, TensorRTOptions(**options), on_progress)
    return built.content, lines


@pytest.mark.parametrize("version", VERSIONS)
def test_order_of_calls(version, bundle, tmp_path, monkeypatch):
    with played_gpu(monkeypatch, version, tmp_path / "cache") as played:
        content, _ = run(played, bundle, tmp_path / "engines")
    calls = [name for name, _ in groupby(name for name in played.recorder.names() if name in ORDER)]
    assert calls[: calls.index("Builder", 1)] == ORDER
    # The decoder's two profiles; the compressor has two as well, since the demo pools its video tokens.
    assert played.recorder.names().count("IBuilderConfig.add_optimization_profile") == 1 + 2 + 2
    assert played.recorder.names().count("Builder.build_serialized_network") == 3
    # 10.16's part for compiled plugins works with older NumPy only.
    compiled = version == "11.4" or (version == "10.16" and is_older(np.__version__, NEW_NUMPY))
    assert content["plugin"] == ("ahead" if compiled else "python")
    assert content["gpu"] == {"name": "Orin", "sm": 87}
    engines = {f"{g}.engine" for g in GRAPHS}
    # The plugins in Python launch PTX that lies beside the engines; the others have it inside.
    beside = set(content["files"]) - engines
    assert engines <= set(content["files"]) and len(beside) == (0 if compiled else 3)
    assert not played.recorder.log


@pytest.mark.parametrize("version", VERSIONS)
def test_networks_are_strongly_typed_and_prefer_compiled_plugins(version, bundle, tmp_path, monkeypatch):
    with played_gpu(monkeypatch, version, tmp_path / "cache") as played:
        run(played, bundle, tmp_path / "engines")
        flags = played.recorder.NetworkDefinitionCreationFlag
        expected = 1 << int(flags.STRONGLY_TYPED)
        if version != "10.3":
            expected |= 1 << int(flags.PREFER_AOT_PYTHON_PLUGINS)
    assert {c["flags"] for c in played.recorder.arguments("Builder.create_network")} == {expected}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_parser_gets_the_function_free_sibling_and_the_weights(version, bundle, tmp_path, monkeypatch):
    with played_gpu(monkeypatch, version, tmp_path / "cache") as played:
        run(played, bundle, tmp_path / "engines")
    assert played.recorder.chosen == {"CrossAttentionSplit": "plugin", "CrossAttentionCombine": "plugin"}
    loaded = played.recorder.arguments("OnnxParser.load_initializer")
    if version == "10.3":
        assert not loaded and len(played.recorder.arguments("OnnxParser.parse_from_file")) == 3
        return
    graphs = [onnx.load(bundle.graph_file(g), load_external_data=False) for g in GRAPHS]
    external = {t.name for m in graphs for t in m.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert {c["name"] for c in loaded} == external
    assert sum(c["size"] for c in loaded) < SHIPPED.joinpath("model.safetensors").stat().st_size


@pytest.mark.parametrize(("precision", "cleared"), [("fp32", True), ("fp16", False), ("bf16", False)])
def test_only_float32_engines_go_without_tf32(precision, cleared, tmp_path, monkeypatch):
    made = export(Checkpoint.open(SHIPPED), tmp_path / "bundle", ExportOptions(precision=precision))
    with played_gpu(monkeypatch, "10.16", tmp_path / "cache") as played:
        run(played, made, tmp_path / "engines")
    flags = [c["flag"] for c in played.recorder.arguments("IBuilderConfig.clear_flag")]
    assert flags == (["BuilderFlag.TF32"] * 3 if cleared else [])


def test_at_each_size_of_a_profile_the_shapes_fit_one_another(bundle):
    for limits in (Limits(16), Limits(1, 1, 1), Limits(64, 40, 8)):
        for profile in resolve_profiles(bundle, limits)["decoder"]:
            shapes = {t.name: (t.min, t.opt, t.max) for t in profile.tensors}
            names = ("inputs_embeds", "past_key_values.0.key", "attention_mask", "new_key_values.0.key")
            for embeds, past, mask, new in zip(*map(shapes.get, names), strict=True):
                assert embeds[:2] == mask == (new[0], new[2]) and past[0] == new[0]


def test_profiles_follow_the_limits(bundle, tmp_path, monkeypatch):
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache") as played:
        content, _ = run(played, bundle, tmp_path / "engines", frames=32, question_tokens=100, new_tokens=20)
    shapes = played.recorder.arguments("IOptimizationProfile.set_shape")
    frames = next(c for c in shapes if c["input"] == "slow_tokens")
    assert (frames["min"][0], frames["max"][0]) == (1, 32)
    prefix, own = ([c for c in shapes if c["input"] == f"{n}_key_values.0.key"][1] for n in ("prefix", "past"))
    fast = 9 * 4  # 32 frames, sampled every second, pooled by four
    assert (prefix["max"][0], prefix["max"][2]) == (1, 100 + fast)
    assert (own["max"][0], own["max"][2]) == (8, 100 + 20)
    assert content["limits"] == {"frames": 32, "question_tokens": 100, "new_tokens": 20, "rows": 8}


def test_timings_are_kept_per_gpu_and_version(bundle, tmp_path, monkeypatch):
    sizes = []
    for _ in range(2):
        with played_gpu(monkeypatch, "10.16", tmp_path / "cache") as played:
            run(played, bundle, tmp_path / "engines")
        sizes.append(played.recorder.arguments("IBuilderConfig.create_timing_cache")[0]["serialized_timing_cache"])
    assert sizes[0] == "<0 bytes>" and sizes[1] != "<0 bytes>"
    (file,) = (tmp_path / "cache" / "sfexport").iterdir()
    assert file.name.startswith("timings-orin-tensorrt-10.16")


def test_without_triton_the_nodes_own_body_is_built_with_a_warning(bundle, tmp_path, monkeypatch):
    def missing(*arguments):
        raise MissingDependency("triton", "Compiling the cross-attention kernel", "pip install triton")

    monkeypatch.setattr("sfexport.engines.tensorrt.build.compile_kernels", missing)
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache") as played:
        content, lines = run(played, bundle, tmp_path / "engines")
    assert played.recorder.chosen == {"CrossAttention": "function"}
    assert content["plugin"] is None
    assert any("warning" in line and "pip install triton" in line for line in lines)


def test_kernels_compiled_elsewhere_are_taken(bundle, tmp_path, monkeypatch):
    save_kernels(tmp_path / "kernels", compile_kernels("fp16", 32, 87, 85))
    monkeypatch.setattr("sfexport.engines.tensorrt.build.compile_kernels", None)
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache") as played:
        content, _ = run(played, bundle, tmp_path / "engines", kernels=tmp_path / "kernels")
    assert content["plugin"] == "python"
    save_kernels(tmp_path / "others", compile_kernels("fp16", 64, 87, 85))
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache") as played, pytest.raises(InputError, match="heads of 32"):
        run(played, bundle, tmp_path / "more", kernels=tmp_path / "others")


def test_progress_is_reported_and_an_interrupt_leaves_nothing(bundle, tmp_path, monkeypatch):
    seen = []
    with played_gpu(monkeypatch, "11.4", tmp_path / "cache") as played:
        run(played, bundle, tmp_path / "engines", on_progress=lambda *step: seen.append(step))
    assert seen and all(done <= total for _, done, total in seen)

    def interrupt(phase, done, total):
        raise KeyboardInterrupt

    with played_gpu(monkeypatch, "11.4", tmp_path / "cache") as played, pytest.raises(KeyboardInterrupt):
        run(played, bundle, tmp_path / "stopped", on_progress=interrupt)
    assert not list(tmp_path.glob("*stopped*"))


def test_a_failed_build_says_tensorrts_reason(bundle, tmp_path, monkeypatch):
    with (
        played_gpu(monkeypatch, "10.16", tmp_path / "cache", fail_build="out of memory") as played,
        pytest.raises(SfexportError, match=r"cannot build the vision_encoder.*out of memory"),
    ):
        run(played, bundle, tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


def test_a_node_without_a_name_is_told_by_its_number(tmp_path, monkeypatch):
    path = export(Checkpoint.open(SHIPPED), tmp_path / "bundle", ExportOptions(precision="fp16")).path
    model = onnx.load(path / "vision_encoder.onnx", load_external_data=False)
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, path / "vision_encoder.onnx")
    promise_again(path / "sfexport.json", "vision_encoder.onnx")
    with (
        played_gpu(monkeypatch, "10.3", tmp_path / "cache", operators={"Conv"}),
        pytest.raises(SfexportError, match=r"cannot read .* at node number \d+ \(\w+\)"),
    ):
        build(Bundle.open(path), tmp_path / "engines", "tensorrt")


def test_an_operator_the_parser_lacks_is_named_with_its_node(bundle, tmp_path, monkeypatch):
    with (
        played_gpu(monkeypatch, "10.3", tmp_path / "cache", operators={"Conv"}) as played,
        pytest.raises(SfexportError, match=r"cannot read .* at node .*\(\w+\)"),
    ):
        run(played, bundle, tmp_path / "engines")


def test_what_is_missing_or_wrong_is_said_before_the_build(bundle, tmp_path, monkeypatch):
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache") as played:
        with pytest.raises(InputError, match=r"h100 \(SM 9\.0\) cannot be built on this machine's Orin \(SM 8\.7\)"):
            run(played, bundle, tmp_path / "engines", target=find_target("h100"))
        small = replace(played.machine, memory_gb=0.5)
        monkeypatch.setattr("sfexport.engines.tensorrt.build.detect_machine", lambda: small)
        with pytest.raises(SfexportError, match=r"takes about .* [MG]B \(estimated\) and there are 500\.0 MB"):
            run(played, bundle, tmp_path / "engines")
        assert run(played, bundle, tmp_path / "forced", force=True)[0]["gpu"]["name"] == ORIN.name
        bare = replace(played.machine, cuda=replace(played.machine.cuda, gpus=()))
        monkeypatch.setattr("sfexport.engines.tensorrt.build.detect_machine", lambda: bare)
        with pytest.raises(SfexportError, match="no NVIDIA GPU"):
            run(played, bundle, tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


def test_a_tensorrt_that_is_too_old_is_refused(bundle, tmp_path, monkeypatch):
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache") as played:
        played.recorder.__version__ = "8.6.2"
        with pytest.raises(SfexportError, match=r"TensorRT 8\.6\.2 is too old"):
            run(played, bundle, tmp_path / "engines")


def test_without_tensorrt_the_command_says_what_to_install(bundle, tmp_path):
    if importlib.util.find_spec("tensorrt"):
        pytest.skip("TensorRT is installed here")
    result = sfexport("build", bundle.path, "--backend", "tensorrt", "-o", tmp_path / "engines")
    assert result.exit_code == 1
    assert "needs the library 'tensorrt'" in result.stderr and "python3-libnvinfer" in result.stderr
    assert not (tmp_path / "engines").exists()


def test_what_cannot_be_built_here_is_refused_before_a_checkpoint_is_exported(tmp_path, monkeypatch):
    asked = ("build", SHIPPED, "--backend", "tensorrt", "--quantize", "int4", "-o", tmp_path / "engines")

    def refused(*more: object) -> str:
        result = sfexport(*asked, *more)
        assert result.exit_code and result.stderr.count("\n") == 1, "one paragraph and no step"
        assert not list(tmp_path.glob("engines*"))
        return result.stderr

    if not importlib.util.find_spec("tensorrt"):
        assert "needs the library 'tensorrt'" in refused()
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache") as played:
        assert "Engines for h100 (SM 9.0) cannot be built on this machine's Orin" in refused("--target", "h100")
        assert "holds no compiled kernels" in refused("--kernels", tmp_path)
        bare = replace(played.machine, cuda=replace(played.machine.cuda, gpus=()))
        monkeypatch.setattr("sfexport.engines.tensorrt.build.detect_machine", lambda: bare)
        assert "no NVIDIA GPU" in refused()
    said = refused("--backend", "onnxruntime", "--precision", "bf16")
    assert "ONNX Runtime cannot run bf16 graphs" in said


def test_a_gpu_that_no_kernel_is_made_for_gets_the_nodes_own_body(bundle, tmp_path, monkeypatch):
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache") as played:
        card = replace(ORIN, name="NVIDIA A10", sm=86)
        other = replace(played.machine, jetson_model=None, cuda=replace(played.machine.cuda, gpus=(card,)))
        monkeypatch.setattr("sfexport.engines.tensorrt.build.detect_machine", lambda: other)
        content, lines = run(played, bundle, tmp_path / "engines")
        assert content["plugin"] is None and content["target"] == "sm86"
        (warning,) = [line for line in lines if "without the cross-attention plugin" in line]
        assert "not compiled for SM 8.6" in warning
        old = replace(played.machine, cuda=replace(played.machine.cuda, gpus=(replace(ORIN, name="T4", sm=75),)))
        monkeypatch.setattr("sfexport.engines.tensorrt.build.detect_machine", lambda: old)
        with pytest.raises(InputError, match=r"no kernels for compute capability 7\.5"):
            run(played, bundle, tmp_path / "more")


def test_engines_can_be_inspected(bundle, tmp_path, monkeypatch):
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache") as played:
        run(played, bundle, tmp_path / "engines", frames=16)
    result = sfexport("inspect", tmp_path / "engines")
    assert result.exit_code == 0, result.stderr
    for words in ("tensorrt 10.3", "Orin", "16 frames"):
        assert words in result.stdout
