"""Graphs in float16 and bfloat16: types, ranges that float16 does not have, and how far they are from float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from golden_data import Golden, goldens
from helpers import assert_says, document, edit_json, sfexport
from rounding import RoundedGolden, RoundedGraph, with_large_biases

from sfexport.artifacts.bundle import GRAPHS, Bundle
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.config import DecodeMode
from sfexport.checkpoint.vision_tower import Tower, VitTower
from sfexport.comparing.compare import Tolerance
from sfexport.comparing.run import run_parity
from sfexport.demo.clip import write_frames
from sfexport.demo.scenes import FPS, SIZE, UPSCALE, make_scene, video_frames
from sfexport.demo.shipped import SHIPPED
from sfexport.dtypes import PRECISIONS
from sfexport.engines.build import build
from sfexport.engines.interface import Backend, DecoderStep, KeyValues
from sfexport.engines.onnxruntime_backend import check_precision
from sfexport.errors import BundleError, InputError
from sfexport.exporting.export import ExportOptions, export
from sfexport.graphs import names
from sfexport.graphs.writer import GraphWriter
from sfexport.qa.pipeline import Pipeline
from sfexport.testing.random_checkpoint import TOWER, write_random_checkpoint

CLIP = VitTower("clip", 64, 3, 2, 96, 14, 56, -2, 1e-5, "quick_gelu")
SIGLIP = VitTower("siglip", 48, 3, 3, 64, 14, 70, -2, 1e-6, "gelu_tanh")
KINDS: dict[str, tuple[Tower, dict]] = {
    "convnext": (TOWER, {}),
    "clip": (CLIP, {"mm_vision_tower": "openai/clip-vit-x", "mm_vision_num_attention_heads": CLIP.num_heads}),
    "siglip": (SIGLIP, {"mm_vision_tower": "google/siglip-x", "mm_vision_num_attention_heads": SIGLIP.num_heads}),
    "srelu, pooled in space": (
        TOWER,
        {"mm_projector_type": "mlp2x_srelu", "fast_token_spatial_stride": 2, "mm_video_pooling_stride": 1},
    ),
    "no slow branch, tied embeddings": (TOWER, {"cross_attn_every_n_layers": None, "tie_word_embeddings": True}),
}
ARRAY_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
HALVES = ("fp16", "bf16")
each_half = pytest.mark.parametrize("precision", HALVES)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bundle]:
    """A bundle of a kind of checkpoint in a precision, with its weights."""
    folder, made = tmp_path_factory.mktemp("precision"), {}

    def bundle(kind: str, precision: str) -> Bundle:
        tower, changes = KINDS[kind]
        checkpoint = folder / kind
        if not checkpoint.exists():
            write_random_checkpoint(checkpoint, tower=tower, changes=changes)
        if (kind, precision) not in made:
            options = ExportOptions(precision=precision, weights="copy")
            made[kind, precision] = export(Checkpoint.open(checkpoint), folder / f"{kind}-{precision}", options)
        return made[kind, precision]

    return bundle


# --- options and manifest ----------------------------------------------------------------------------------


def test_an_unknown_precision_is_refused_with_the_choices() -> None:
    with pytest.raises(InputError) as caught:
        ExportOptions(precision="fp8")
    assert_says(caught.value.paragraph(), "'fp8'", "fp32, fp16, bf16")


def test_a_manifest_with_an_unknown_precision_is_damaged(tree_copy) -> None:
    edit_json(tree_copy.bundle / "sfexport.json", lambda content: content["options"].update(precision="fp8"))
    with pytest.raises(BundleError) as caught:
        Bundle.open(tree_copy.bundle)
    assert_says(caught.value.paragraph(), "damaged", "'fp8'")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inspect_shows_the_precision_and_every_type(precision: str, make: Callable) -> None:
    bundle = make("srelu, pooled in space", precision)
    assert bundle.precision == precision
    shown = document(sfexport("inspect", bundle.path, "--json"))
    assert shown["options"]["precision"] == precision
    found = {v["name"]: v["dtype"] for g in shown["graphs"].values() for v in (*g["inputs"], *g["outputs"])}
    fixed = {
        **dict.fromkeys((names.FRAME_WEIGHTS, names.CELL_WEIGHTS, names.LOGITS), "float32"),
        **dict.fromkeys((names.POSITIONS, names.PAST_LENGTHS, names.SLOW_LENGTHS), "int64"),
        **dict.fromkeys((names.MASK, names.SLOW_ATTENDS), "bool"),
    }
    assert found == {name: fixed.get(name, ARRAY_TYPES[precision]) for name in found}
    table = sfexport("inspect", bundle.path)
    assert table.exit_code == 0
    assert_says(table.stdout, precision, ARRAY_TYPES[precision])


# --- the files ---------------------------------------------------------------------------------------------


def types_in(model: onnx.ModelProto) -> dict[str, int]:
    """Value name -> element type, by onnx's own inference (which raises where an operator does not take a type)."""
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return types | {t.name: t.data_type for t in graph.initializer}


@each_half
@each_kind
def test_graphs_pass_the_full_check_by_path(kind: str, precision: str, make: Callable) -> None:
    for name in GRAPHS:
        onnx.checker.check_model(str(make(kind, precision).graph_file(name)), full_check=True)


@each_half
@each_kind
def test_what_would_overflow_or_cancel_is_computed_in_float32(kind: str, precision: str, make: Callable) -> None:
    seen: Counter[str] = Counter()
    for name in GRAPHS:
        model = onnx.load(make(kind, precision).graph_file(name), load_external_data=False)
        types = types_in(model)
        for node in model.graph.node:
            wide = ["LayerNormalization", "Softmax", "AveragePool", "Erf", "Sqrt", "Cos", "Sin"]
            if node.op_type in wide + ["Conv"] * (precision == "bf16"):
                seen[node.op_type] += 1
                assert {types[i] for i in node.input} == {onnx.TensorProto.FLOAT}, node.name
    assert {"LayerNormalization", "Softmax", "Sqrt", "Cos"} <= set(seen)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_weight_is_cast_at_most_once_to_a_type(precision: str, make: Callable) -> None:
    """The shards are bfloat16: in a bfloat16 graph only norms, convolutions and SReLUs are cast."""
    for name in GRAPHS:
        model = onnx.load(make("srelu, pooled in space", precision).graph_file(name), load_external_data=False)
        weights = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        casts = [n for n in model.graph.node if n.op_type == "Cast" and n.input[0] in weights]
        counts = Counter((n.input[0], n.attribute[0].i) for n in casts)
        assert set(counts.values()) <= {1}
        cast = {n.input[0] for n in casts}
        if precision == "bf16":
            exceptions = ("stem.", "norm", "conv_dw", "downsample", ".t_", ".a_")
            assert not [w for w in cast if not any(e in w for e in exceptions)]
        else:
            assert cast == weights


# --- the range of float16 ----------------------------------------------------------------------------------


class Stored:
    """Tensors in memory in the place of a checkpoint's."""

    def __init__(self, **tensors: np.ndarray) -> None:
        self._tensors = tensors

    def tensor(self, name: str, rows: tuple[int, int] | None = None) -> ir.Tensor:
        assert rows is None
        return ir.tensor(self._tensors[name.replace(".", "_")], name=name)

    def packed(self, name: str, rows: tuple[int, int] | None = None) -> None:
        """Nothing here is quantised."""


def run_block(folder: Path, x: np.ndarray, write: Callable, stored: Stored | None = None) -> list[np.ndarray]:
    """write(graph, value) in a float16 graph: by ONNX Runtime, and with a rounding after every node."""
    g = GraphWriter("g", stored or Stored(), ir.DataType.FLOAT16)
    shape = list(x.shape)
    g.output("y", write(g, g.input("x", ir.DataType.FLOAT16, shape)), ir.DataType.FLOAT16, ["n"] * x.ndim)
    ir.save(g.model(), folder / "g.onnx")
    session = onnxruntime.InferenceSession(str(folder / "g.onnx"), providers=["CPUExecutionProvider"])
    return [session.run(["y"], {"x": x})[0], RoundedGraph(folder / "g.onnx")({"x": x.astype(np.float32)})["y"]]


@pytest.mark.parametrize("size", [1e3, 6e4])
def test_layer_norm_of_values_whose_squares_overflow(size: float, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = (size * random.uniform(-1, 1, size=(5, 3072))).astype(np.float16)
    weight, bias = (random.normal(size=3072).astype(np.float16) for _ in range(2))
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5) * weight + bias
    stored = Stored(n_weight=weight, n_bias=bias)
    for y in run_block(tmp_path, x, lambda g, v: g.layer_norm(v, "n", 1e-5), stored):
        np.testing.assert_allclose(y, expected, atol=1e-3, rtol=1e-3)


def test_rms_norm_of_values_whose_squares_overflow(tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(-6e4, 6e4, size=(5, 64)).astype(np.float16)
    wide = x.astype(np.float64)
    stored = Stored(n_weight=np.full(64, 0.5, np.float16))
    for y in run_block(tmp_path, x, lambda g, v: g.rms_norm(v, "n", 1e-6), stored):
        np.testing.assert_allclose(y, 0.5 * wide / np.sqrt((wide**2).mean(1, keepdims=True)), rtol=2e-3)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh"])
def test_gelu_is_right_to_the_last_bit_but_one(kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    x = np.concatenate([np.linspace(-3.5, 10, 500), [-6e4, -50, 50, 6e4]])[None].astype(np.float16)
    mode = "tanh" if kind == "gelu_tanh" else "none"
    expected = torch.nn.functional.gelu(torch.from_numpy(x).double(), approximate=mode).numpy()
    for y in run_block(tmp_path, x, lambda g, v: getattr(g, kind)(v)):
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-6)


def test_means_of_values_whose_sum_overflows(tmp_path: Path) -> None:
    x = np.full((1, 2, 4, 4), 6e4, dtype=np.float16)
    for y in run_block(tmp_path, x, lambda g, v: g.average_pool(v, 2)):
        np.testing.assert_array_equal(y.astype(np.float32), np.float16(6e4))


def test_attention_scores_beyond_the_range_stay_finite(tmp_path: Path) -> None:
    """As float16 they would be infinite, and their softmax not a number."""
    pytest.importorskip("safetensors.numpy")
    found = RoundedGolden(with_large_biases(tmp_path), "fp16", tmp_path).logits()
    assert np.isfinite(found).all()


# --- how far from float32 ----------------------------------------------------------------------------------


ONE_ROW = [g for g in goldens() if g.rows == 1 and (g.inputs["input_ids"] == -200).any()]


def torch_in_half(golden: Golden, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Slow tokens and logits of the PyTorch model in half precision."""
    import torch
    from transformers import AutoModelForCausalLM

    import sfexport.model  # noqa: F401  registers the Auto classes

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    model = AutoModelForCausalLM.from_pretrained(golden.path, dtype=dtype).eval()
    images = [torch.from_numpy(golden.pixels(0))]
    with torch.inference_mode():
        slow = model.model.encode_videos(images).slow[0]
        logits = model(input_ids=torch.from_numpy(golden.inputs["input_ids"]), images=images).logits[0]
    return slow.float().numpy(), logits.float().numpy()


@each_half
@pytest.mark.parametrize("golden", ONE_ROW, ids=lambda g: g.name)
def test_the_error_is_that_of_torch_in_the_same_precision(golden: Golden, precision: str, tmp_path: Path) -> None:
    """Within a factor of two of it, above and below: a graph that were not half precision would be far below."""
    pytest.importorskip("torch")
    want = golden.outputs["slow_tokens_0"], golden.outputs["prefill_logits"][0]
    rounded = RoundedGolden(golden, precision, tmp_path)
    ours = rounded.slow().reshape(want[0].shape), rounded.logits()
    for found, theirs, exact in zip(ours, torch_in_half(golden, precision), want, strict=True):
        ours_off, torch_off = (np.abs(x.astype(np.float64) - exact) for x in (found, theirs))
        assert 0.5 < np.sqrt((ours_off**2).mean() / (torch_off**2).mean()) < 2
        assert ours_off.max() < 2 * torch_off.max()
        scale = np.abs(exact).max()
        bound = Tolerance.for_precision(precision)
        assert ours_off.max() <= bound.atol + bound.rtol * scale


# --- engines -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    """The demo model, whose weights are bfloat16, in ONNX Runtime."""
    folder, made = tmp_path_factory.mktemp("shipped"), {}
    for precision in ("fp32", "fp16"):
        bundle = export(Checkpoint.open(SHIPPED), folder / f"b-{precision}", ExportOptions(precision=precision))
        made[precision] = Pipeline.load(build(bundle, folder / precision, "onnxruntime").path)
    return made


def test_float16_engines_give_the_same_answers(shipped: dict[str, Pipeline], tmp_path: Path) -> None:
    asked = 0
    for index in range(3):
        clip = tmp_path / f"{index}.mp4"
        write_frames(clip, video_frames(4243, index), FPS, (SIZE * UPSCALE, SIZE * UPSCALE))
        sessions = [pipeline.encode(clip) for pipeline in shipped.values()]
        for question in make_scene(4243, index).questions():
            for mode in DecodeMode:
                options = shipped["fp32"].generation_options().greedy()
                wide, half = (session.ask(question.text, options, mode).ids for session in sessions)
                assert wide == half, (index, question.text, mode)
                asked += 1
    assert asked >= 30


def test_a_float16_backend_keeps_its_own_type_inside_and_float32_outside(shipped: dict[str, Pipeline]) -> None:
    backend: Backend = shipped["fp16"].backend
    size = shipped["fp16"].bundle.image.crop
    slow = backend.encode_frames(np.random.default_rng(0).normal(size=(4, 3, size, size)).astype(np.float32), False)
    fast, key_values = backend.compress(slow)
    assert isinstance(key_values, KeyValues)
    logits, past = backend.decode(DecoderStep(fast[None], np.ones(len(fast), bool), slow=key_values))
    assert {slow.dtype, fast.dtype, logits.dtype} == {np.dtype(np.float32)}
    assert {a.dtype for kv in (key_values, past) for a in backend.to_numpy(kv)} == {np.dtype(np.float16)}
    wide = backend.from_numpy([a.astype(np.float32) for a in backend.to_numpy(past)])
    step, again = (DecoderStep(fast[None, :1], np.ones(1, bool), kv, slow=key_values) for kv in (past, wide))
    np.testing.assert_array_equal(backend.decode(step)[0], backend.decode(again)[0])


@each_kind
def test_every_kind_runs_in_float16(kind: str, make: Callable, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    engines = build(make(kind, "fp16"), tmp_path / "engines", "onnxruntime")
    for frames in (1, 8):
        report = run_parity(Pipeline.load(engines.path), None, frames=frames, max_new_tokens=4)
        assert all(c.passed for c in report.comparisons), report.comparisons


def test_parity_states_the_tolerance_of_the_precision(shipped: dict[str, Pipeline]) -> None:
    """Which is wide enough for float16, as float32's is not."""
    pytest.importorskip("torch")
    report = run_parity(shipped["fp16"], None, frames=4, max_new_tokens=2)
    assert report.tolerance == Tolerance.for_precision("fp16")
    assert report.to_json()["tolerance"]["precision"] == "fp16"
    assert "fp16" in str(report.tolerance)
    assert all(c.passed for c in report.comparisons)
    strict = run_parity(shipped["fp16"], None, frames=4, max_new_tokens=2, tolerance=Tolerance())
    assert not strict.passed


def test_a_given_tolerance_replaces_its_part_only() -> None:
    usual, changed = (Tolerance.for_precision("bf16", **given) for given in ({}, {"atol": 0.5}))
    assert asdict(changed) == {**asdict(usual), "atol": 0.5}


def test_onnxruntime_refuses_bfloat16_and_says_what_to_do(make: Callable, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        build(make("convnext", "bf16"), tmp_path / "engines", "onnxruntime")
    assert_says(caught.value.paragraph(), "bf16", "--precision fp16", "tensorrt")
    assert not (tmp_path / "engines").exists()
    check_precision("fp16")


def decoder_feeds(bundle: Bundle, session: onnxruntime.InferenceSession, batch: int, past: int, slow: int) -> dict:
    random, text, sequence = np.random.default_rng(0), bundle.config.text, 3
    sizes = {"batch": batch, "videos": batch, "sequence": sequence, "prefix": 2, "capacity": past, "slow": slow}
    feeds = {}
    for value in session.get_inputs():
        shape = [sizes.get(size, size) for size in value.shape]
        if "float" in value.type:
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            # float16 numbers in both graphs, so that they are asked the same
            feeds[value.name] = random.normal(size=shape).astype(np.float16).astype(dtype)
    feeds[names.POSITIONS] = np.tile(np.arange(2 + past, 2 + past + sequence), (batch, 1))
    feeds[names.MASK] = np.ones((batch, sequence), bool)
    feeds[names.PAST_LENGTHS] = np.full(batch, past)
    feeds[names.MASK][1:2] = False  # a row of nothing but padding
    feeds[names.SLOW_ATTENDS] = np.tile([True, False, True], (batch, 1))
    feeds[names.SLOW_LENGTHS] = np.arange(batch) * (slow > 0)
    assert feeds[names.EMBEDS].shape[2] == text.hidden_size
    return feeds


@pytest.mark.parametrize(("batch", "past", "slow"), [(3, 5, 7), (1, 0, 9), (2, 0, 0), (1, 2, 0)])
def test_padding_and_missing_slow_tokens_in_float16(batch: int, past: int, slow: int, make: Callable) -> None:
    found = []
    for precision in ("fp32", "fp16"):
        bundle = make("convnext", precision)
        session = onnxruntime.InferenceSession(str(bundle.graph_file("decoder")), providers=["CPUExecutionProvider"])
        outputs = [names.LOGITS, *names.new_names(bundle.config)]
        found.append(session.run(outputs, decoder_feeds(bundle, session, batch, past, slow)))
    for wide, half in zip(*found, strict=True):
        assert np.isfinite(half).all()
        np.testing.assert_allclose(half, wide, atol=1e-2 * np.abs(wide).max())
