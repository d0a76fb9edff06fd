"""Reading checkpoints: any damage to a header is explained, links are followed, and rows come out as float32."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from helpers import (
    FIRST,
    INDEX,
    SECOND,
    assert_says,
    document,
    edit_header,
    refusal,
    sfexport,
    split_shard,
    write_shard,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfexport.checkpoint.checkpoint import Checkpoint, Tensor
from sfexport.checkpoint.config import MODEL_TYPE, ModelConfig
from sfexport.demo.run import DemoPaths as Tree
from sfexport.dtypes import Precision
from sfexport.errors import CheckpointError

# Headers.

TINY = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
HEADER = json.dumps(TINY).encode()
FILE = len(HEADER).to_bytes(8, "little") + HEADER + bytes(32)


def open_bytes(raw: bytes) -> Checkpoint:
    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text("{}")
        (Path(directory) / "model.safetensors").write_bytes(raw)
        return Checkpoint.open(directory)


def assert_opens_or_explains(raw: bytes) -> None:
    """Nothing but CheckpointError may come out, and what opens lies within the file."""
    try:
        checkpoint = open_bytes(raw)
    except CheckpointError:
        return
    for tensor in checkpoint.tensors.values():
        assert all(type(n) is int and n >= 0 for n in tensor.shape)
        assert 8 <= tensor.offset <= tensor.offset + tensor.length <= len(raw)


def test_tiny_file_opens() -> None:
    checkpoint = open_bytes(FILE)
    assert checkpoint.shapes == {"a": (2, 3), "b": (4,)}
    assert [t.offset - len(HEADER) - 8 for t in checkpoint.tensors.values()] == [0, 24]


@pytest.mark.parametrize("length", range(len(FILE)))
def test_any_truncation_is_refused(length: int) -> None:
    with pytest.raises(CheckpointError, match="truncated"):
        open_bytes(FILE[:length])


@settings(max_examples=400, deadline=None)
@given(place=st.integers(0, len(HEADER) + 7), value=st.integers(0, 255))
def test_any_changed_byte_is_survived_or_explained(place: int, value: int) -> None:
    assert_opens_or_explains(FILE[:place] + bytes([value]) + FILE[place + 1 :])


@settings(max_examples=200, deadline=None)
@given(
    place=st.integers(8, len(HEADER) + 8),
    cut=st.integers(0, 40),
    new=st.sampled_from([b"", b"-", b"e9", b"[", b"null", b"1e999", b"NaN", b'"', b"\xff", b"9" * 30, b"true", b"{}"]),
)
def test_any_changed_piece_is_survived_or_explained(place: int, cut: int, new: bytes) -> None:
    header = (FILE[8:place] + new + FILE[place + cut :])[: -len(bytes(32))]
    assert_opens_or_explains(len(header).to_bytes(8, "little") + header + bytes(32))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), lambda v: st.lists(v, max_size=3)
)


@settings(max_examples=300, deadline=None)
@given(
    entry=st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "BF16", "I64", "F4", ""]) | values,
            "shape": st.lists(st.integers(-1, 4), max_size=3) | values,
            "data_offsets": st.lists(st.integers(-8, 40), min_size=2, max_size=2) | values,
        },
    )
    | values
)
@example(entry={"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]})
@example(entry={"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]})
def test_any_entry_is_survived_or_explained(entry: object) -> None:
    header = json.dumps({"t": entry}).encode()
    assert_opens_or_explains(len(header).to_bytes(8, "little") + header + bytes(32))


def test_header_nested_too_deeply_is_refused() -> None:
    header = b'{"a":' + b"[" * 100_000
    with pytest.raises(CheckpointError, match="damaged safetensors header"):
        open_bytes(len(header).to_bytes(8, "little") + header)


# Configurations.


CONFIG = {"model_type": MODEL_TYPE, "mm_hidden_size": 48}
FIELDS = [
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers", "vocab_size"),
    *("intermediate_size", "rms_norm_eps", "rope_theta", "rope_parameters", "tokenizer_model_max_length"),
    *("cross_attn_every_n_layers", "cross_attn_min_layer_depth", "cross_attn_max_layer_depth", "decode_mode"),
    *("cross_attn_gating_type", "cross_attn_implementation", "mm_projector_type", "mm_hidden_size", "hidden_act"),
    *("fast_token_spatial_stride", "min_fast_frames", "mm_video_pooling_stride", "mm_vision_tower"),
    *("mm_vision_select_layer", "vision_tower_sizes"),
]


@settings(max_examples=300, deadline=None)
@given(field=st.sampled_from(FIELDS), value=values.filter(lambda v: not isinstance(v, int) or v < 100))
def test_any_value_in_the_configuration_is_taken_or_explained(tree: Tree, field: str, value: object) -> None:
    checkpoint = Checkpoint.open(tree.checkpoint)
    changed = Checkpoint(checkpoint.path, checkpoint.raw_config | {field: value}, checkpoint.shards, checkpoint.tensors)
    with contextlib.suppress(CheckpointError):
        changed.validate()


def test_limits_and_defaults_are_read(tree: Tree) -> None:
    raw = Checkpoint.open(tree.checkpoint).raw_config
    config = ModelConfig.from_dict(raw | {"tokenizer_model_max_length": None, "rope_theta": None})
    assert config.text.max_length is None
    assert config.text.rope_theta == 10000.0
    renamed = ModelConfig.from_dict(raw | {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}})
    assert renamed.text.rope_theta == 5e5


# Layouts on disk.


def hub_cache(checkpoint: Path, root: Path, per_file: bool = False) -> Path:
    """The snapshot directory of a Hugging Face cache: links to blobs named by digest (or each in its own directory)."""
    snapshot = root / "models--demo" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        blob = root / "models--demo" / "blobs" / (digest[:2] if per_file else "") / digest
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../..") / blob.relative_to(root / "models--demo"))
    return snapshot


@pytest.mark.parametrize("weights", ["reference", "copy", "auto"])
def test_hub_cache_is_exported_built_and_asked(weights: str, tree: Tree, tmp_path: Path) -> None:
    snapshot = hub_cache(tree.checkpoint, tmp_path / "hub")
    bundle, engines = tmp_path / "bundle", tmp_path / "engines"
    assert sfexport("export", snapshot, "-o", bundle, "--weights", weights).exit_code == 0
    assert sfexport("build", bundle, "-o", engines).exit_code == 0
    ask = (tree.clip, "-q", "What happens?", "--max-new-tokens", 3, "--json")
    answers = document(sfexport("ask", engines, *ask))["questions"]
    assert answers[0]["ids"] == document(sfexport("ask", tree.engines, *ask))["questions"][0]["ids"]
    shards = {p.name for p in bundle.glob("*.safetensors")}
    assert shards == (set() if weights == "reference" else {FIRST, SECOND})
    assert not any(p.is_symlink() for p in bundle.iterdir())


def test_shards_linked_into_two_directories_must_be_copied(tree: Tree, tmp_path: Path) -> None:
    snapshot = hub_cache(tree.checkpoint, tmp_path / "hub", per_file=True)
    output = ("-o", tmp_path / "engines" / "bundle", "--weights")
    assert_says(
        refusal(tmp_path, "export", snapshot, *output, "reference", after_steps=True),
        snapshot,
        "several",
        "--weights copy",
    )
    assert sfexport("export", snapshot, *output, "copy").exit_code == 0
    assert sfexport("build", tmp_path / "engines" / "bundle", "-o", tmp_path / "engines" / "built").exit_code == 0


def test_checkpoint_in_one_file_is_read(tree: Tree, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    header, data = split_shard(checkpoint / FIRST)
    second, more = split_shard(checkpoint / SECOND)
    for name, entry in second.items():
        if name != "__metadata__":
            header[name] = entry | {"data_offsets": [n + len(data) for n in entry["data_offsets"]]}
    write_shard(checkpoint / "model.safetensors", header, data + more)
    for name in (FIRST, SECOND, INDEX):
        (checkpoint / name).unlink()
    opened, whole = Checkpoint.open(checkpoint), Checkpoint.open(tree.checkpoint)
    opened.validate()
    assert opened.shapes == whole.shapes
    np.testing.assert_array_equal(opened.tensors["model.norm.weight"].rows(), whole.tensors["model.norm.weight"].rows())


def test_layer_scale_may_be_called_gamma(tree: Tree, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    block = "model.vision_tower.vision_tower.stages.0.blocks.0."
    shard = Checkpoint.open(checkpoint).tensors[f"{block}weight"].shard
    edit_header(shard, lambda header: header.update({f"{block}gamma": header.pop(f"{block}weight")}))
    Checkpoint.open(checkpoint).validate()


# Values.


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("offset", [0, 1, 4097])
def test_rows_come_out_as_float32(dtype: str, offset: int, tmp_path: Path) -> None:
    table = np.arange(-6, 6, dtype=np.float32).reshape(4, 3)
    stored = {"F32": table, "F16": table.astype(np.float16), "BF16": Precision.BF16.from_float32(table)}[dtype]
    shard = tmp_path / "shard"
    shard.write_bytes(bytes(offset) + stored.tobytes())
    tensor = Tensor("t", dtype, (4, 3), shard, offset, stored.nbytes)
    np.testing.assert_array_equal(tensor.rows(), table, strict=True)
    np.testing.assert_array_equal(tensor.rows(np.array([2, 0, 2])), table[[2, 0, 2]], strict=True)
