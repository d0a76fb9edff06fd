"""Bundles and engine directories: what was edited, replaced, moved or built by another version is refused or found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    FIRST,
    assert_says,
    document,
    edit_json,
    promise_again,
    refusal,
    remove_field,
    set_fields,
    sfexport,
    snapshot,
)

from sfexport import __version__
from sfexport.artifacts.bundle import Bundle
from sfexport.artifacts.engines import Engines
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.run import DemoPaths as Tree
from sfexport.engines import memory
from sfexport.engines.build import build
from sfexport.exporting.export import ExportOptions, export

ASK = ("-q", "What happens?", "--max-new-tokens", 2)


@pytest.fixture
def reference_tree(tree: Tree, tmp_path: Path) -> Tree:
    """The same, made anew, with a bundle that points into the checkpoint: nothing in it refers to other places."""
    made = Tree(tmp_path / "here")
    shutil.copytree(tree.checkpoint, made.checkpoint)
    shutil.copyfile(tree.clip, made.clip)
    build(export(Checkpoint.open(made.checkpoint), made.bundle, ExportOptions(weights="reference")), made.engines)
    return made


def answer(engines: Path, clip: Path) -> str:
    return document(sfexport("ask", engines, clip, *ASK, "--json"))["questions"][0]["answer"]


def all_verbs(tree: Tree, out: Path) -> list[tuple[object, ...]]:
    """Each verb that opens a bundle."""
    return [
        ("build", tree.bundle, "-o", out),
        ("inspect", tree.bundle),
        ("inspect", tree.engines),
        ("ask", tree.engines, tree.clip, *ASK),
    ]


def refusals(tree: Tree) -> list[str]:
    return [refusal(tree.root, *arguments) for arguments in all_verbs(tree, tree.root / "new")]


# Bundles.


@pytest.mark.parametrize("name", ["decoder.onnx", "tokenizer.json", "config.json", "generation_config.json"])
def test_bundle_with_an_edited_file_is_refused(name: str, tree_copy: Tree) -> None:
    with (tree_copy.bundle / name).open("ab") as file:
        file.write(b" ")
    for paragraph in refusals(tree_copy):
        assert_says(paragraph, tree_copy.bundle / name, "was changed", "sha256", "again")


def test_bundle_without_a_file_is_refused(tree_copy: Tree) -> None:
    (tree_copy.bundle / "compressor.onnx").unlink()
    for paragraph in refusals(tree_copy):
        assert_says(paragraph, tree_copy.bundle / "compressor.onnx", "is missing", "again")


def test_model_that_does_not_fit_into_memory_is_not_built(tree_copy: Tree) -> None:
    edit_json(tree_copy.bundle / "sfexport.json", lambda c: c["weights"].update(parameters=10**15))
    before = snapshot(tree_copy.root)
    result = sfexport("build", tree_copy.bundle, "-o", tree_copy.root / "new")
    assert result.exit_code == 1
    assert_says(result.stderr, "Error: The weights take 4000000.0 GB in float32", "--quantize int4", "--force")
    assert snapshot(tree_copy.root) == before
    assert sfexport("build", tree_copy.bundle, "-o", tree_copy.root / "new", "--force").exit_code == 0


def test_rounded_weights_are_counted_as_they_are_stored(tree_copy: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that fits in 4 bits only is built in 4 bits only."""
    quantised = tree_copy.root / "quantised"
    assert sfexport("export", tree_copy.checkpoint, "-o", quantised, "--quantize", "int4").exit_code == 0
    floats = 4 * Bundle.open(quantised).content["weights"]["parameters"]
    monkeypatch.setattr(memory, "physical_memory", lambda: floats // 2)
    assert sfexport("build", quantised, "-o", tree_copy.root / "new").exit_code == 0
    monkeypatch.setattr(memory, "physical_memory", lambda: floats // 10)
    assert_says(sfexport("build", quantised, "-o", tree_copy.root / "small").stderr, "B in memory", "--force")
    monkeypatch.setattr(memory, "physical_memory", lambda: floats // 2)
    pytest.importorskip("torch", reason="the backend torch needs PyTorch, which is not installed")
    refused = sfexport("build", quantised, "-o", tree_copy.root / "torch", "--backend", "torch")
    assert refused.exit_code == 1
    assert_says(refused.stderr, "B in float32", "--force")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:500])


DAMAGED_MANIFESTS: dict[str, Callable[[Path], Any]] = {
    "truncated": cut,
    "not JSON": lambda file: file.write_text("{'a'}"),
    "not text": lambda file: file.write_bytes(b"\xff\x00"),
    "a list": lambda file: file.write_text("[]"),
    "a file with no facts": lambda file: edit_json(file, lambda c: c["files"].update({"decoder.onnx": 1})),
    "a file without a size": lambda file: edit_json(file, lambda c: c["files"]["config.json"].pop("size")),
    "files in a list": lambda file: set_fields(file, files=[]),
    "weights in a list": lambda file: set_fields(file, weights=[1]),
    "a shard in words": lambda file: edit_json(file, lambda c: c["weights"].update(shards=["one"])),
    "no number of parameters": lambda file: edit_json(file, lambda c: c["weights"].pop("parameters")),
    "no inputs": lambda file: edit_json(file, lambda c: c["graphs"]["decoder"].pop("inputs")),
    "no facts of the model": lambda file: set_fields(file, model={}),
    "tools in words": lambda file: set_fields(file, tools="none"),
    "no embedding": lambda file: edit_json(file, lambda c: c["weights"].pop("embedding")),
    "no frames": lambda file: edit_json(file, lambda c: c["options"].pop("frames")),
    "frames in words": lambda file: edit_json(file, lambda c: c["options"].update(frames="many")),
    "an unknown image fact": lambda file: edit_json(file, lambda c: c["image"].update(colour=1)),
    "no decoder": lambda file: edit_json(file, lambda c: c["graphs"].pop("decoder")),
    "no slow tokens": lambda file: edit_json(file, lambda c: c["tokens_per_frame"].pop("video")),
}


@pytest.mark.parametrize("name", DAMAGED_MANIFESTS)
def test_damaged_bundle_manifest_is_refused(name: str, tree_copy: Tree) -> None:
    DAMAGED_MANIFESTS[name](tree_copy.bundle / "sfexport.json")
    for paragraph in refusals(tree_copy):
        assert_says(paragraph, tree_copy.bundle, "again")


@pytest.mark.parametrize(
    "key", ["files", "format", "sfexport", "weights", "graphs", "image", "options", "checkpoint", "model", "tools"]
)
def test_bundle_manifest_that_lacks_something_is_refused(key: str, tree_copy: Tree) -> None:
    remove_field(tree_copy.bundle / "sfexport.json", key)
    for paragraph in refusals(tree_copy):
        assert_says(paragraph, tree_copy.bundle, "again")


def test_damaged_bundle_can_be_exported_again_once_it_is_moved_away(tree_copy: Tree) -> None:
    cut(tree_copy.bundle / "sfexport.json")
    paragraph = refusal(tree_copy.root, "export", tree_copy.checkpoint, "-o", tree_copy.bundle)
    assert_says(paragraph, tree_copy.bundle, "sfexport.json", "damaged", "move it away")
    tree_copy.bundle.rename(tree_copy.root / "damaged")
    assert sfexport("export", tree_copy.checkpoint, "-o", tree_copy.bundle).exit_code == 0
    assert sfexport("inspect", tree_copy.bundle).exit_code == 0


def test_replaced_shard_is_refused(tree_copy: Tree) -> None:
    raw = (tree_copy.bundle / FIRST).read_bytes()
    (tree_copy.bundle / FIRST).write_bytes(raw.replace(b'"format":"pt"', b'"format":"np"', 1))  # of the same size
    assert raw != (tree_copy.bundle / FIRST).read_bytes()
    for paragraph in refusals(tree_copy):
        assert_says(paragraph, tree_copy.bundle / FIRST, "is not the one", "Export again")


def test_truncated_shard_is_refused(tree_copy: Tree) -> None:
    cut(tree_copy.bundle / FIRST)
    for paragraph in refusals(tree_copy):
        assert_says(paragraph, tree_copy.bundle / FIRST, "is not the one")


def test_missing_shard_is_refused(tree_copy: Tree) -> None:
    (tree_copy.bundle / FIRST).unlink()
    for paragraph in refusals(tree_copy):
        assert_says(paragraph, tree_copy.bundle / FIRST, "is missing", "Put it back")


def test_bundle_says_where_its_checkpoint_was(reference_tree: Tree) -> None:
    moved = reference_tree.root / "elsewhere"
    reference_tree.checkpoint.rename(moved)
    for paragraph in refusals(reference_tree):
        assert_says(paragraph, reference_tree.checkpoint, "does not exist any more", "--weights copy")
    moved.rename(reference_tree.checkpoint)
    assert answer(reference_tree.engines, reference_tree.clip) is not None


def test_bundle_moves_together_with_its_checkpoint(reference_tree: Tree, tmp_path: Path) -> None:
    before = answer(reference_tree.engines, reference_tree.clip)
    moved = Tree(tmp_path / "deeper" / "there")
    moved.root.parent.mkdir()
    reference_tree.root.rename(moved.root)
    assert answer(moved.engines, moved.clip) == before
    assert Bundle.open(moved.bundle).weights_directory == moved.checkpoint
    assert sfexport("build", moved.bundle, "-o", tmp_path / "engines").exit_code == 0


def test_bundle_with_its_weights_moves_alone(tree: Tree, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    export(Checkpoint.open(checkpoint), tmp_path / "bundle", ExportOptions(weights="copy"))
    shutil.rmtree(checkpoint)
    (tmp_path / "bundle").rename(tmp_path / "moved")
    assert sfexport("build", tmp_path / "moved", "-o", tmp_path / "engines").exit_code == 0
    assert answer(tmp_path / "engines", tree.clip) == answer(tree.engines, tree.clip)


def test_paths_through_a_linked_directory_are_found_again(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/away")
    checkpoint = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    bundle = export(Checkpoint.open(checkpoint), tmp_path / "link" / "bundle", ExportOptions(weights="reference"))
    build(bundle, tmp_path / "link" / "engines")
    # The stored absolute paths are wrong after this; the relative ones are not.
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    opened = Engines.open(moved / "link" / "engines")
    assert opened.bundle.weights_directory == moved / "checkpoint"


def test_same_weights_give_the_same_answer_wherever_they_are(reference_tree: Tree, tree: Tree) -> None:
    assert answer(reference_tree.engines, tree.clip) == answer(tree.engines, tree.clip)
    assert not list(reference_tree.bundle.glob("*.safetensors"))


# Engines.


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"runtime": {"name": "onnxruntime", "version": "1.2.3"}}, ["onnxruntime 1.2.3", "sfexport build"]),
        ({"runtime": {"name": "openvino", "version": "1.2.3"}}, ["openvino 1.2.3", "sfexport build"]),
        ({"backend": "abacus"}, ["'abacus'"]),
        ({"backend": None}, ["None"]),
        ({"sfexport": "99.0.0"}, ["99.0.0", __version__, "sfexport build again"]),
        ({"format": 99}, ["format 99", "sfexport build again"]),
        ({"runtime": None}, ["damaged", "again"]),
        ({"bundle": "there"}, ["damaged", "again"]),
        ({"files": None}, ["damaged", "again"]),
    ],
)
def test_engines_of_another_kind_are_refused(fields: dict[str, Any], parts: list[str], tree_copy: Tree) -> None:
    set_fields(tree_copy.engines / "engine.json", **fields)
    assert_says(refusal(tree_copy.root, "ask", tree_copy.engines, tree_copy.clip, *ASK), tree_copy.engines, *parts)


@pytest.mark.parametrize("key", ["format", "sfexport", "backend", "target", "machine", "runtime", "bundle", "files"])
def test_engine_manifest_that_lacks_something_is_refused(key: str, tree_copy: Tree) -> None:
    remove_field(tree_copy.engines / "engine.json", key)
    assert_says(refusal(tree_copy.root, "ask", tree_copy.engines, tree_copy.clip, *ASK), tree_copy.engines)
    assert_says(refusal(tree_copy.root, "inspect", tree_copy.engines), tree_copy.engines, "again")


def test_engines_with_an_edited_graph_are_refused(tree_copy: Tree) -> None:
    with (tree_copy.engines / "decoder.onnx").open("ab") as file:
        file.write(b" ")
    for verb in (("ask", tree_copy.engines, tree_copy.clip, *ASK), ("inspect", tree_copy.engines)):
        assert_says(refusal(tree_copy.root, *verb), tree_copy.engines / "decoder.onnx", "was changed", "sha256")


def test_engines_that_the_runtime_refuses_are_one_paragraph(tree_copy: Tree) -> None:
    (tree_copy.engines / "decoder.onnx").write_bytes(b"not a graph")
    promise_again(tree_copy.engines / "engine.json", "decoder.onnx")
    result = sfexport("ask", tree_copy.engines, tree_copy.clip, *ASK)
    assert result.exit_code == 1
    assert_says(result.stderr.splitlines()[-1], "Error: ONNX Runtime cannot load", "decoder.onnx")


def test_build_that_the_runtime_refuses_leaves_nothing(tree_copy: Tree) -> None:
    (tree_copy.bundle / "compressor.onnx").write_bytes(b"not a graph")
    promise_again(tree_copy.bundle / "sfexport.json", "compressor.onnx")
    before = snapshot(tree_copy.root)
    result = sfexport("build", tree_copy.bundle, "-o", tree_copy.engines)
    assert result.exit_code == 1
    assert_says(result.stderr.splitlines()[-1], "Error: ONNX Runtime cannot load", "compressor.onnx")
    assert snapshot(tree_copy.root) == before


def test_engines_notice_that_their_bundle_was_exported_differently(tree_copy: Tree) -> None:
    assert sfexport("export", tree_copy.checkpoint, "-o", tree_copy.bundle, "--frames", 4).exit_code == 0
    for verb in (("ask", tree_copy.engines, tree_copy.clip, *ASK), ("inspect", tree_copy.engines)):
        assert_says(refusal(tree_copy.root, *verb), tree_copy.bundle, "is not the one", "sfexport build")


def test_engines_say_where_their_bundle_was(reference_tree: Tree) -> None:
    reference_tree.bundle.rename(reference_tree.root / "elsewhere")
    paragraph = refusal(reference_tree.root, "ask", reference_tree.engines, reference_tree.clip, *ASK)
    assert_says(paragraph, reference_tree.bundle, "does not exist any more", "Put it back, or build again")


@pytest.mark.parametrize("verb", ["ask", "parity"])
def test_only_engines_can_be_asked(verb: str, tree: Tree) -> None:
    arguments = (tree.clip, "-q", "What?") if verb == "ask" else ()
    if verb == "parity":
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    assert_says(refusal(tree.root, verb, tree.bundle, *arguments), tree.bundle, "no engine.json", "sfexport build")
    assert_says(refusal(tree.root, verb, tree.checkpoint, *arguments), tree.checkpoint, "no engine.json")
    assert_says(refusal(tree.root, verb, tree.root / "nowhere", *arguments), "nowhere", "does not exist")
    assert_says(refusal(tree.root, verb, tree.clip, *arguments), tree.clip, "is not a directory")


def test_directory_of_one_engine_set_stands_for_it_and_of_two_does_not(tree_copy: Tree) -> None:
    parent = tree_copy.root / "sets"
    parent.mkdir()
    build(Bundle.open(tree_copy.bundle), parent / "one")
    assert answer(parent, tree_copy.clip) == answer(tree_copy.engines, tree_copy.clip)
    build(Bundle.open(tree_copy.bundle), parent / "two")
    paragraph = refusal(tree_copy.root, "ask", parent, tree_copy.clip, *ASK)
    assert_says(paragraph, parent, "one, two", "Name one")


def test_manifests_hold_what_was_promised(tree: Tree) -> None:
    bundle = json.loads((tree.bundle / "sfexport.json").read_text())
    assert bundle["sfexport"] == __version__
    assert set(bundle["files"]) | {"sfexport.json"} == {p.name for p in tree.bundle.iterdir() if "-of-" not in p.name}
    engines = json.loads((tree.engines / "engine.json").read_text())
    assert set(engines["files"]) == {f"{name}.onnx" for name in bundle["graphs"]}
    assert engines["runtime"]["name"] == engines["backend"] == "onnxruntime"


# Outputs that are also inputs.


def test_bundle_cannot_be_exported_onto_itself_by_reference(tree_copy: Tree) -> None:
    assert_says(refusal(tree_copy.root, "export", tree_copy.bundle, "-o", tree_copy.bundle, "--weights", "reference"))


def test_bundle_with_its_weights_can_be_exported_onto_itself(tree_copy: Tree) -> None:
    assert sfexport("export", tree_copy.bundle, "-o", tree_copy.bundle, "--weights", "copy").exit_code == 0
    assert sfexport("inspect", tree_copy.bundle).exit_code == 0
