"""config.json: every field is applied, known not to matter, refused by name, or named in a note."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_says, refusal, set_fields, sfexport

from sfexport.artifacts.bundle import Bundle
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.config import ModelConfig
from sfexport.checkpoint.config_fields import MAX_FRAMES, ConfigFields
from sfexport.checkpoint.tower_names import named_size, tower_kind
from sfexport.checkpoint.vision_tower import ConvNextTower, VitTower, tower_from_sizes
from sfexport.demo.run import DemoPaths as Tree
from sfexport.errors import CheckpointError
from sfexport.fields import unknown_fields
from sfexport.testing.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="module")
def config(tree: Tree) -> dict[str, Any]:
    """Do not change."""
    return json.loads((tree.checkpoint / "config.json").read_text())


def test_every_field_of_transformers_qwen2_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config()
    assert unknown_fields(ConfigFields, config.to_dict()) == []
    assert unknown_fields(ConfigFields, vars(config)) == []


def test_every_field_of_the_reference_is_known(config: dict) -> None:
    assert unknown_fields(ConfigFields, config) == []
    for file in (Path(__file__).parents[1] / "golden").glob("*/config.json"):
        assert unknown_fields(ConfigFields, json.loads(file.read_text())) == []


# Values that leave the mathematics as it is.
HARMLESS: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 1000000.0, "factor": 1.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 1.0}},
    {"layer_types": ["full_attention"] * 4},
    {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4},
    {"sliding_window": 4096},
    {"attention_bias": True, "mlp_bias": False, "use_mrope": False, "partial_rotary_factor": 1.0},
    {"pruned_heads": {}, "per_layer_config": {}, "is_causal": True},
    {"attention_dropout": 0.5, "dtype": "float64", "attn_implementation": "someone/kernel", "auto_map": {"a": "b"}},
    {"head_dim": 16, "num_key_value_heads": 2},
    {"tokenizer_padding_side": "left"},
    {"do_sample": "yes", "temperature": -1, "id2label": {"0": "a"}},
]


@pytest.mark.parametrize("changes", HARMLESS, ids=str)
def test_a_harmless_value_changes_nothing(changes: dict, config: dict) -> None:
    found, before = ModelConfig.from_dict(config | changes), ModelConfig.from_dict(config)
    assert found == replace(before, text=replace(before.text, padding_side=found.text.padding_side))


BAD_FRAMES = ("many", -3, 1.5, 1e400, 0, 10**9, True, [8], MAX_FRAMES + 1)
REFUSED: list[tuple[dict[str, Any], str]] = [
    # Would change the mathematics.
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, "rope_scaling.type"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 1.0}}, "rope_scaling.rope_type"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "rope_scaling.type"),
    ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "rope_scaling.mrope_section"),
    ({"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}}, "rope_scaling.rope_theta"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_parameters.rope_type"),
    ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_parameters.rope_theta"),
    ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_parameters.rope_theta"),
    ({"rope_parameters": {"rope_theta": 10**400}}, "rope_parameters.rope_theta"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
    ({"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, "use_sliding_window"),
    ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "use_sliding_window"),
    ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "layer_types"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types"),
    ({"attention_bias": False}, "attention_bias"),
    ({"attention_bias": 1}, "attention_bias"),
    ({"qkv_bias": False}, "qkv_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"use_qk_norm": True}, "use_qk_norm"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_act": ["silu"]}, "hidden_act"),
    ({"is_causal": False}, "is_causal"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
    ({"compression_config": {"format": "int"}}, "compression_config"),
    # Of the wrong type: nothing is true or false by its truth.
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    ({"tie_word_embeddings": 0}, "tie_word_embeddings"),
    ({"use_sliding_window": "no"}, "use_sliding_window"),
    ({"mm_use_im_start_end": "false"}, "mm_use_im_start_end"),
    ({"decode_mode": ""}, "decode_mode"),
    ({"decode_mode": ["trained"]}, "decode_mode"),
    ({"tokenizer_padding_side": ""}, "tokenizer_padding_side"),
    ({"tokenizer_padding_side": "middle"}, "tokenizer_padding_side"),
    ({"mm_projector_type": ""}, "mm_projector_type"),
    ({"cross_attn_implementation": ""}, "cross_attn_implementation"),
    ({"tokenizer_model_max_length": 0}, "tokenizer_model_max_length"),
    ({"tokenizer_model_max_length": 10**30}, "tokenizer_model_max_length"),
    ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"head_dim": 15}, "head_dim"),
    ({"head_dim": False}, "head_dim"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    ({"rope_theta": 1e400}, "rope_theta"),
    ({"hidden_size": 64.0}, "hidden_size"),
    *(({"mm_training_video_frames": value}, "mm_training_video_frames") for value in ("many", -3, 1.5, 1e400, 0)),
    *(
        ({"mm_training_video_frames": value}, "mm_training_video_frames")
        for value in (10**9, True, [8], MAX_FRAMES + 1)
    ),
    *(({name: 0}, name) for name in ("cross_attn_every_n_layers", "min_fast_frames", "fast_token_spatial_stride")),
    ({"cross_attn_min_layer_depth": -1}, "cross_attn_min_layer_depth"),
    ({"cross_attn_min_layer_depth": 0.0}, "cross_attn_min_layer_depth"),
]


@pytest.mark.parametrize(("changes", "name"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_value_is_refused_by_name(changes: dict, name: str, config: dict) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json.*{name}"):
        ModelConfig.from_dict(config | changes)


# Against the tensors that are there.
BESIDE_TENSORS: list[tuple[dict[str, Any], list[str]]] = [
    ({"cross_attn_min_layer_depth": 10**9}, ["cross_attn"]),
    ({"cross_attn_min_layer_depth": 1}, ["cross_attn"]),
    ({"cross_attn_max_layer_depth": 1}, ["model.layers.2.self_attn.cross_attn_gate_proj.0.bias"]),
    ({"cross_attn_every_n_layers": None}, ["cross_attn"]),
    ({"cross_attn_every_n_layers": 3}, ["model.layers.3."]),
    ({"cross_attn_gating_type": "whole-dynamic-tanh"}, ["cross_attn_warm_up_gate", "cross_attn_gating_type"]),
    ({"num_hidden_layers": 2}, ["model.layers.2.self_attn.cross_attn"]),
    ({"mm_projector_type": "linear"}, ["model.mm_projector.weight"]),
    ({"mm_projector_type": "mlp1x_gelu"}, ["model.mm_projector.2", "mm_projector_type"]),
    ({"mm_projector_type": "identity"}, ["identity"]),
    ({"mm_vision_tower": "convnext-1000000000"}, ["1000000000 pixels"]),
    ({"mm_vision_tower": "/models/vision"}, ["'/models/vision'", "convnext tower"]),
    ({"mm_vision_tower": "/data/clip/4f1e"}, ["'/data/clip/4f1e'", "convnext tower"]),
]


@pytest.mark.parametrize(("changes", "said"), BESIDE_TENSORS, ids=str)
def test_a_value_that_the_tensors_contradict_is_refused(changes: dict, said: list[str], tree: Tree, tmp_path: Path):
    folder = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    set_fields(folder / "config.json", **changes)
    if "convnext-" in str(changes.get("mm_vision_tower")):
        (folder / "preprocessor_config.json").unlink()
    assert_says(refusal(tmp_path, "export", folder, "-o", tmp_path / "bundle"), *said)


HUGE: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 9_999},
    {"num_hidden_layers": 10**400},
    {"cross_attn_max_layer_depth": 10**9, "vocab_size": 2**31 - 1},
    {"mm_projector_type": "mlp1000000000x_gelu"},
    {"mm_projector_type": "mlp999x_gelu"},
    {"vocab_size": 10**9},
    {"num_attention_heads": 2**31 - 2, "num_key_value_heads": 2, "head_dim": 64},
    {"mm_hidden_size": 10**9},
    {"vision_tower_sizes": {"kind": "convnext", "depths": [10**9], "widths": [16], "stem_patch": 4, "kernel": 7}},
    {"mm_vision_tower": "clip", "mm_vision_select_layer": -(10**9)},
]


@pytest.mark.parametrize("changes", HUGE, ids=lambda value: str(value)[:60])
def test_a_huge_number_is_refused(changes: dict, tree: Tree) -> None:
    checkpoint = Checkpoint.open(tree.checkpoint)
    changed = Checkpoint(checkpoint.path, checkpoint.raw_config | changes, checkpoint.shards, checkpoint.tensors)
    with pytest.raises(CheckpointError):
        changed.validate()


def test_bad_frames_leave_the_earlier_bundle(tree_copy: Tree) -> None:
    set_fields(tree_copy.checkpoint / "config.json", mm_training_video_frames="many")
    arguments = ("export", tree_copy.checkpoint, "-o", tree_copy.bundle)
    assert_says(refusal(tree_copy.root, *arguments), "mm_training_video_frames", "'many'")
    assert Bundle.open(tree_copy.bundle).frames == 16


def test_unknown_fields_are_in_a_note(tree_copy: Tree) -> None:
    set_fields(tree_copy.checkpoint / "config.json", **{f"x{i}": i for i in range(9)}, **{"\x1b[31m": 1})
    printed = sfexport("export", tree_copy.checkpoint, "-o", tree_copy.bundle).stderr
    assert_says(printed, "config.json: not known and not used: '\\x1b[31m', 'x0'", "and 4 more")


# The vision tower's name.

TOWERS = {
    "convnext-576": ("convnext", 576),
    "/data/clips/convnext-576": ("convnext", 576),
    "/data/clips/siglip/convnext-64/": ("convnext", 64),
    "C:\\models\\clip\\convnext-128": ("convnext", 128),
    "laion/CLIP-convnext_xxlarge-laion2B": ("convnext", None),
    "/models/clip-data/google/siglip-so400m": ("siglip", None),
    "google/siglip-so400m-patch14-384": ("siglip", 384),
    "openai/clip-vit-large-patch14-336": ("clip", 336),
    "/convnext/openai/clip-vit-large": ("clip", None),
    "laion/CLIP-ViT-H-14": ("clip", 14),
    "/hub/models--openai--clip-vit-large-patch14/snapshots/ce19dc9": ("clip", None),
}


@pytest.mark.parametrize("name", TOWERS)
def test_the_towers_name_is_its_last_component(name: str) -> None:
    assert (tower_kind({"mm_vision_tower": name}), named_size({"mm_vision_tower": name})) == TOWERS[name]


@pytest.mark.parametrize("name", ["", "/", "dinov2", "/data/eva/vit"])
def test_a_tower_nobody_knows_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="unknown mm_vision_tower"):
        tower_kind({"mm_vision_tower": name})


def test_the_tensors_decide_where_the_last_component_says_nothing(tmp_path: Path) -> None:
    tower = VitTower("siglip", 48, 2, 3, 64, 14, 70, -2, 1e-6, "gelu_tanh")
    changes = {"mm_vision_num_attention_heads": 3, "mm_vision_tower": "/clips/siglip/4f1e"}
    write_random_checkpoint(tmp_path / "checkpoint", tower=tower, changes=changes)
    assert Checkpoint.open(tmp_path / "checkpoint").tower == tower


SIZES = {"kind": "convnext", "depths": [1, 1], "widths": [16, 32], "stem_patch": 4, "kernel": 7, "layer_norm_eps": 1e-5}
VIT = {"kind": "clip", "width": 64, "num_layers": 3, "num_heads": 2, "intermediate_size": 96, "patch": 14}
VIT |= {"image_size": 56, "select_layer": -2, "layer_norm_eps": 1e-5, "activation": "quick_gelu"}


def test_recorded_sizes_are_read() -> None:
    assert tower_from_sizes(SIZES) == ConvNextTower((1, 1), (16, 32), 4, 7)
    assert tower_from_sizes(VIT).num_layers_used == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"depths": [1, 10**9]},
        {"depths": 2},
        {"depths": [1, True]},
        {"widths": [16]},
        {"kernel": 10**12},
        {"layer_norm_eps": "1e-5"},
        {"layer_norm_eps": 0.0},
        VIT | {"select_layer": -5},
        VIT | {"select_layer": 2.0},
        VIT | {"num_layers": 10**9},
        VIT | {"num_heads": 3},
        VIT | {"activation": "gelu"},
        VIT | {"kind": "dino"},
    ],
    ids=str,
)
def test_recorded_sizes_without_meaning_are_refused(changes: dict) -> None:
    with pytest.raises(CheckpointError):
        tower_from_sizes(changes if "kind" in changes else SIZES | changes)
