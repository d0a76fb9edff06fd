"""Engines built by NVIDIA's own builder, TensorRT for RTX, which needs no GPU. They cannot be run here."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import pytest
from helpers import assert_says, sfexport
from plan_text import PlanText
from test_parser_support import VARIANTS
from trt_fake.host_cuda import HostDriver

import sfexport as api
from sfexport.artifacts.bundle import GRAPHS, Bundle
from sfexport.artifacts.engines import Engines
from sfexport.artifacts.manifest_fields import TensorRTFields, check_fields
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.run import DemoPaths as Tree
from sfexport.demo.shipped import SHIPPED
from sfexport.engines.build import build as build_engines
from sfexport.engines.build import choose_backend, engine_name, open_backend
from sfexport.engines.profiles import DECODE, PREFILL, Limits, resolve_profiles
from sfexport.engines.tensorrt import cuda, rtx_build, rtx_library
from sfexport.engines.tensorrt.build import TensorRTOptions
from sfexport.engines.tensorrt.builder import BuildOptions, build_engine
from sfexport.engines.tensorrt.graph_file import tensorrt_graph
from sfexport.engines.tensorrt.parser_support import check_graph, support_for
from sfexport.engines.tensorrt.rtx_runtime import RtxContexts, runtime_cache_file
from sfexport.errors import BundleError, InputError, MissingDependency, SfexportError
from sfexport.exporting.export import ExportOptions, export
from sfexport.testing.random_checkpoint import write_random_checkpoint
from sfexport.versions import NEWEST_TENSORRT, version_text

try:
    TRT = rtx_library.library()
except SfexportError as problem:
    pytest.skip(f"TensorRT for RTX: {problem}", allow_module_level=True)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's engines in its own 16-bit type, through the command."""
    root = tmp_path_factory.mktemp("rtx")
    result = sfexport("build", SHIPPED, "-o", root / "engines", "--backend", "tensorrt-rtx", "--max-batch", "3")
    assert result.exit_code == 0, result.output
    return root / "engines"


def test_the_command_builds_every_graph_without_a_gpu(engines: Path) -> None:
    content = json.loads((engines / "engine.json").read_text())
    assert content["runtime"] == {"name": "tensorrt-rtx", "version": importlib.metadata.version(rtx_library.BINDINGS)}
    assert (content["target"], content["compute_capabilities"]) == ("rtx", [])
    assert content["limits"]["rows"] == 3
    assert sorted(content["files"]) == sorted(f"{name}.engine" for name in GRAPHS)
    assert not list(engines.glob("*.onnx"))
    assert Bundle.open(engines.parent / "engines-bundle").precision == Checkpoint.open(SHIPPED).half_precision
    shown = json.loads(sfexport("inspect", engines, "--json").stdout)
    assert (shown["kind"], shown["backend"]) == ("engines", "tensorrt-rtx")
    table = sfexport("inspect", engines)
    assert table.exit_code == 0
    assert_says(table.stdout, "every RTX card", "3 questions together", "tensorrt-rtx 1.7.1.116")


def test_without_a_driver_the_engines_are_refused_with_a_reason(engines: Path) -> None:
    pipeline = api.load(engines)
    with pytest.raises(SfexportError) as caught:
        pipeline.backend  # noqa: B018
    assert any(word in caught.value.paragraph() for word in ("no NVIDIA driver", "cuda-python"))


def played_driver(monkeypatch: pytest.MonkeyPatch, sm: int) -> HostDriver:
    """A driver with one GPU; nothing of TensorRT may be called with it."""
    driver = HostDriver(sm=sm)
    monkeypatch.setattr(cuda, "bindings", lambda: driver)
    for function in (cuda.initialise, cuda.device_sm):
        monkeypatch.setattr(cuda, function.__name__, functools.cache(function.__wrapped__))
    return driver


def test_asking_without_a_driver_is_refused_in_one_paragraph(
    engines: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver(flags: int) -> tuple[int]:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(played_driver(monkeypatch, 89), "cuInit", no_driver)
    result = sfexport("ask", engines, tree.clip, "-q", "What is it?")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and result.stdout == ""
    assert_says(result.stderr, "There is no NVIDIA driver on this machine", "install NVIDIA's driver")


@pytest.mark.parametrize(
    ("built_for", "sm", "taken"),
    [([], 89, True), ([], 120, True), ([], 75, False), ([], 90, False), (["SM89"], 89, True), (["SM89"], 120, False)],
)
def test_only_cards_that_engines_were_built_for_load_them(
    built_for: list[str], sm: int, taken: bool, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[Any, ...]] = []
    played_driver(monkeypatch, sm)
    monkeypatch.setattr("sfexport.engines.tensorrt.backend.TensorRTBackend", lambda *given: loaded.append(given))
    opened = Engines.open(engines)
    opened = replace(opened, content=opened.content | {"compute_capabilities": built_for})
    if taken:
        open_backend(opened)
        ((*given, contexts),) = loaded
        assert given == [TRT, opened.path, opened.bundle.config, "tensorrt-rtx", 1]
        assert isinstance(contexts, RtxContexts)
        return
    with pytest.raises(BundleError, match=rf"built for SM\d+.*GPU is of SM{sm}") as caught:
        open_backend(opened)
    assert "--backend tensorrt-rtx" in caught.value.hint and not loaded


@pytest.mark.parametrize(("name", "version"), [("tensorrt", "11.4.1"), ("tensorrt-rtx", "1.8.0.1")])
def test_engines_of_another_runtime_are_refused_by_name(name: str, version: str, engines: Path) -> None:
    opened = Engines.open(engines)
    other = replace(opened, content=opened.content | {"runtime": {"name": name, "version": version}})
    with pytest.raises(BundleError, match=rf"built with {name} {version}; this machine has tensorrt-rtx 1\.7"):
        open_backend(other)


def test_auto_never_chooses_it_and_its_directories_name_it() -> None:
    assert choose_backend("auto") != "tensorrt-rtx"
    name = f"tensorrt-rtx-{importlib.metadata.version(rtx_library.BINDINGS)}"
    assert [engine_name("tensorrt-rtx", target) for target in (None, "rtx-5090")] == [f"rtx-{name}", f"rtx-5090-{name}"]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[str, str | None], Bundle] = {}

    def bundle(precision: str, quantize: str | None = None) -> Bundle:
        if (precision, quantize) not in made:
            folder = tmp_path_factory.mktemp("bundle") / "bundle"
            options = ExportOptions(precision=precision, quantize=quantize, weights="auto" if quantize else "copy")
            made[precision, quantize] = export(Checkpoint.open(SHIPPED), folder, options)
        return made[precision, quantize]

    return bundle


def build(
    bundle: Bundle,
    graph: str,
    out: Path,
    model: onnx.ModelProto | None = None,
    limits: Limits | None = None,
    phases: tuple[str, ...] = (),
) -> int:
    """Build one graph, or a changed one in its place; return the engine's bytes.

    Args:
        phases: profiles to build with; none: all.
    """
    file = out.with_suffix(".onnx")
    onnx.save(onnx.inliner.inline_local_functions(model or tensorrt_graph(bundle, graph)), file)
    profiles = resolve_profiles(bundle, limits or Limits(bundle.frames, 64, 16, 2))[graph]
    profiles = [profile for profile in profiles if not phases or profile.name in phases]
    build_engine(TRT, file, bundle.weights_directory, out, profiles, BuildOptions())
    return out.stat().st_size


@pytest.mark.parametrize(
    ("precision", "quantize"), [("fp32", None), ("fp16", None), ("bf16", None), ("fp16", "int4"), ("bf16", "int4")]
)
def test_the_decoder_is_built_in_every_precision(
    precision: str, quantize: str | None, make: Any, tmp_path: Path
) -> None:
    assert build(make(precision, quantize), "decoder", tmp_path / "decoder.engine") > 100_000


@pytest.mark.parametrize("graph", ["vision_encoder", "compressor"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_other_graphs_are_built(graph: str, precision: str, make: Any, tmp_path: Path) -> None:
    assert build(make(precision), graph, tmp_path / f"{graph}.engine") > 10_000


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_checkpoint_is_built(variant: str, tmp_path: Path) -> None:
    tower, changes = VARIANTS[variant]
    write_random_checkpoint(tmp_path / "checkpoint", tower=tower, changes=changes)
    bundle = export(Checkpoint.open(tmp_path / "checkpoint"), tmp_path / "bundle", ExportOptions(precision="fp16"))
    lines: list[str] = []
    assert build_engines(bundle, tmp_path / "engines", "tensorrt-rtx", lines.append).content["target"] == "rtx"
    assert not [line for line in lines if "already exists" in line], "functions are inlined"


def test_ctrl_c_ends_the_build_and_leaves_nothing(make: Any, tmp_path: Path) -> None:
    steps: list[str] = []

    def interrupt(phase: str, done: int, total: int) -> None:
        steps.append(phase)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(make("fp16"), tmp_path / "engines", "tensorrt-rtx", on_progress=interrupt)
    assert steps and not list(tmp_path.iterdir())


def planted(bundle: Bundle, change: Any) -> onnx.ModelProto:
    model = onnx.load(bundle.graph_file("decoder"), load_external_data=False)
    change(model)
    return model


def unsupported_operator(model: onnx.ModelProto) -> None:
    (node,) = [n for n in model.graph.node if n.op_type == "Softmax"][:1]
    node.op_type = "Hardmax"
    model.graph.node.append(onnx.helper.make_node("Det", [node.output[0]], ["planted"], name="planted/Det"))


def mixed_types(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Mul" and "/self_attn/Mul" in n.name)
    cast = onnx.helper.make_node("Cast", [node.input[0]], ["planted_float"], name="planted/Cast", to=1)
    at = list(model.graph.node).index(node)
    node.input[0] = "planted_float"
    model.graph.node.insert(at, cast)


def wrong_int4_layout(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "DequantizeLinear")
    for attribute in node.attribute:
        if attribute.name == "axis":
            attribute.i = 1


@pytest.mark.parametrize("change", [unsupported_operator, mixed_types, wrong_int4_layout], ids=lambda c: c.__name__)
def test_what_is_planted_is_refused_by_the_builder_and_by_the_check(change: Any, make: Any, tmp_path: Path) -> None:
    bundle = make("fp16", "int4" if change is wrong_int4_layout else None)
    model = planted(bundle, change)
    with pytest.raises(SfexportError) as caught:
        build(bundle, "decoder", tmp_path / "planted.engine", model)
    assert "decoder" in caught.value.paragraph() or "planted" in caught.value.paragraph()
    assert not (tmp_path / "planted.engine").exists()
    support = support_for(version_text(NEWEST_TENSORRT))
    assert check_graph(model, "decoder", support, weights=bundle.weights_directory), "found without TensorRT too"


def test_a_target_decides_the_compute_capability(tmp_path: Path) -> None:
    result = sfexport(
        "build", SHIPPED, "-o", tmp_path / "e", "--backend", "tensorrt-rtx", "--target", "l4", "--precision", "fp16"
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "e" / "engine.json").read_text())["compute_capabilities"] == ["SM89"]
    refused = sfexport("build", SHIPPED, "-o", tmp_path / "f", "--backend", "tensorrt-rtx", "--target", "h100")
    assert refused.exit_code == 2
    assert_says(refused.stderr, "builds nothing for h100 (SM90)", "SM89")
    assert not (tmp_path / "f").exists() and not (tmp_path / "f-bundle").exists()


def test_a_decoder_is_built_in_parts_that_hold_its_weights_once(wide: Any, tmp_path: Path) -> None:
    """No part is much larger than its share: that is what a board with little memory in one piece needs."""
    bundle = wide("bf16")
    options = TensorRTOptions(split_decoder=3)
    built = build_engines(bundle, tmp_path / "engines", "tensorrt-rtx", tensorrt=options)
    assert built.content["split_decoder"] == 3
    sizes = [(tmp_path / "engines" / f"decoder.{k}.engine").stat().st_size for k in range(3)]
    weights = weight_bytes(bundle)
    assert weights <= sum(sizes) < weights + 3 * 16_000_000
    # The head is two thirds of a layer here, and goes with the last layer.
    assert max(sizes) < 0.7 * weights


def test_kernels_have_no_use(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no plugins"):
        api.build(SHIPPED, tmp_path / "e", backend="tensorrt-rtx", kernels=tmp_path)


def test_a_machine_that_is_too_small_is_found_before_the_build(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtx_build, "physical_memory", lambda: 400_000_000)
    with pytest.raises(SfexportError, match=r"Building takes about .* this machine has 400\.0 MB"):
        api.build(make("fp16").path, tmp_path / "e", backend="tensorrt-rtx")
    assert not (tmp_path / "e").exists()


@pytest.fixture
def fresh_library() -> Iterator[None]:
    rtx_library.library.cache_clear()
    yield
    rtx_library.library.cache_clear()


def test_another_version_is_refused(fresh_library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx_library, "runtime_version", lambda: "1.6.1.120")
    with pytest.raises(SfexportError, match=r"1\.6\.1\.120 is installed; sfexport is made for 1\.7\.1\.116"):
        rtx_library.library()


def test_absent_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(MissingDependency, match="tensorrt-rtx") as caught:
        rtx_library.runtime_version()
    assert "sfexport[rtx]" in caught.value.hint


def test_bindings_that_do_not_load_are_told_from_absent_ones(
    fresh_library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(MissingDependency, match="tensorrt-rtx"):
        rtx_library.library()


def test_libraries_of_another_version_are_not_loaded(
    fresh_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the package's earlier versions."""
    about = tmp_path / "onnxruntime_ep_nv_tensorrt_rtx_cu12-0.4.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {rtx_library.LIBRARIES}\nVersion: 0.4.0\n")
    (about / "RECORD").write_text("rtx/libtensorrt_rtx.so.1.6.1,,\nrtx/libtensorrt_onnxparser_rtx.so.1.6.1,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match=r"cu12 0\.4\.0 has no libtensorrt_rtx\.so\.1\.7\.1"):
        rtx_library.library()


def test_engines_of_the_other_backend_are_refused(engines: Path) -> None:
    """A manifest that says its engines are TensorRT's lacks TensorRT's fields."""
    content = json.loads((engines / "engine.json").read_text()) | {"backend": "tensorrt"}
    with pytest.raises(BundleError, match="missing required field 'gpu'"):
        check_fields(content, TensorRTFields, engines)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint whose layers are most of it, with heads like the 7 B model's, in a precision."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 2}
    changes = sizes | {"num_hidden_layers": 3, "vocab_size": 32000, "max_position_embeddings": 4096}
    write_random_checkpoint(folder / "checkpoint", changes=changes | {"tokenizer_model_max_length": 4096})

    def bundle(precision: str, quantize: str | None = None) -> Bundle:
        place = folder / f"{precision}-{quantize}"
        if not place.exists():
            options = ExportOptions(precision=precision, quantize=quantize, weights="auto" if quantize else "copy")
            export(Checkpoint.open(folder / "checkpoint"), place, options)
        return Bundle.open(place)

    return bundle


def weight_bytes(bundle: Bundle) -> int:
    stored = [t for t in tensorrt_graph(bundle, "decoder").graph.initializer if t.external_data]
    return sum(int({e.key: e.value for e in t.external_data}["length"]) for t in stored)


@pytest.mark.parametrize(("precision", "quantize"), [("bf16", None), ("fp16", "int4")])
def test_the_two_profiles_store_no_weight_twice(
    precision: str, quantize: str | None, wide: Any, tmp_path: Path
) -> None:
    """Beside its weights an engine has its kernels, for each kind of card: some 11 MB, whatever the weights.

    The layers' weights take 91 MB in bf16 and 24 MB in INT4: stored twice they would show.
    """
    bundle = wide(precision, quantize)
    assert build(bundle, "decoder", tmp_path / "decoder.engine") - weight_bytes(bundle) < 16_000_000


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_attention_is_fused_and_no_matrix_is_expanded(precision: str, wide: Any, tmp_path: Path) -> None:
    """Read out of the plans: at 1,296 positions scores would take 54 MB a layer, and the head 66 MB in 16 bits."""
    bundle = wide(precision, "int4")
    text, limits = bundle.config.text, Limits(bundle.frames, 1296, 256)
    layers = text.num_layers + len(bundle.config.slow_fast.hybrid_layers)
    for phase, largest in ((PREFILL, 64 << 20), (DECODE, 32 << 20)):
        build(bundle, "decoder", tmp_path / "decoder.engine", limits=limits, phases=(phase,))
        plan = PlanText.read((tmp_path / "decoder.engine").read_bytes())
        assert plan.attention.total() == layers, plan.kernels
        assert "__myl_CastMulFc" in plan.kernels  # the 8-bit head: dequantised within its product
        assert max(plan.scratch) < min(largest, 2 * text.vocab_size * text.hidden_size)


def test_the_bundles_own_decoder_is_not_fused(wide: Any, tmp_path: Path) -> None:
    """What the form for TensorRT is for."""
    bundle = wide("bf16", "int4")
    own = onnx.load(bundle.graph_file("decoder"), load_external_data=False)
    build(bundle, "decoder", tmp_path / "own.engine", own, Limits(bundle.frames, 1296, 256), (PREFILL,))
    plan = PlanText.read((tmp_path / "own.engine").read_bytes())
    assert not plan.attention and max(plan.scratch) > 64 << 20


# --- the cache of kernels that are compiled on the GPU -------------------------------------------------------


class PlayedCache:
    """What RtxContexts uses of IRuntimeCache; `content` is what the GPU has compiled."""

    def __init__(self) -> None:
        self.content, self.taken = b"compiled", list[bytes]()

    def deserialize(self, blob: bytes) -> bool:
        self.taken.append(blob)
        return True

    def serialize(self) -> bytes:
        return self.content


class PlayedConfig:
    """What RtxContexts uses of IRuntimeConfig, checked against the real class."""

    def __init__(self, cache: PlayedCache) -> None:
        self._cache, self.settings = cache, dict[str, Any]()

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name != "settings":
            assert isinstance(getattr(TRT.IRuntimeConfig, name), property)
            self.settings[name] = value
            return
        object.__setattr__(self, name, value)

    def create_runtime_cache(self) -> PlayedCache:
        return self._cache

    def set_runtime_cache(self, cache: PlayedCache) -> bool:
        self.settings["cache"] = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.settings["allocation"] = strategy


class PlayedEngine:
    def __init__(self, cache: PlayedCache) -> None:
        self.configs: list[PlayedConfig] = []
        self._cache = cache

    def create_runtime_config(self) -> PlayedConfig:
        self.configs.append(PlayedConfig(self._cache))
        return self.configs[-1]

    def create_execution_context(self, config: PlayedConfig) -> str:
        return f"context {self.configs.index(config)}"


def test_what_the_runtime_offers_is_what_is_played() -> None:
    for real, played in ((TRT.IRuntimeConfig, PlayedConfig), (TRT.IRuntimeCache, PlayedCache)):
        for name in vars(played):
            assert name.startswith("__") or hasattr(real, name), name
    assert hasattr(TRT.ICudaEngine, "create_runtime_config")


def test_compiled_kernels_are_kept_for_the_next_start(tmp_path: Path) -> None:
    file, cache = tmp_path / "sfexport" / "kernels.cache", PlayedCache()
    engine = PlayedEngine(cache)
    contexts = RtxContexts(TRT, file)
    assert [contexts(engine, fixed) for fixed in (True, False)] == ["context 0", "context 1"]
    decode, prefill = (config.settings for config in engine.configs)
    strategies = TRT.DynamicShapesKernelSpecializationStrategy
    assert decode["dynamic_shapes_kernel_specialization_strategy"] == strategies.EAGER
    assert prefill["dynamic_shapes_kernel_specialization_strategy"] == strategies.LAZY
    assert decode["allocation"] == TRT.ExecutionContextAllocationStrategy.USER_MANAGED
    assert decode["cache"] is prefill["cache"] is cache and cache.taken == []
    assert not file.exists()
    del contexts
    assert file.read_bytes() == b"compiled"
    before = file.stat().st_mtime_ns
    again = RtxContexts(TRT, file)
    again(PlayedEngine(cache), True)
    assert cache.taken == [b"compiled"]
    del again
    assert file.stat().st_mtime_ns == before, "nothing new was compiled"


def test_a_place_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    contexts = RtxContexts(TRT, tmp_path / "file" / "kernels.cache")
    contexts(PlayedEngine(PlayedCache()), True)
    del contexts


def test_the_caches_name_says_the_gpu_and_the_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime_cache_file(89) == tmp_path / "sfexport" / "kernels-sm89-tensorrt-rtx-1.7.1.116.cache"
