"""The decoder in the form for TensorRT: the same function as the bundle's own, as exact in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import rounding
from golden_data import Golden, goldens
from onnx import helper, inliner
from rounding import RoundedGolden, RoundedGraph, with_large_biases
from sessions import model_session
from text_cache import TextCache

from sfexport.artifacts.bundle import Bundle
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.comparing.compare import Tolerance
from sfexport.demo.shipped import SHIPPED
from sfexport.dtypes import Precision
from sfexport.engines.tensorrt.graph_file import tensorrt_graph
from sfexport.exporting.export import ExportOptions, export
from sfexport.graphs import names
from sfexport.graphs.decoder import build_decoder
from sfexport.graphs.initializers import Weights
from sfexport.testing.random_checkpoint import write_random_checkpoint

ONE_ROW = [g for g in goldens() if g.rows == 1 and (g.inputs["input_ids"] == -200).any()]
OPTIONS = {
    "fp32": ExportOptions(),
    "fp16": ExportOptions(precision="fp16"),
    "bf16": ExportOptions(precision="bf16"),
    "int4": ExportOptions(precision="fp16", quantize="int4"),
    "int4, head in parts": ExportOptions(precision="bf16", quantize="int4", split_lm_head=3),
    "int4, head in 16 bits": ExportOptions(quantize="int4", lm_head="fp16", split_lm_head=2),
    "int4, head in 4 bits": ExportOptions(quantize="int4", lm_head="int4"),
    "head in parts": ExportOptions(split_lm_head=3),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    folder, made = tmp_path_factory.mktemp("form"), dict[str, Bundle]()

    def bundle(kind: str) -> Bundle:
        if kind not in made:
            made[kind] = export(Checkpoint.open(SHIPPED), folder / kind, OPTIONS[kind])
        return made[kind]

    return bundle


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_graph_gives_back_the_weights_that_it_was_written_from(kind: str, make: Callable) -> None:
    bundle = make(kind)
    file = bundle.graph_file("decoder")
    weights = Weights.of_graph(onnx.load(file, load_external_data=False), bundle.weights_directory)
    parts = bundle.content["options"]["split_lm_head"]
    again = build_decoder(bundle.config, weights, Precision(bundle.precision).onnx, parts)
    assert ir.to_proto(again).SerializeToString() == file.read_bytes()


def test_a_tied_head_and_a_model_without_slow_branch(tmp_path: Path) -> None:
    changes = {"cross_attn_every_n_layers": None, "tie_word_embeddings": True}
    write_random_checkpoint(tmp_path / "checkpoint", changes=changes)
    options = ExportOptions(precision="fp16", quantize="int4")
    bundle = export(Checkpoint.open(tmp_path / "checkpoint"), tmp_path / "bundle", options)
    lines: list[str] = []
    model = tensorrt_graph(bundle, "decoder", lines.append)
    assert names.BEST_TOKENS in [o.name for o in model.graph.output] and not lines


def test_a_decoder_that_was_edited_is_built_as_it_is(tmp_path: Path) -> None:
    bundle = export(Checkpoint.open(SHIPPED), tmp_path / "bundle", ExportOptions(precision="fp16"))
    model = onnx.load(bundle.graph_file("decoder"), load_external_data=False)
    model.graph.node.append(helper.make_node("Identity", ["logits"], ["mine"], name="mine"))
    onnx.save(model, bundle.graph_file("decoder"))
    lines: list[str] = []
    assert tensorrt_graph(bundle, "decoder", lines.append).graph.node[-1].name == "mine"
    assert len(lines) == 1 and "is built as it is" in lines[0]
    # Also where its weights are no longer those of a decoder.
    del model.graph.initializer[:]
    onnx.save(model, bundle.graph_file("decoder"))
    assert not tensorrt_graph(bundle, "decoder", lines.append).graph.initializer and len(lines) == 2


class Steps:
    """Random steps of a decoder: a prefix, rows with pasts of their own, and slow tokens, all at once."""

    def __init__(self, bundle: Bundle, rows: int, videos: int, sequence: int, seed: int = 0) -> None:
        config, rng = bundle.config, np.random.default_rng(seed)
        text, width = config.text, Precision(bundle.precision).numpy
        prefix, capacity, slow = 7, 5, 11

        def numbers(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32).astype(width)

        lengths = rng.integers(0, capacity + 1, rows)
        self.feeds = {
            names.EMBEDS: numbers(rows, sequence, text.hidden_size),
            names.POSITIONS: prefix + lengths[:, None] + np.arange(sequence),
            names.MASK: np.ones((rows, sequence), bool),
            names.PAST_LENGTHS: lengths,
            names.SLOW_ATTENDS: rng.integers(0, 2, (rows, sequence)).astype(bool),
            names.SLOW_LENGTHS: rng.integers(1, slow + 1, videos),
        }
        for group, count, length in (
            (names.prefix_names(config), 1, prefix),
            (names.past_names(config), rows, capacity),
            (names.slow_names(config), videos, slow),
        ):
            self.feeds |= {name: numbers(count, text.num_kv_heads, length, text.head_dim) for name in group}


def run(bundle: Bundle, model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    # Node by node: its INT4 product rounds activations in its own way.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = model_session(model, bundle.weights_directory, options)
    outputs = [o.name for o in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, feeds), strict=True))


@pytest.mark.parametrize("kind", [k for k in OPTIONS if "bf16" not in k and k != "int4, head in parts"])
@pytest.mark.parametrize(("rows", "videos", "sequence"), [(1, 1, 1), (1, 1, 6), (3, 1, 1), (2, 2, 4), (4, 1, 3)])
def test_it_computes_what_the_bundles_own_computes(
    kind: str, rows: int, videos: int, sequence: int, make: Callable
) -> None:
    bundle = make(kind)
    feeds = Steps(bundle, rows, videos, sequence).feeds
    own = run(bundle, onnx.load(bundle.graph_file("decoder"), load_external_data=False), feeds)
    found = run(bundle, tensorrt_graph(bundle, "decoder"), feeds)
    bound = Tolerance.for_precision(bundle.precision)
    for name, value in own.items():
        scale = np.abs(value.astype(np.float32)).max()
        np.testing.assert_allclose(
            found[name].astype(np.float32),
            value.astype(np.float32),
            rtol=0,
            atol=bound.atol + bound.rtol * scale,
            err_msg=name,
        )
    np.testing.assert_array_equal(found[names.BEST_TOKENS], found[names.LOGITS].argmax(1))
    assert np.isfinite(found[names.LOGIT_SUMS]).all()


def test_a_logit_that_is_no_number_shows_in_the_sums(make: Callable) -> None:
    bundle = make("fp32")
    feeds = Steps(bundle, 2, 1, 1).feeds
    feeds[names.EMBEDS][1] = np.nan
    sums = run(bundle, tensorrt_graph(bundle, "decoder"), feeds)[names.LOGIT_SUMS]
    assert np.isfinite(sums[0]) and not np.isfinite(sums[1])


def test_an_8_bit_head_has_one_scale_before_its_product_and_the_rest_behind(make: Callable) -> None:
    model = tensorrt_graph(make("int4"), "decoder")
    by_output = {o: node for node in model.graph.node for o in node.output}
    (head,) = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0].endswith(".int8")]
    scale = by_output[head.input[1]].input[0]
    (value,) = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == scale]
    mantissa, _ = np.frexp(value)
    assert value.shape == () and mantissa == 0.5 and value != 1


# --- how exact it is ---------------------------------------------------------------------------------------


@pytest.fixture
def unrounded() -> Iterator[set[str]]:
    """Names of values whose rounding is left out: a fused kernel does not round its scores."""
    kept, plain = set[str](), rounding._rounding

    def rounds(source: str, target: str, dtype: int) -> list[onnx.NodeProto]:
        return [helper.make_node("Identity", [source], [target])] if target in kept else plain(source, target, dtype)

    rounding._rounding = rounds
    yield kept
    rounding._rounding = plain


def scores_of(model: onnx.ModelProto) -> set[str]:
    """Name the products that a softmax is taken of."""
    nodes = inliner.inline_local_functions(model).graph.node
    by_output = {o: node for node in nodes for o in node.output}
    found = set()
    for node in nodes:
        if node.op_type == "Softmax":
            at = node
            while at.op_type != "MatMul":
                at = by_output[at.input[0]]
            found.add(at.output[0])
    return found


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("golden", ONE_ROW[:2], ids=lambda g: g.name)
def test_it_is_as_exact_as_the_bundles_own(golden: Golden, precision: str, unrounded: set[str], tmp_path: Path) -> None:
    """Root mean square error of all logits against PyTorch's in float32, every value as wide as the graph says."""
    run, exact = RoundedGolden(golden, precision, tmp_path), golden.outputs["prefill_logits"][0]
    own = run.logits() - exact
    model = tensorrt_graph(run.bundle, "decoder")
    onnx.save(model, run.bundle.path / "form.onnx")
    scores = scores_of(model)
    assert len(scores) == run.config.text.num_layers + len(run.config.slow_fast.hybrid_layers)
    for fused in (False, True):
        unrounded |= scores if fused else set()
        run.decoder = RoundedGraph(run.bundle.path / "form.onnx")
        found = run.logits() - exact
        assert np.sqrt((found**2).mean() / (own**2).mean()) < 1.25
        bound = Tolerance.for_precision(precision)
        assert np.abs(found).max() <= bound.atol + bound.rtol * np.abs(exact).max()


def test_scores_beyond_float16s_range_stay_finite_where_nothing_is_fused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors.numpy")
    run = RoundedGolden(with_large_biases(tmp_path), "fp16", tmp_path)
    onnx.save(tensorrt_graph(run.bundle, "decoder"), run.bundle.path / "form.onnx")
    run.decoder = RoundedGraph(run.bundle.path / "form.onnx")
    assert np.isfinite(run.logits()).all()


def test_a_cache_in_chunks_gives_the_same_logits(make: Callable) -> None:
    """A prompt in pieces, each with what came before as its prefix."""
    bundle = make("fp32")
    feeds = Steps(bundle, 1, 1, 8).feeds
    model = tensorrt_graph(bundle, "decoder")
    empty = TextCache(bundle.config, 1).feeds()
    whole = run(bundle, model, feeds | empty | {names.POSITIONS: np.arange(8)[None]})
    cache = TextCache(bundle.config, 1)
    for at in (slice(0, 3), slice(3, 8)):
        part = {n: feeds[n][:, at] for n in (names.EMBEDS, names.MASK, names.SLOW_ATTENDS)}
        fixed = {n: feeds[n] for n in (names.SLOW_LENGTHS, *names.slow_names(bundle.config))}
        out = run(bundle, model, part | fixed | cache.feeds() | {names.POSITIONS: np.arange(8)[None, at]})
        cache.append(out, part[names.MASK])
    np.testing.assert_allclose(out[names.LOGITS], whole[names.LOGITS], atol=1e-4)
