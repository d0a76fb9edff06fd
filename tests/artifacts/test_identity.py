"""Weights are told by their content: edited, replaced or moved weights are refused or the right ones found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_says, refusal, sfexport, split_shard, write_shard

from sfexport.artifacts import identity
from sfexport.artifacts.bundle import Bundle
from sfexport.artifacts.engines import Engines
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.run import DemoPaths as Tree
from sfexport.engines.build import build
from sfexport.errors import BundleError
from sfexport.exporting.export import ExportOptions, export
from sfexport.testing.random_checkpoint import write_random_checkpoint

HEAD = "lm_head.weight"


def edit_data(shard: Path, change: Callable[[np.ndarray], object]) -> None:
    """Change a shard's bytes after its header, in place: its size and header stay."""
    header, data = split_shard(shard)
    length = shard.stat().st_size - len(data)
    values = np.memmap(shard, np.uint8, "r+", offset=length)
    change(values)
    values.flush()


def negate(values: np.ndarray) -> None:
    values[1 : len(values) // 2 * 2 : 2] ^= 0x80  # the sign bit of every 16-bit number


def zero(values: np.ndarray) -> None:
    values[:] = 0


def swap_halves(values: np.ndarray) -> None:
    values[:] = np.roll(values, len(values) // 2)


def flip_a_bit(values: np.ndarray) -> None:
    values[len(values) // 3] ^= 1


CHANGES = {"negated": negate, "zeros": zero, "in another order": swap_halves, "one bit": flip_a_bit}


@pytest.fixture(params=["copy", "reference", "int4"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def make_tree(tree: Tree, root: Path, kind: str) -> Tree:
    made = Tree(root)
    shutil.copytree(tree.checkpoint, made.checkpoint)
    shutil.copyfile(tree.clip, made.clip)
    options = ExportOptions(quantize="int4") if kind == "int4" else ExportOptions(weights=kind)
    build(export(Checkpoint.open(made.checkpoint), made.bundle, options), made.engines)
    return made


def weight_files(made: Tree) -> list[Path]:
    bundle = Bundle.open(made.bundle)
    return [bundle.weights_directory / name for name in bundle.weight_sizes]


@pytest.mark.parametrize("change", CHANGES)
def test_edited_weights_are_refused(change: str, kind: str, tree: Tree, tmp_path: Path) -> None:
    """Also where the file's times are put back."""
    made = make_tree(tree, tmp_path / "here", kind)
    for file in weight_files(made):
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        edit_data(file, CHANGES[change])
        os.utime(file, ns=times)
    for verb in (("build", made.bundle, "-o", tmp_path / "new"), ("inspect", made.bundle)):
        assert_says(refusal(tmp_path, *verb), "is not the one this bundle was exported from", "xport again")
    assert_says(refusal(tmp_path, "ask", made.engines, made.clip, "-q", "Why?"), "is not the one")


@pytest.fixture
def sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are sampled as large ones are."""
    monkeypatch.setattr(identity, "WHOLE", 0)
    monkeypatch.setattr(identity, "_BLOCK", 64)


@pytest.mark.parametrize("change", ["negated", "zeros", "in another order"])
def test_sampled_blocks_show_other_weights(change: str, sampling: None, tree: Tree, tmp_path: Path) -> None:
    made = make_tree(tree, tmp_path / "here", "reference")
    edit_data(weight_files(made)[-1], CHANGES[change])
    with pytest.raises(BundleError, match="is not the one"):
        Bundle.open(made.bundle)


def change_between_blocks(file: Path) -> None:
    """One byte of the head that no sampled block has."""
    tensor = Checkpoint.open(file.parent).tensors[HEAD]
    sampled = [span for span in identity._spans(file) if tensor.offset <= span[0] < tensor.offset + tensor.length]
    place = next(
        at
        for at in range(tensor.offset, tensor.offset + tensor.length)
        if all(at - s >= n or at < s for s, n in sampled)
    )
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("options", [{"weights": "copy"}, {"weights": "reference", "digest": "full"}, {}])
def test_change_between_sampled_blocks_is_found_by_a_build(
    options: dict[str, str], sampling: None, tree: Tree, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    bundle = export(
        Checkpoint.open(checkpoint), tmp_path / "bundle", ExportOptions(**(options or {"weights": "reference"}))
    )
    change_between_blocks(bundle.weights_directory / Checkpoint.open(checkpoint).tensors[HEAD].shard.name)
    opened = Bundle.open(bundle.path)
    if not options:  # referenced weights have a full digest only by option
        assert set(opened.weight_digests.values()) == {None}
        return
    with pytest.raises(BundleError, match="sha256 is another"):
        build(opened, tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


def test_build_records_the_digest_of_every_byte(sampling: None, tree: Tree, tmp_path: Path) -> None:
    bundle = export(Checkpoint.open(tree.checkpoint), tmp_path / "bundle", ExportOptions(weights="reference"))
    engines = build(bundle, tmp_path / "engines")
    for name, read in engines.content["weights_read"].items():
        assert read["sha256"] == identity.full_sha256(tree.checkpoint / name)


def test_change_between_sampled_blocks_is_found_by_its_time(sampling: None, tree: Tree, tmp_path: Path) -> None:
    made = make_tree(tree, tmp_path / "here", "reference")
    ask = ("ask", made.engines, made.clip, "-q", "Why?", "--max-new-tokens", 1)
    shard = Checkpoint.open(made.checkpoint).tensors[HEAD].shard
    os.utime(shard, ns=(0, 0))
    assert sfexport(*ask).exit_code == 0, "the same bytes, downloaded or copied at another time"
    change_between_blocks(shard)
    assert_says(refusal(tmp_path, *ask), shard, "is not the one", "build again")


def test_sampling_reads_every_tensor(sampling: None, tree: Tree) -> None:
    checkpoint = Checkpoint.open(tree.checkpoint)
    for shard in checkpoint.shards:
        spans = list(identity._spans(shard.path))
        assert all(start + length <= shard.size for start, length in spans)
        for tensor in (t for t in checkpoint.tensors.values() if t.shard == shard.path):
            inside = [s for s in spans if tensor.offset <= s[0] and s[0] + s[1] <= tensor.offset + tensor.length]
            assert tensor.offset in (start for start, _ in inside)
            assert tensor.offset + tensor.length in (start + length for start, length in inside)


# Places.


def other_run(tree: Tree, path: Path) -> None:
    """A checkpoint of the same sizes with other weights."""
    shutil.copytree(tree.checkpoint, path)
    for shard in path.glob("*.safetensors"):
        edit_data(shard, negate)


def test_bundle_moved_beside_another_run_keeps_its_own_weights(tree: Tree, tmp_path: Path) -> None:
    made = make_tree(tree, tmp_path / "mine", "reference")
    other_run(tree, tmp_path / "other" / "checkpoint")
    moved = made.bundle.rename(tmp_path / "other" / "bundle")
    assert Bundle.open(moved).weights_directory == made.checkpoint
    made.checkpoint.rename(tmp_path / "away")
    with pytest.raises(BundleError, match="is not the one"):
        Bundle.open(moved)


def test_other_weights_at_the_recorded_place_are_passed_over(tree: Tree, tmp_path: Path) -> None:
    """The tree was moved, and another run's checkpoint stands where this one was."""
    made = make_tree(tree, tmp_path / "mine", "reference")
    made.root.rename(tmp_path / "moved")
    other_run(tree, made.checkpoint)
    assert Bundle.open(tmp_path / "moved" / "bundle").weights_directory == tmp_path / "moved" / "checkpoint"
    assert Engines.open(tmp_path / "moved" / "engines").bundle.path == tmp_path / "moved" / "bundle"


@pytest.mark.parametrize("kind", ["reference", "int4"])
def test_pytorch_loads_the_checkpoint_that_was_exported(kind: str, tree: Tree, tmp_path: Path) -> None:
    made = make_tree(tree, tmp_path / "mine", kind)
    made.root.rename(tmp_path / "moved")
    other_run(tree, made.checkpoint)
    moved = Bundle.open(tmp_path / "moved" / "bundle")
    assert moved.checkpoint_path == moved.original_checkpoint == tmp_path / "moved" / "checkpoint"
    shutil.rmtree(tmp_path / "moved" / "checkpoint")
    if kind == "int4":
        with pytest.raises(BundleError, match="is not the one"):
            assert moved.checkpoint_path


def test_copied_bundle_uses_its_own_weights(tree: Tree, tmp_path: Path) -> None:
    made = make_tree(tree, tmp_path / "mine", "copy")
    copy = Path(shutil.copytree(made.bundle, tmp_path / "copy"))
    assert Bundle.open(copy).weights_directory == copy
    edit_data(next(copy.glob("*.safetensors")), negate)
    with pytest.raises(BundleError, match="is not the one"):
        Bundle.open(copy)


# Values.


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_that_is_not_finite_is_found_by_the_build(tied: bool, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "checkpoint", changes={"tie_word_embeddings": tied})
    place = Checkpoint.open(tmp_path / "checkpoint").tensors["model.embed_tokens.weight"]
    header, data = split_shard(place.shard)
    start = place.offset - (place.shard.stat().st_size - len(data))
    value = np.array([np.nan], {"F32": np.float32, "F16": np.float16}.get(place.dtype, np.float32))
    raw = value.tobytes() if place.dtype != "BF16" else b"\xc0\x7f"
    middle = start + place.length // 2
    write_shard(place.shard, header, data[:middle] + raw + data[middle + len(raw) :])
    assert sfexport("export", tmp_path / "checkpoint", "-o", tmp_path / "bundle").exit_code == 0
    paragraph = refusal(tmp_path, "build", tmp_path / "bundle", "-o", tmp_path / "engines")
    assert_says(paragraph, "embed_tokens", "not finite")


# Files that nobody listed.


@pytest.mark.parametrize(
    "name", ["model.safetensors", "adapter_model.bin", "extra.onnx", "adapter_config.json", "merges.txt", "modeling.py"]
)
def test_unlisted_file_that_something_would_read_is_refused(name: str, tree_copy: Tree) -> None:
    (tree_copy.bundle / name).write_text("{}")
    for verb in (("inspect", tree_copy.engines), ("build", tree_copy.bundle, "-o", tree_copy.root / "new")):
        assert_says(refusal(tree_copy.root, *verb), tree_copy.bundle / name, "is not one of the files")


def test_unlisted_file_that_nothing_reads_is_left_alone(tree_copy: Tree) -> None:
    for name in (".DS_Store", "notes.txt", "README.md"):
        (tree_copy.bundle / name).write_text("mine")
    assert sfexport("inspect", tree_copy.engines).exit_code == 0


def test_export_says_how_its_weights_can_be_told(tree: Tree, tmp_path: Path) -> None:
    command = ("export", tree.checkpoint, "-o", tmp_path / "bundle", "--weights", "reference", "--digest", "full")
    assert sfexport(*command).exit_code == 0
    shards = json.loads((tmp_path / "bundle" / "sfexport.json").read_text())["weights"]["shards"]
    for shard in shards:
        assert shard["sha256"] == identity.full_sha256(tree.checkpoint / shard["file"])
