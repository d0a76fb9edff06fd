"""Kinds of damaged config.json and preprocessor_config.json, and changes that mean nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from helpers import set_fields

from fuzz.base import CHECKPOINT, Reading, expect_same, through_checkpoint, whole
from fuzz.kinds import Case, Expect, Kind, Wrong
from fuzz.oracle import same_as_torch

REFUSED, ANSWERED, EITHER = Expect.REFUSED, Expect.ANSWERED, Expect.EITHER
Damage = Callable[[Path], object]


# Values of the wrong kind for any field. JSON has no NaN, and Python's reader takes it.
NONSENSE: dict[str, Any] = {
    "text": "abc",
    "number as text": "4",
    "empty text": "",
    "'false' as text": "false",
    "negative": -3,
    "zero": 0,
    "fraction": 2.5,
    "huge": 10**9,
    "beyond 64 bits": 10**30,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "true": True,
    "list": [4],
    "object": {"a": 1},
    "null": None,
    "escapes": "\x1b[31mred\x1b]0;title\x07\u202e",
    "long text": "x" * 300_000,
}
_TEXTS = ("text", "number as text", "empty text", "'false' as text", "escapes", "long text")
_HOLDERS = ("list", "object")
_ODD = ("NaN", "infinite")
# What a field of each type cannot be. The rest may mean something: then PyTorch has to agree.
NEVER = {
    "count": {*_TEXTS, *_HOLDERS, *_ODD, "negative", "zero", "fraction", "beyond 64 bits", "true"},
    "index": {*_TEXTS, *_HOLDERS, *_ODD, "negative", "fraction", "beyond 64 bits", "true"},
    "number": {*_TEXTS, *_HOLDERS, *_ODD, "negative", "zero", "true"},
    "flag": {*_TEXTS, *_HOLDERS, *_ODD, "negative", "zero", "fraction", "huge", "beyond 64 bits"},
    "choice": set(NONSENSE) - {"null"},
    "free": set(),
}
CONFIG = {
    "count": (
        "hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads vocab_size "
        "mm_hidden_size mm_video_pooling_stride cross_attn_every_n_layers fast_token_spatial_stride "
        "fast_token_temporal_stride fast_token_temporal_sampling_stride min_fast_frames mm_training_video_frames "
        "tokenizer_model_max_length head_dim"
    ),
    "index": "cross_attn_min_layer_depth cross_attn_max_layer_depth",
    "number": "rms_norm_eps rope_theta",
    "flag": "tie_word_embeddings use_sliding_window mm_use_im_start_end",
    "choice": (
        "model_type cross_attn_gating_type cross_attn_implementation mm_projector_type mm_vision_tower hidden_act "
        "decode_mode"
    ),
    "free": (
        "_name_or_path architectures attention_dropout initializer_range transformers_version torch_dtype dtype "
        "use_cache mm_projector_lr tune_mm_mlp_adapter use_mm_proj max_position_embeddings max_window_layers "
        "attn_implementation _attn_implementation auto_map image_aspect_ratio tile_image_input bos_token_id "
        "pad_token_id unheard_of"
    ),
}
PREPROCESSOR = {
    "flag": "do_center_crop do_normalize do_rescale do_resize",
    "size": "size crop_size",
    "triple": "image_mean image_std",
    "other": "resample rescale_factor",
    "free": "do_convert_rgb image_processor_type processor_class unheard_of",
}
NEVER["size"] = set(NONSENSE) - {"null", "huge", "number as text"} | {"number as text"}
NEVER["triple"] = set(NONSENSE) - {"null"}
NEVER["other"] = set(NONSENSE) - {"null", "huge", "fraction", "zero"}


def _field(file: str, field: str, value: Any) -> Damage:
    return lambda path: set_fields(path / file, **{field: value})


def _config_kinds() -> Iterator[Kind]:
    for kind, fields in CONFIG.items():
        for field in fields.split():
            for name, value in NONSENSE.items():
                never = name in NEVER[kind]
                right = expect_same if kind == "free" else same_as_torch
                yield Kind(
                    f"config.json {field}: {name}",
                    "config",
                    partial(through_checkpoint, damage=_field("config.json", field, value), right=right),
                    REFUSED if never else EITHER,
                    needs_torch=not never and kind != "free",
                )


def _preprocessor_kinds() -> Iterator[Kind]:
    for kind, fields in PREPROCESSOR.items():
        for field in fields.split():
            for name, value in NONSENSE.items():
                yield Kind(
                    f"preprocessor_config.json {field}: {name}",
                    "pictures",
                    partial(
                        through_checkpoint,
                        damage=_field("preprocessor_config.json", field, value),
                        right=_expect_rescaled if (field, name) == ("rescale_factor", "fraction") else expect_same,
                    ),
                    REFUSED if name in NEVER[kind] else EITHER,
                )


def _expect_rescaled(case: Case, found: Reading) -> None:
    """Raises Wrong unless pixels are (v f - mean) / std, as transformers' image processors define it."""
    fields = json.loads((case.base / CHECKPOINT / "preprocessor_config.json").read_text(encoding="utf-8"))
    mean, std = (np.array(fields[name]).reshape(3, 1, 1) for name in ("image_mean", "image_std"))
    values = (whole(case.base).pixels * std + mean) * 255
    wanted = (values * NONSENSE["fraction"] - mean) / std
    if not np.abs(found.pixels - wanted).max() <= 1e-4 * np.abs(wanted).max():
        raise Wrong(f"pixels are off by {np.abs(found.pixels - wanted).max():.3g}")


# Values that mean something: applied, or refused by name; what PyTorch makes of the checkpoint is the measure.
MEANT: dict[str, dict[str, Any]] = {
    "tied head beside a stored one": {"tie_word_embeddings": True},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
    "longrope": {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
    "partial rotary": {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "rope_type": "default"}},
    "rope_parameters by layer type": {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "default rope named": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "another base in rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "bases that disagree": {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "mrope": {"rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]}},
    "an unknown rope": {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}},
    "sliding window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    "layer types": {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8},
    "fewer layers": {"num_hidden_layers": 3},
    "one layer": {"num_hidden_layers": 1},
    "cross-attention from layer 2": {"cross_attn_min_layer_depth": 2},
    "cross-attention to layer 2": {"cross_attn_max_layer_depth": 2},
    "cross-attention beyond the layers": {"cross_attn_max_layer_depth": 10**9},
    "cross-attention after the last layer": {"cross_attn_min_layer_depth": 10**9},
    "no cross-attention whose tensors are there": {"cross_attn_every_n_layers": None},
    "cross-attention in every layer": {"cross_attn_every_n_layers": 1},
    "gating without warm-up": {"cross_attn_gating_type": "whole-dynamic-tanh"},
    "gating without tanh": {"cross_attn_gating_type": "whole-dynamic-warmup"},
    "all positions attend": {"cross_attn_implementation": "vanilla"},
    "text after the video attends": {"cross_attn_implementation": "text-only-vanilla-masksystem"},
    "trained mode": {"decode_mode": "trained"},
    "another epsilon": {"rms_norm_eps": 0.1},
    "an epsilon below float32": {"rms_norm_eps": 1e-300},
    "more heads": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
    "as many key heads": {"num_key_value_heads": 4},
    "a smaller vocabulary": {"vocab_size": 64},
    "three projector layers": {"mm_projector_type": "mlp3x_gelu"},
    "a billion projector layers": {"mm_projector_type": "mlp1000000000x_gelu"},
    "an SReLU projector without tensors": {"mm_projector_type": "mlp2x_srelu"},
    "identity projector": {"mm_projector_type": "identity"},
    "a tower path with 'clip' in it": {"mm_vision_tower": "/data/clips/convnext-576"},
    "last features": {"mm_vision_select_layer": -1},
    "class features": {"mm_vision_select_feature": "cls_patch"},
    "another merge": {"mm_patch_merge_type": "spatial_unpad"},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "an unknown quantisation": {"quantization_config": {"quant_method": "\x1b[1mmine", "bits": -1}},
    "quantisation as text": {"quantization_config": "gptq"},
    "a bias where there is none": {"attention_bias": False, "mlp_bias": True},
    "left padding": {"tokenizer_padding_side": "left"},
    "start and end marks": {"mm_use_im_start_end": True},
    "a nested text_config": {"text_config": {"hidden_size": 32, "num_hidden_layers": 2}},
    "remote code": {"auto_map": {"AutoModelForCausalLM": "hub/name--modeling.Model"}},
    "remote attention": {"attn_implementation": "kernels-community/flash-attn"},
    "float8": {"torch_dtype": "float8_e4m3fn"},
}


def _meant_kinds() -> Iterator[Kind]:
    for name, fields in MEANT.items():
        damage = partial(_set, fields=fields)
        act = partial(through_checkpoint, damage=damage, right=same_as_torch)
        yield Kind(f"config.json, {name}", "config", act, needs_torch=True)


def _set(path: Path, fields: dict[str, Any]) -> None:
    set_fields(path / "config.json", **fields)


def _harmless_kinds() -> Iterator[Kind]:
    """Changes that mean nothing: the answer is the undamaged one."""
    for name, damage in HARMLESS.items():
        yield Kind(f"harmless: {name}", "config", partial(through_checkpoint, damage=damage), ANSWERED)


def _rewrite(name: str, **style: Any) -> Damage:
    def change(path: Path) -> None:
        content = json.loads((path / name).read_text(encoding="utf-8"))
        (path / name).write_text(json.dumps(content, **style), encoding="utf-8")

    return change


HARMLESS: dict[str, Damage] = {
    "config.json with other white space": _rewrite("config.json", indent=8),
    "config.json in one line": _rewrite("config.json", separators=(",", ":")),
    "config.json with an unknown field": _field("config.json", "unheard_of", {"a": [1, None, "x"]}),
    "tokenizer.json in one line": _rewrite("tokenizer.json"),
    "an empty rope_scaling": _field("config.json", "rope_scaling", None),
    "a file that nobody knows": lambda path: (path / "notes.txt").write_text("hello"),
    "a directory that nobody knows": lambda path: (path / "runs").mkdir(),
    "a .gitattributes": lambda path: (path / ".gitattributes").write_text("* binary"),
    "a training state": lambda path: (path / "trainer_state.json").write_text("{}"),
    "another torch_dtype": _field("config.json", "torch_dtype", "float32"),
    "transformers' newer name of the type": _field("config.json", "dtype", "bfloat16"),
    "another transformers_version": _field("config.json", "transformers_version", "99.0"),
}


KINDS = [*_config_kinds(), *_meant_kinds(), *_preprocessor_kinds(), *_harmless_kinds()]
