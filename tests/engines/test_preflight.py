"""`sfexport build --check`: on any machine, for every target, and its verdict on planted gaps."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import onnx
import pytest
from helpers import document, edit_json, refusal, sfexport, strict_json

from sfexport.artifacts.bundle import Bundle
from sfexport.artifacts.identity import full_sha256
from sfexport.artifacts.manifest_files import BUNDLE_FILE
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.shipped import SHIPPED
from sfexport.engines.memory import estimate_memory
from sfexport.engines.profiles import Limits, resolve_profiles
from sfexport.engines.tensorrt import preflight as readiness
from sfexport.exporting.export import ExportOptions, export
from sfexport.kernels.store import StoredKernels

pytest.importorskip("triton", reason="the plugin's kernel is written in Triton, which is not installed")
TARGETS = [
    ("jetson-orin-agx-64", "6.2", "10.3"),
    ("jetson-orin-agx-64", "7.2", "10.16"),
    ("jetson-thor", None, "10.16"),
    ("a100", None, "11.4"),
    ("l4", None, "11.4"),
    ("h100", None, "11.4"),
]


@pytest.fixture(scope="module")
def sparse_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released model's real shapes, without its weights (sparse files)."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        from sparse_checkpoint import write_sparse_checkpoint
    finally:
        sys.path.pop(0)
    path = tmp_path_factory.mktemp("sparse") / "checkpoint"
    write_sparse_checkpoint(path)
    for file in SHIPPED.glob("*token*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize(("target", "jetpack", "tensorrt"), TARGETS)
def test_the_7b_model_passes_on_every_target(target, jetpack, tensorrt, sparse_7b):
    result = sfexport(
        "build", sparse_7b, "--check", "--target", target, *(["--jetpack", jetpack] if jetpack else []), "--json"
    )
    assert result.exit_code == 0, result.stderr + result.stdout
    report = strict_json(result.stdout)
    assert report["passed"] and report["precision"] == "bf16"
    assert report["target"]["tensorrt"] == tensorrt
    checked = {line["subject"] for line in report["checks"]}
    assert {"vision_encoder", "compressor", "decoder", "cross_attention_split", "memory"} <= checked
    tensors = [t for profiles in report["profiles"].values() for p in profiles for t in p["tensors"]]
    assert len(tensors) > 250
    assert all(type(n) is int for t in tensors for shape in ("min", "opt", "max") for n in t[shape])
    weights = sum(g["weights"] for g in report["memory"]["graphs"])
    assert 15.8e9 < weights < 16.0e9  # 7.95 B parameters without the embedding, two bytes each
    assert len(report["kernels"]) == 2
    source = next(line for line in report["checks"] if line["checked"] == "source of the estimates")
    assert "TensorRT for RTX 1.7, not TensorRT" in source["found"] and source["passed"] is None
    assert "measured" in report["memory"]["sources"]["engine"]
    for graph in report["memory"]["graphs"]:
        assert 0 < graph["engine_activations"] < 1.4 * graph["activations"]
        assert graph["engine"] >= graph["weights"]


def test_too_small_a_board_is_a_gap(sparse_7b):
    result = sfexport("build", sparse_7b, "--check", "--target", "jetson-orin-nano-8")
    assert result.exit_code == 1
    assert "GAP" in result.stdout and "of 8 GB (estimated)" in result.stdout


def plant(bundle: Path, graph: str, change) -> None:
    """Change a graph of a bundle, and the manifest with it."""
    file = bundle / f"{graph}.onnx"
    model = onnx.load(file, load_external_data=False)
    change(model)
    onnx.save(model, file)
    entry = {"size": file.stat().st_size, "sha256": full_sha256(file)}
    edit_json(bundle / BUNDLE_FILE, lambda content: content["files"].update({file.name: entry}))


def add_node(op_type: str, dtype: int, opset: int | None = None):
    """Plants a node called 'planted' on a constant of its own."""

    def change(model: onnx.ModelProto) -> None:
        np_type = onnx.helper.tensor_dtype_to_np_dtype(dtype)
        import numpy as np

        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((2, 2), np_type), "planted.in"))
        inputs = ["planted.in"] * (2 if op_type in ("Add", "MatMul", "BitwiseAnd") else 1)
        model.graph.node.append(onnx.helper.make_node(op_type, inputs, ["planted.out"], name="planted"))
        if opset:
            model.opset_import[0].version = opset

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add_node("Det", onnx.TensorProto.FLOAT), ("planted", "Det")),
        (add_node("MatMul", onnx.TensorProto.DOUBLE), ("planted", "MatMul", "DOUBLE")),
        (add_node("BitwiseAnd", onnx.TensorProto.INT32), ("planted", "BitwiseAnd")),
        (add_node("Identity", onnx.TensorProto.FLOAT, opset=24), ("opset", "24")),
    ],
)
def test_a_planted_gap_is_found_by_its_nodes_name(change, words, tmp_path):
    export(Checkpoint.open(SHIPPED), tmp_path / "bundle", ExportOptions(precision="fp16"))
    before = sfexport("build", tmp_path / "bundle", "--check", "--target", "jetson-orin-agx-64", "--json")
    assert before.exit_code == 0, before.stdout
    plant(tmp_path / "bundle", "decoder", change)
    result = sfexport("build", tmp_path / "bundle", "--check", "--target", "jetson-orin-agx-64", "--json")
    assert result.exit_code == 1, result.stdout + result.stderr
    gaps = [line for line in strict_json(result.stdout)["checks"] if line["passed"] is False]
    assert gaps and all(line["subject"] == "decoder" for line in gaps)
    assert any(all(word in line["found"] for word in words) for line in gaps), gaps


def test_the_directory_to_take_along(tmp_path):
    out = tmp_path / "kit"
    result = sfexport("build", SHIPPED, "--check", "--target", "jetson-orin-nx-16", "--frames", "8", "-o", out)
    assert result.exit_code == 0, result.stderr
    names = {file.name for file in out.iterdir()}
    assert {"build.sh", "README.md", "check.json", "kernels.json"} <= names
    split, combine = StoredKernels(out)("bf16", 32, 87, 85)
    assert split.name in split.ptx and combine.sm == 87
    assert json.loads((out / "check.json").read_text())["limits"]["frames"] == 8
    script = out / "build.sh"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["sh", "-n", script]).returncode == 0
    # The script's commands are the command line's own: a stand-in prints what it is called with.
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "sfexport"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    said = subprocess.run([script, "model"], env=os.environ | {"PATH": path}, capture_output=True, text=True).stdout
    doctor, build = said.splitlines()
    assert doctor == "doctor --target jetson-orin-nx-16"
    from sfexport.cli import main

    context = main.commands["build"].make_context("build", build.split()[1:])
    assert context.params["precision"] == "bf16" and context.params["kernels"] == out
    # A second check replaces it; something else in its place stays.
    assert sfexport("build", SHIPPED, "--check", "--target", "h100", "-o", out).exit_code == 0


def test_a_quantised_build_for_a_board_that_cannot_allocate_the_head_whole(tmp_path, monkeypatch):
    """The bundle that is checked has 4-bit weights and its head in four pieces; so will the one built there."""
    seen = []
    inner = readiness.check_build
    monkeypatch.setattr(readiness, "check_build", lambda bundle, *rest: seen.append(bundle) or inner(bundle, *rest))
    monkeypatch.setattr(readiness, "write_build_directory", lambda found, out: seen.append(readiness._script(found)))
    asked = ("build", SHIPPED, "--check", "--target", "jetson-orin-nano-8", "--quantize", "int4", "--json")
    result = sfexport(*asked, "-o", tmp_path / "kit")
    assert result.exit_code == 0, result.stdout
    assert document(result)["quantize"] == "int4"
    bundle, script = seen
    assert bundle.content["options"]["split_lm_head"] == 4
    assert "--split-decoder 4 --quantize int4 --lm-head int8" in script and "--max-batch 8" in script
    assert "--quantize int4" in script and "--target jetson-orin-nano-8" in script
    line = next(check for check in document(result)["checks"] if check["subject"] == "precision")
    assert line["found"] == "bf16 with int4" and line["verdict"] == "ok"


def test_integer_weights_take_what_they_are_stored_in(tmp_path):
    for name, options in (("floats", {}), ("integers", {"quantize": "int4"})):
        export(Checkpoint.open(SHIPPED), tmp_path / name, ExportOptions(precision="fp16", **options))
    sizes = []
    for name in ("floats", "integers"):
        bundle = Bundle.open(tmp_path / name)
        memory = estimate_memory(bundle, resolve_profiles(bundle, Limits(8)), mapped_weights=False)
        sizes.append(sum(graph.weights for graph in memory.graphs))
        assert sizes[-1] == pytest.approx(bundle.weight_bytes(2), rel=0.01)
    assert sizes[1] < 0.6 * sizes[0]


def test_bad_requests_are_refused(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")
    assert "--check needs a --target" in refusal(tmp_path, "build", SHIPPED, "--check")
    assert "Unknown target 'orin'" in refusal(tmp_path, "build", SHIPPED, "--check", "--target", "orin")
    assert "JetPack 5" in refusal(tmp_path, "build", SHIPPED, "--check", "--target", "jetson-thor", "--jetpack", "5")
    assert "--jetpack needs a --target" in refusal(tmp_path, "build", SHIPPED, "--check", "--jetpack", "6.2")
    said = refusal(tmp_path, "build", SHIPPED, "--check", "--target", "a100", "-o", tmp_path / "taken")
    assert "already holds something else" in said
    said = refusal(tmp_path, "build", SHIPPED, "--check", "--target", "a100", "--frames", "0", after_steps=True)
    assert "--frames" in said
    said = refusal(tmp_path, "build", SHIPPED, "--check", "--target", "a100", "--kernels", tmp_path, after_steps=True)
    assert "holds no compiled kernels" in said
