"""Bundles with INT4 weights and with the head in pieces: the files, what ONNX Runtime and TensorRT's parser make of
them, the answers, and the refusals."""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import assert_says, edit_json, snapshot, split_shard
from quantized import FILE, ORT, as_dtype, assert_same, exactly, optimized, run, stored_weights, with_weights_of

from sfexport.artifacts.bundle import GRAPHS, Bundle
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.comparing import run as parity
from sfexport.comparing.run import run_parity
from sfexport.demo.clip import write_frames
from sfexport.demo.scenes import FPS, SIZE, UPSCALE, make_scene, video_frames
from sfexport.demo.shipped import SHIPPED
from sfexport.dtypes import PRECISIONS, Precision
from sfexport.engines.build import build
from sfexport.engines.tensorrt.parser_support import check_graph, support_for
from sfexport.errors import BundleError, CheckpointError, InputError
from sfexport.exporting import export as bundle_module
from sfexport.exporting import weights_file
from sfexport.exporting.dequantize import RoundedMatrix, rounded_matrices
from sfexport.exporting.export import ExportOptions, export
from sfexport.qa.pipeline import Pipeline
from sfexport.testing.random_checkpoint import write_random_checkpoint

LINEAR = 7  # per decoder layer
CLIPS = 40

KINDS: dict[str, dict] = {
    "blocks of 64 and 128": {},
    "a width that 64 does not divide": {"intermediate_size": 96},
    "tied embeddings": {"tie_word_embeddings": True},
    "no slow branch": {"cross_attn_every_n_layers": None},
}
Make = Callable[..., Bundle]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A bundle of a kind of random checkpoint, or of the shipped one; made once for the same arguments."""
    folder, made = tmp_path_factory.mktemp("quantize"), {}

    def bundle(kind: str = "blocks of 64 and 128", **options: object) -> Bundle:
        checkpoint = SHIPPED if kind == "shipped" else folder / kind
        if not checkpoint.exists():
            write_random_checkpoint(checkpoint, changes=KINDS[kind])
        key = (kind, *sorted(options.items()))
        if key not in made:
            given = ExportOptions(**options)
            made[key] = export(Checkpoint.open(checkpoint), folder / f"bundle-{len(made)}", given)
        return made[key]

    return bundle


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", [*KINDS, "shipped"])
def test_the_file_holds_the_weights_as_closely_as_the_manifest_says(kind: str, precision: str, make: Make) -> None:
    bundle = make(kind, quantize="int4", precision=precision)
    checkpoint = Checkpoint.open(bundle.checkpoint_path)
    about = bundle.quantization
    for name, stated in about["matrices"].items():
        weights = checkpoint.tensors[name].rows()
        off = stored_weights(bundle, name) - weights
        found = math.sqrt((off**2).sum() / (weights**2).sum())
        assert found == pytest.approx(stated["error"], rel=1e-3)
        assert stated["error"] <= stated["plain_error"]
        assert found < (0.13 if stated["kind"] == "int4" else 0.012)
    assert about["int4"]["error"] < 0.9 * about["int4"]["plain_error"]


def test_only_the_layers_linear_weights_and_the_head_are_rounded(make: Make) -> None:
    bundle = make("a width that 64 does not divide", quantize="int4")
    checkpoint = Checkpoint.open(bundle.checkpoint_path)
    rounded = bundle.quantization["matrices"]
    kinds = Counter(name.split(".")[-2] for name in rounded)
    four = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 4)
    assert kinds == four | {"lm_head": 1}, "down_proj has 96 inputs: no whole block"
    header, data = split_shard(bundle.path / FILE)
    for name in checkpoint.expected_tensors():
        place = checkpoint.tensors[name]
        if name in rounded:
            assert name not in header
            continue
        begin, end = header[name]["data_offsets"]
        with place.shard.open("rb") as shard:
            shard.seek(place.offset)
            assert data[begin:end] == shard.read(place.length), f"{name} is left alone"


def test_the_bundle_needs_no_checkpoint(make: Make, tmp_path: Path) -> None:
    made = make(quantize="int4")
    moved = Path(shutil.copytree(made.path, tmp_path / "moved"))
    bundle = Bundle.open(moved)
    assert bundle.weights_directory == moved.resolve()
    for name in GRAPHS:
        onnx.checker.check_model(str(bundle.graph_file(name)), full_check=True)
        session = onnxruntime.InferenceSession(str(bundle.graph_file(name)), providers=["CPUExecutionProvider"])
        assert session.get_inputs()
    assert Path(made.checkpoint_path).name != made.path.name, "PyTorch compares with the checkpoint"


def test_the_file_is_whole_and_aligned_safetensors(make: Make) -> None:
    safetensors = pytest.importorskip("safetensors")
    bundle = make(quantize="int4", precision="fp16")
    with safetensors.safe_open(bundle.path / FILE, framework="numpy") as file:
        assert file.get_slice("model.layers.0.mlp.down_proj.weight.int4").get_shape() == [128, 32]
    width = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2}
    header, data = split_shard(bundle.path / FILE)
    header.pop("__metadata__")
    assert all(entry["data_offsets"][0] % width[entry["dtype"]] == 0 for entry in header.values())
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(data)


def test_the_same_checkpoint_gives_the_same_file(make: Make, tmp_path: Path) -> None:
    made = make(quantize="int4")
    again = export(Checkpoint.open(made.checkpoint_path), tmp_path / "again", ExportOptions(quantize="int4"))
    assert (made.path / FILE).read_bytes() == (again.path / FILE).read_bytes()


def test_weights_stored_in_float32_give_the_same_codes(make: Make, tmp_path: Path) -> None:
    made = make(quantize="int4")
    wide = as_dtype(made.checkpoint_path, tmp_path / "wide", "F32")
    bundle = export(Checkpoint.open(wide), tmp_path / "bundle", ExportOptions(quantize="int4"))
    for name in made.quantization["matrices"]:
        assert (stored_weights(bundle, name) == stored_weights(made, name)).all()


@pytest.mark.parametrize(("precision", "kept"), [("fp32", "F16"), ("fp16", "F16"), ("bf16", "BF16")])
def test_a_head_in_16_bits_is_narrowed_only_where_it_is_wider(
    precision: str, kept: str, make: Make, tmp_path: Path
) -> None:
    options = {"quantize": "int4", "lm_head": "fp16", "precision": precision}
    made = make(**options)
    assert split_shard(made.path / FILE)[0]["lm_head.weight"]["dtype"] == "BF16", "as it is stored"
    wide = as_dtype(made.checkpoint_path, tmp_path / "wide", "F32")
    bundle = export(Checkpoint.open(wide), tmp_path / "bundle", ExportOptions(**options))
    assert split_shard(bundle.path / FILE)[0]["lm_head.weight"]["dtype"] == kept
    assert bundle.quantization["int8"]["weights"] == 0


def test_weight_bytes_count_integers_as_stored(make: Make) -> None:
    plain, quantized = make(weights="copy"), make(quantize="int4")
    body = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    vocabulary = quantized.config.text.vocab_size
    scales = body // 64 - 4 * 64 + vocabulary  # down_proj alone has blocks of 128: 64 scales fewer per layer
    assert quantized.quantization["int4"]["weights"] == body
    difference = 4 * (body + vocabulary * 64) - body // 2 - vocabulary * 64 - 4 * scales
    assert plain.weight_bytes(4) - quantized.weight_bytes(4) == difference


def test_a_manifest_with_an_unknown_quantization_is_damaged(make: Make, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(make(quantize="int4").path, tmp_path / "bundle"))
    edit_json(copy / "sfexport.json", lambda content: content["quantization"].update(method="int3"))
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy)
    assert_says(caught.value.paragraph(), "damaged", "'int3'")


# --- runtimes ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(ORT < (1, 25), reason="ONNX Runtime fuses INT8 weights from 1.25 on")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("options", "head"), [({}, 1), ({"split_lm_head": 3}, 3), ({"lm_head": "fp16"}, 0)])
def test_onnxruntime_makes_every_rounded_matrix_one_fused_product(
    precision: str, options: dict, head: int, make: Make, tmp_path: Path
) -> None:
    found = optimized(make("shipped", quantize="int4", precision=precision, **options), tmp_path)
    assert found["MatMulNBits"] == 4 * LINEAR + head
    assert found["DequantizeLinear"] == 0


@pytest.mark.parametrize("tensorrt", ["10.3", "10.16", "11.4"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", [{}, {"split_lm_head": 3}, {"lm_head": "fp16", "split_lm_head": 2}])
def test_tensorrts_parser_takes_every_node(tensorrt: str, precision: str, options: dict, make: Make) -> None:
    bundle = make("shipped", quantize="int4", precision=precision, **options)
    support = support_for(tensorrt)
    for name in GRAPHS:
        model = onnx.load(bundle.graph_file(name), load_external_data=False)
        assert check_graph(model, name, support) == []
    decoder = onnx.load(bundle.graph_file("decoder"), load_external_data=False)
    rounded = [node for node in decoder.graph.node if node.op_type == "DequantizeLinear"]
    assert len(rounded) >= 4 * LINEAR
    assert all(len(node.input) == 2 for node in rounded), "symmetric: no zero point"


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_computes_what_the_file_holds(
    kind: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the ordinary graph of a checkpoint whose weights are the dequantised ones."""
    exactly(monkeypatch)
    bundle = make(kind, quantize="int4", lm_head="fp16")
    rounded = with_weights_of(bundle, bundle.checkpoint_path, tmp_path / "rounded")
    assert_same(run(bundle), run(export(Checkpoint.open(rounded), tmp_path / "bundle", ExportOptions(weights="copy"))))


@pytest.mark.parametrize("kind", [*KINDS, "shipped"])
def test_logits_stay_close_to_float32(kind: str, make: Make) -> None:
    """With the fusions, whose products round the activations to 8 bits too. Random weights suffer most."""
    wanted, found = (run(make(kind, **o)).logits for o in ({"weights": "copy"}, {"quantize": "int4"}))
    cosine = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosine.min() > 0.9


def answers(bundle: Bundle, folder: Path, clips: int) -> list[bool]:
    """Whether the model answers each question of some held-out clips."""
    pipeline = Pipeline.load(build(bundle, folder / "engines", "onnxruntime").path)
    options, right = pipeline.generation_options().greedy(), []
    for index in range(clips):
        clip = folder / "clip.mp4"
        write_frames(clip, video_frames(4242, index), FPS, (SIZE * UPSCALE, SIZE * UPSCALE))
        session = pipeline.encode(clip)
        questions = make_scene(4242, index).questions()
        found = session.ask_many([q.text for q in questions], options)
        right += [answer.answer == q.answer for answer, q in zip(found, questions, strict=True)]
    return right


@pytest.fixture(scope="module")
def float32_answers(make: Make, tmp_path_factory: pytest.TempPathFactory) -> list[bool]:
    return answers(make("shipped", weights="copy"), tmp_path_factory.mktemp("float32"), CLIPS)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_shipped_model_answers_as_well_in_int4(
    precision: str, make: Make, float32_answers: list[bool], tmp_path: Path
) -> None:
    """Some 600 questions; the figures proper are in docs/benchmarks/quantization.md."""
    right = answers(make("shipped", quantize="int4", precision=precision), tmp_path, CLIPS)
    assert len(right) == len(float32_answers) > 500
    assert abs(np.mean(right) - np.mean(float32_answers)) < 0.02


# --- parity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("shipped", {}),
        ("shipped", {"split_lm_head": 3}),
        ("shipped", {"precision": "fp16", "lm_head": "fp16"}),
        ("tied embeddings", {}),
        ("no slow branch", {}),
    ],
)
def test_parity_is_with_the_rounded_weights(kind: str, options: dict, make: Make, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="parity compares with PyTorch, which is not installed")
    bundle = make(kind, quantize="int4", **options)
    pipeline = Pipeline.load(build(bundle, tmp_path / "engines", "onnxruntime").path)
    report = run_parity(pipeline, None, frames=8, max_new_tokens=4)
    assert all(c.passed for c in report.comparisons), report.comparisons
    logits = next(c for c in report.comparisons if c.name == "prefill logits")
    assert logits.max_rel < 0.5 * report.rounding.max_rel, "nearer to the rounded weights than these to the others"
    assert report.to_json()["rounding"]["cosine"] < 1


def test_parity_notices_other_rounded_weights(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="parity compares with PyTorch, which is not installed")
    bundle = make("shipped", quantize="int4")
    pipeline = Pipeline.load(build(bundle, tmp_path / "engines", "onnxruntime").path)

    def turned(bundle: Bundle) -> Iterator[RoundedMatrix]:
        for matrix in rounded_matrices(bundle):
            wrong = "layers.1.mlp.up_proj" in matrix.name
            yield replace(matrix, weights=np.roll(matrix.weights, 1, axis=0)) if wrong else matrix

    monkeypatch.setattr(parity, "rounded_matrices", turned)
    assert not run_parity(pipeline, None, frames=8, max_new_tokens=2).passed


@pytest.mark.parametrize("options", [{}, {"split_lm_head": 2}, {"lm_head": "fp16", "precision": "bf16"}])
def test_rounded_matrices_are_what_the_file_holds(options: dict, make: Make) -> None:
    bundle = make("shipped", quantize="int4", **options)
    parts = list(bundle.quantization["matrices"])
    for part, matrix in zip(parts, rounded_matrices(bundle), strict=True):
        np.testing.assert_array_equal(matrix.weights, stored_weights(bundle, part))
        assert part.startswith(matrix.name) and (f"[{matrix.first}:" in part or matrix.first == 0)


# --- the head in pieces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("kind", ["shipped", "tied embeddings"])
def test_a_head_in_pieces_gives_the_same_logits(kind: str, parts: int, make: Make) -> None:
    whole, pieces = run(make(kind, weights="copy")), run(make(kind, weights="copy", split_lm_head=parts))
    np.testing.assert_allclose(pieces.logits, whole.logits, rtol=1e-5, atol=1e-5)


def test_an_int8_head_in_pieces_gives_the_same_logits(make: Make) -> None:
    options = {"kind": "shipped", "quantize": "int4"}
    whole, pieces = run(make(**options)), run(make(**options, split_lm_head=3))
    np.testing.assert_allclose(pieces.logits, whole.logits, rtol=1e-5, atol=1e-5)


def test_pieces_point_at_runs_of_rows_in_the_shard(make: Make) -> None:
    bundle = make("shipped", weights="reference", split_lm_head=3)
    place = Checkpoint.open(SHIPPED).tensors["lm_head.weight"]
    model = onnx.load(bundle.graph_file("decoder"), load_external_data=False)
    pieces = [t for t in model.graph.initializer if t.name.startswith("lm_head.weight")]
    entries = [{e.key: e.value for e in piece.external_data} for piece in pieces]
    spans = [(int(e["offset"]), int(e["offset"]) + int(e["length"])) for e in entries]
    assert [first for first, _ in spans] == [place.offset, *(last for _, last in spans[:-1])]
    assert spans[-1][1] == place.offset + place.length
    assert [piece.dims[0] for piece in pieces] == [192, 192, 256], "at multiples of 64"
    assert {e["location"] for e in entries} == {place.shard.name}


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantize": "int3"}, ["'int3'", "int4"]),
        ({"quantize": "int4", "lm_head": "int2"}, ["'int2'", "int8, fp16"]),
        ({"lm_head": "int8"}, ["--lm-head", "--quantize int4"]),
        ({"quantize": "int4", "weights": "reference"}, ["4 bits", "--weights reference"]),
        ({"split_lm_head": 0}, ["--split-lm-head", "at least 1", "0"]),
    ],
)
def test_options_without_meaning_are_refused(options: dict, says: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        ExportOptions(**options)
    assert_says(caught.value.paragraph(), *says)


def test_more_pieces_than_rows_are_refused(tree, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        export(Checkpoint.open(tree.checkpoint), tmp_path / "bundle", ExportOptions(split_lm_head=5000))
    assert_says(caught.value.paragraph(), "--split-lm-head 5000", "rows")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80])
def test_a_weight_that_is_no_number_is_named(name: str, bits: int, tree_copy, tmp_path: Path) -> None:
    place = Checkpoint.open(tree_copy.checkpoint).tensors[name]
    with place.shard.open("r+b") as shard:
        shard.seek(place.offset + place.length - 2)
        shard.write(bits.to_bytes(2, "little"))
    with pytest.raises(CheckpointError) as caught:
        export(Checkpoint.open(tree_copy.checkpoint), tmp_path / "out" / "bundle", ExportOptions(quantize="int4"))
    assert_says(caught.value.paragraph(), f"'{name}'", place.shard.name, "not finite")
    assert not (tmp_path / "out").exists()


def test_weights_too_large_for_float16_scales_are_named(tree_copy, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.gate_proj.weight"
    place = Checkpoint.open(tree_copy.checkpoint).tensors[name]
    with place.shard.open("r+b") as shard:
        shard.seek(place.offset)
        shard.write(Precision.BF16.from_float32(np.float32([1e7])).tobytes())
    options = ExportOptions(quantize="int4", precision="fp16")
    with pytest.raises(CheckpointError) as caught:
        export(Checkpoint.open(tree_copy.checkpoint), tmp_path / "bundle", options)
    assert_says(caught.value.paragraph(), f"'{name}'", "F16")


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(bundle_module.shutil, "disk_usage", lambda path: usage(1000))
    monkeypatch.setattr(bundle_module, "write_weights", lambda *args: pytest.fail("it began to write"))
    with pytest.raises(InputError) as caught:
        export(Checkpoint.open(tree.checkpoint), tmp_path / "bundle", ExportOptions(quantize="int4"))
    assert_says(caught.value.paragraph(), "has 1.0 kB free", tmp_path)
    assert snapshot(tmp_path) == {}


def test_an_interrupted_quantisation_leaves_nothing_and_can_be_repeated(
    tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, inner = [], weights_file.pack_int4

    def interrupted(codes: np.ndarray) -> np.ndarray:
        calls.append(codes)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return inner(codes)

    checkpoint, options = Checkpoint.open(tree.checkpoint), ExportOptions(quantize="int4")
    with monkeypatch.context() as patch:
        patch.setattr(weights_file, "pack_int4", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint, tmp_path / "bundle", options)
    assert len(calls) >= 10
    assert snapshot(tmp_path) == {}
    assert export(checkpoint, tmp_path / "bundle", options).quantization["int4"]["weights"] > 0


@pytest.mark.parametrize(("number", "left"), [(signal.SIGTERM, 0), (signal.SIGKILL, 1)])
def test_a_killed_quantisation_leaves_no_bundle_and_the_next_one_cleans_up(
    number: signal.Signals, left: int, tree, tmp_path: Path
) -> None:
    """In a process of its own, stopped where it has written half of the weights."""
    place = tmp_path / "made"
    arguments = ["export", str(tree.checkpoint), "-o", str(place / "bundle"), "--quantize", "int4"]
    code = "import os, sys; from sfexport.exporting import weights_file; from sfexport.cli import main; calls = []\n"
    code += "inner = weights_file.pack_int4\n"
    code += "def stop(codes):\n    calls.append(0)\n"
    code += f"    if len(calls) == 10: os.kill(os.getpid(), {int(number)})\n    return inner(codes)\n"
    code += f"weights_file.pack_int4 = stop; main({arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode in (-number, 128 + number), done.stderr
    assert "Traceback" not in done.stderr
    hidden = list(place.iterdir()) if place.exists() else []
    assert len(hidden) == left and all(directory.name.startswith(".bundle.") for directory in hidden)
    bundle = export(Checkpoint.open(tree.checkpoint), place / "bundle", ExportOptions(quantize="int4"))
    assert bundle.quantization["int4"]["weights"] > 0
    assert [path.name for path in place.iterdir()] == ["bundle"]
