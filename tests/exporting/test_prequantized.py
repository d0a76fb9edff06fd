"""Checkpoints that GPTQ or AWQ has rounded: kept code for code, or rounded again where TensorRT needs it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import assert_says, change_tensors, document, edit_json, sfexport, snapshot, split_shard, write_shard
from quantized import ORT, as_dtype, assert_same, exactly, optimized, run, stored_weights, with_weights_of

from sfexport.artifacts.bundle import Bundle
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.engines.tensorrt.parser_support import check_graph, support_for
from sfexport.errors import CheckpointError, InputError
from sfexport.exporting.export import ExportOptions, export
from sfexport.testing.random_checkpoint import write_random_checkpoint

BODY = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP = 64


def pack(codes: np.ndarray, columns: tuple[int, ...]) -> np.ndarray:
    """[n, 8 m] codes -> int32 [n, m]: 4 bits after the other hold the given columns of every eight."""
    out = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for i in range(out.shape[1]):
        for bit, column in enumerate(columns):
            out[:, i] |= codes[:, 8 * i + column].astype(np.uint32) << np.uint32(4 * bit)
    return out.view(np.int32)


def rounded(weights: np.ndarray, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [in, out], zero points and float16 scales [in / group, out] of weights [out, in]."""
    groups = weights.T.reshape(-1, GROUP, weights.shape[0])
    low, high = groups.min(1), groups.max(1)
    if symmetric:
        scales = (np.abs(groups).max(1) / 7).astype(np.float16)
        zeros = np.full(scales.shape, 8.0)
    else:
        scales = ((high - low) / 15).astype(np.float16)
        zeros = np.clip(np.rint(-low / scales), 0, 15)
    codes = np.clip(np.rint(groups / scales[:, None].astype(np.float32)) + zeros[:, None], 0, 15)
    return codes.reshape(weights.T.shape).astype(np.uint8), zeros.astype(np.uint8), scales


def tensors_of(method: str, weights: np.ndarray, symmetric: bool, offset: int) -> dict[str, np.ndarray]:
    codes, zeros, scales = rounded(weights, symmetric)
    in_order = tuple(range(8))
    if method == "awq":
        return {"qweight": pack(codes, AWQ_COLUMNS), "qzeros": pack(zeros, AWQ_COLUMNS), "scales": scales}
    groups = (np.arange(len(codes)) // GROUP).astype(np.int32)
    qweight = pack(np.ascontiguousarray(codes.T), in_order).T
    return {"qweight": qweight, "qzeros": pack(zeros - offset, in_order), "scales": scales, "g_idx": groups}


def quantized_checkpoint(source: Path, out: Path, method: str, symmetric: bool, **config: Any) -> Path:
    """A copy of a random checkpoint with its linear weights as GPTQ or AWQ store them."""
    shutil.copytree(source, out)
    offset = int(config.get("checkpoint_format") != "gptq_v2")
    names = {"float16": "F16", "int32": "I32", "uint16": "BF16"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for shard in out.glob("*.safetensors"):
        header, data = split_shard(shard)
        arrays: dict[str, np.ndarray] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if BODY.fullmatch(name):
                weights = Checkpoint.open(source).tensors[name].rows()
                made = tensors_of(method, weights, symmetric, offset)
                arrays |= {f"{name.removesuffix('weight')}{part}": array for part, array in made.items()}
            else:
                arrays[name] = np.frombuffer(data[begin:end], np.uint16).reshape(entry["shape"])
        new, chunks, at = {}, [], 0
        for name, array in arrays.items():
            chunk = np.ascontiguousarray(array).tobytes()
            dtype = names[str(array.dtype)]
            new[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + len(chunk)]}
            chunks.append(chunk)
            at += len(chunk)
        write_shard(shard, new, b"".join(chunks))
        index["weight_map"] = {n: s for n, s in index["weight_map"].items() if s != shard.name}
        index["weight_map"] |= dict.fromkeys(arrays, shard.name)
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    about = {"quant_method": method, "bits": 4, "group_size": GROUP, **config}
    edit_json(out / "config.json", lambda content: content.update(quantization_config=about))
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "checkpoint"
    write_random_checkpoint(folder)
    return folder


Make = Callable[..., Bundle]
KINDS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "gptq": ("gptq", True, {"sym": True, "desc_act": False}),
    "gptq_v2": ("gptq", True, {"sym": True, "desc_act": False, "checkpoint_format": "gptq_v2"}),
    "gptq, not symmetric": ("gptq", False, {"sym": False, "desc_act": False}),
    "awq": ("awq", False, {"zero_point": True, "version": "gemm"}),
    "awq, symmetric": ("awq", True, {"zero_point": True, "version": "GEMM"}),
}
SYMMETRIC = [kind for kind, (_, symmetric, _) in KINDS.items() if symmetric]
ASYMMETRIC = [kind for kind in KINDS if kind not in SYMMETRIC]


@pytest.fixture(scope="module")
def make(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder, made = tmp_path_factory.mktemp("made"), {}

    def bundle(kind: str, **options: Any) -> Bundle:
        method, symmetric, config = KINDS[kind]
        checkpoint = folder / kind
        if not checkpoint.exists():
            quantized_checkpoint(plain, checkpoint, method, symmetric, **config)
        key = (kind, *sorted(options.items()))
        if key not in made:
            made[key] = export(Checkpoint.open(checkpoint), folder / f"bundle-{len(made)}", ExportOptions(**options))
        return made[key]

    return bundle


def wanted_weights(plain: Path, kind: str, name: str) -> np.ndarray:
    """What the checkpoint's makers say its codes mean, [out, in]."""
    codes, zeros, scales = rounded(Checkpoint.open(plain).tensors[name].rows(), KINDS[kind][1])
    by_input = (np.repeat(part.astype(np.float32), GROUP, axis=0) for part in (zeros, scales))
    return ((codes - next(by_input)) * next(by_input)).T


@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_computes_with_the_same_numbers(kind: str, make: Make, plain: Path) -> None:
    pytest.importorskip("torch")
    from sfexport.engines.torch_backend import load_model

    state = load_model(make(kind).checkpoint_path).state_dict()
    for name in filter(BODY.fullmatch, state):
        assert np.array_equal(state[name].numpy(), wanted_weights(plain, kind, name)), name


ASKED = {"quantize": "int4", "precision": "fp16"}


@pytest.mark.parametrize(("kind", "options"), [*((kind, {}) for kind in KINDS), *((kind, ASKED) for kind in SYMMETRIC)])
def test_codes_are_taken_over_exactly(kind: str, options: dict, make: Make, plain: Path) -> None:
    bundle = make(kind, **options)
    names = [name for name in bundle.quantization["matrices"] if BODY.fullmatch(name)]
    assert len(names) == 4 * 7
    for name in names:
        assert bundle.quantization["matrices"][name]["kind"] == "taken"
        assert (stored_weights(bundle, name) == wanted_weights(plain, kind, name)).all()
    assert bundle.quantization["method"] == KINDS[kind][0]
    assert bundle.quantization["int4"]["weights"] == 0
    assert bundle.quantization["lm_head"] == ("int8" if options else "fp16")


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_computes_what_the_checkpoint_means(
    kind: str, make: Make, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exactly(monkeypatch)
    bundle = make(kind)
    meant = with_weights_of(bundle, plain, tmp_path / "meant")
    assert_same(run(bundle), run(export(Checkpoint.open(meant), tmp_path / "bundle", ExportOptions(weights="copy"))))


@pytest.mark.skipif(ORT < (1, 25), reason="checked with the ONNX Runtime whose fusions are known")
@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_fuses_them_all(kind: str, make: Make, tmp_path: Path) -> None:
    found = optimized(make(kind), tmp_path)
    assert found["MatMulNBits"] == 4 * 7
    assert found["DequantizeLinear"] == 0


def gaps(bundle: Bundle) -> list[str]:
    model = onnx.load(bundle.graph_file("decoder"), load_external_data=False)
    return [str(gap) for gap in check_graph(model, "decoder", support_for("10.3"))]


@pytest.mark.parametrize("kind", SYMMETRIC)
def test_tensorrts_parser_takes_symmetric_ones(kind: str, make: Make) -> None:
    assert gaps(make(kind)) == []


@pytest.mark.parametrize("kind", ASYMMETRIC)
def test_zero_points_are_a_gap_for_tensorrt_until_they_are_rounded_away(kind: str, make: Make, plain: Path) -> None:
    assert any("UINT4" in gap for gap in gaps(make(kind)))
    again = make(kind, quantize="int4")
    assert gaps(again) == []
    for name, about in again.quantization["matrices"].items():
        if about["kind"] == "int4":
            meant = wanted_weights(plain, kind, name)
            off = stored_weights(again, name) - meant
            assert math.sqrt((off**2).sum() / (meant**2).sum()) == pytest.approx(about["error"], rel=1e-3)
            assert about["error"] <= about["plain_error"]
    assert again.quantization["taken"]["weights"] == 0


def test_zero_points_bring_a_warning(make: Make, tmp_path: Path) -> None:
    lines: list[str] = []
    checkpoint = Checkpoint.open(make("awq").checkpoint_path)
    export(checkpoint, tmp_path / "bundle", ExportOptions(), lines.append)
    assert any("TensorRT" in line and "--quantize int4" in line for line in lines)


def test_pointing_at_the_checkpoint_is_refused(make: Make, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make("gptq").checkpoint_path)
    with pytest.raises(InputError) as caught:
        export(checkpoint, tmp_path / "bundle", ExportOptions(weights="reference"))
    assert_says(caught.value.paragraph(), "--weights reference")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quant_method": "bitsandbytes"}, ["'bitsandbytes'", "gptq and awq"]),
        ({"bits": 8}, ["8 bits", "4 bits"]),
        ({"load_in_4bit": True}, ["load_in_4bit"]),
        ({"checkpoint_format": ""}, ["GPTQ's layout ''"]),
        ({"group_size": -1}, ["-1", "128"]),
        ({"group_size": 32}, ["groups of 32", "qzeros"]),
        ({"quant_method": "awq", "version": "gemv"}, ["'gemv'", "gemm"]),
    ],
)
def test_what_cannot_be_taken_over_is_refused(changes: dict, says: list[str], make: Make, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(make("gptq").checkpoint_path, tmp_path / "checkpoint"))
    edit_json(copy / "config.json", lambda content: content["quantization_config"].update(changes))
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        export(Checkpoint.open(copy), tmp_path / "bundle", ExportOptions())
    assert_says(caught.value.paragraph(), *says)
    assert snapshot(tmp_path) == before


NAME = "model.layers.1.mlp.up_proj"


def damage(checkpoint: Path, tensor: str, array: np.ndarray | None) -> None:
    """Overwrite the beginning of a stored tensor, or take it away."""

    def change(tensors: dict[str, Any]) -> None:
        dtype, shape, data = tensors.pop(tensor)
        if array is not None:
            tensors[tensor] = (dtype, shape, array.tobytes() + data[array.nbytes :])

    change_tensors(Checkpoint.open(checkpoint).tensors[tensor].shard, change)


@pytest.mark.parametrize(
    ("tensor", "array", "says"),
    [
        ("qzeros", None, ["qzeros", "missing"]),
        ("scales", np.float16([np.nan]), ["not positive numbers"]),
        ("scales", np.float16([-1]), ["not positive numbers"]),
        ("g_idx", np.int32([0, 1, 0, 1]), ["g_idx", "desc_act"]),
    ],
)
def test_damaged_ones_are_named(
    tensor: str, array: np.ndarray | None, says: list[str], make: Make, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(make("gptq").checkpoint_path, tmp_path / "checkpoint"))
    damage(copy, f"{NAME}.{tensor}", array)
    with pytest.raises(CheckpointError) as caught:
        export(Checkpoint.open(copy), tmp_path / "out" / "bundle", ExportOptions())
    assert_says(caught.value.paragraph(), NAME, *says)
    assert not (tmp_path / "out").exists()


def test_a_rounded_head_is_refused(make: Make, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(make("gptq").checkpoint_path, tmp_path / "checkpoint"))
    place = Checkpoint.open(copy).tensors["lm_head.weight"]
    header, data = split_shard(place.shard)
    header["lm_head.qweight"] = header.pop("lm_head.weight")
    write_shard(place.shard, header, data)
    with pytest.raises(CheckpointError) as caught:
        export(Checkpoint.open(copy), tmp_path / "bundle", ExportOptions())
    assert_says(caught.value.paragraph(), "'lm_head.weight'", "4 bits")


def test_an_ordinary_checkpoint_stays_as_it_is(plain: Path, tmp_path: Path) -> None:
    wide = as_dtype(plain, tmp_path / "wide", "F32")
    bundle = export(Checkpoint.open(wide), tmp_path / "bundle", ExportOptions())
    assert bundle.quantization is None


def moved(make: Make, kind: str, out: Path, file: str, **settings: Any) -> Path:
    """A copy whose settings stand in the quantiser's own file and not in config.json."""
    copy = Path(shutil.copytree(make(kind).checkpoint_path, out))
    edit_json(copy / "config.json", lambda content: content.pop("quantization_config"))
    (copy / file).write_text(json.dumps(settings))
    return copy


OWN_FILES = {
    "AutoGPTQ": ("gptq", "quantize_config.json", {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "GPTQModel": (
        "gptq_v2",
        "quantize_config.json",
        {"bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2", "dynamic": {"-:.*head": {}}, "meta": {}},
    ),
    "AutoAWQ": ("awq", "quant_config.json", {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}),
}


@pytest.mark.parametrize("name", OWN_FILES)
def test_settings_may_stand_in_the_quantisers_own_file(name: str, make: Make, tmp_path: Path) -> None:
    kind, file, settings = OWN_FILES[name]
    copy = moved(make, kind, tmp_path / "checkpoint", file, **settings)
    bundle = export(Checkpoint.open(copy), tmp_path / "bundle", ExportOptions())
    assert not [note for note in document(sfexport("inspect", copy, "--json"))["notes"] if file in note]
    names = [matrix for matrix in bundle.quantization["matrices"] if BODY.fullmatch(matrix)]
    assert len(names) == 4 * 7
    for matrix in names:
        assert (stored_weights(bundle, matrix) == stored_weights(make(kind), matrix)).all()


@pytest.mark.parametrize(
    ("kind", "file", "settings", "says"),
    [
        ("awq", "quant_config.json", {"w_bit": 3, "q_group_size": GROUP}, ["quant_config.json", "3 bits"]),
        ("awq", "quant_config.json", {"w_bit": 4, "bits": 8, "q_group_size": GROUP}, ["bits is 8", "w_bit is 4"]),
        ("awq", "quant_config.json", {"q_group_size": GROUP, "version": "GEMV"}, ["'GEMV'", "gemm"]),
        ("awq", "quant_config.json", {"q_group_size": GROUP, "zero_point": False}, ["zero_point"]),
        ("awq", "quant_config.json", {"q_group_size": "64"}, ["q_group_size", "'64'"]),
        ("gptq", "quantize_config.json", {"group_size": GROUP}, ["None bits"]),
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": GROUP, "spin": 1}, ["'spin'", "not known"]),
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": GROUP, "checkpoint_format": "marlin"}, ["marlin"]),
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": GROUP, "is_marlin_format": True}, ["is_marlin"]),
        (
            "gptq",
            "quantize_config.json",
            {"bits": 4, "group_size": GROUP, "dynamic": {"+:a": {"bits": 8}}},
            ["dynamic"],
        ),
        ("gptq", "quantize_config.json", {"bits": 4, "quant_method": "bitsandbytes"}, ["'bitsandbytes'"]),
        ("gptq", "other.json", {}, [".qweight", "quantize_config.json", "quant_config.json"]),
    ],
)
def test_settings_in_other_files_are_refused_by_name(
    kind: str, file: str, settings: dict, says: list[str], make: Make, tmp_path: Path
) -> None:
    copy = moved(make, kind, tmp_path / "checkpoint", file, **settings)
    with pytest.raises(CheckpointError) as caught:
        export(Checkpoint.open(copy), tmp_path / "bundle", ExportOptions())
    assert_says(caught.value.paragraph(), *says)


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"quant_method": "fp8"}, ["'fp8'"]),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, ["'compressed-tensors'"]),
        ({"load_in_4bit": True}, ["'bitsandbytes'"]),
        ({}, ["None"]),
        ("int4", ["'int4'"]),
        ({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, ["gptq", "*.qweight"]),
    ],
)
def test_settings_that_no_tensor_follows_are_refused(
    about: object, says: list[str], plain: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(plain, tmp_path / "checkpoint"))
    edit_json(copy / "config.json", lambda content: content.update(quantization_config=about))
    with pytest.raises(CheckpointError) as caught:
        export(Checkpoint.open(copy), tmp_path / "bundle", ExportOptions())
    assert_says(caught.value.paragraph(), *says)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "g_idx"])
def test_codes_in_another_dtype_are_refused(part: str, make: Make, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(make("gptq").checkpoint_path, tmp_path / "checkpoint"))
    name = f"{NAME}.{part}"
    shard = Checkpoint.open(copy).tensors[name].shard
    change_tensors(shard, lambda tensors: tensors.update({name: ("F32", *tensors[name][1:])}))
    with pytest.raises(CheckpointError) as caught:
        export(Checkpoint.open(copy), tmp_path / "bundle", ExportOptions())
    assert_says(caught.value.paragraph(), name, "I32")


def test_desc_act_without_an_order_is_refused(make: Make, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(make("gptq").checkpoint_path, tmp_path / "checkpoint"))
    edit_json(copy / "config.json", lambda content: content["quantization_config"].update(desc_act=True))
    damage(copy, f"{NAME}.g_idx", None)
    with pytest.raises(CheckpointError) as caught:
        export(Checkpoint.open(copy), tmp_path / "bundle", ExportOptions())
    assert_says(caught.value.paragraph(), f"{NAME}.g_idx")


def test_inspect_counts_no_code_as_unused(make: Make) -> None:
    shown = document(sfexport("inspect", make("awq").checkpoint_path, "--json"))
    assert not [name for name in shown["unused_tensors"] if "head" not in name]
    assert shown["dtypes"]["I32"] == 4 * 7 * 2
