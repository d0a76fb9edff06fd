"""A tiny random checkpoint in exactly the layout of the released ones: configuration, weights, side files.

For tests; the trained model's side files are made with the same functions. It goes every step of the way, but its
answers mean nothing. Which tensors there are is asked of `sfexport.checkpoint`.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sfexport.checkpoint.checkpoint import INDEX_FILE
from sfexport.checkpoint.config import MODEL_TYPE, TOWER_PREFIX, ModelConfig, Shapes
from sfexport.checkpoint.image_processor import CLIP_MEAN, CLIP_STD
from sfexport.checkpoint.safetensors import write_header
from sfexport.checkpoint.vision_tower import ConvNextTower, Tower, VitTower
from sfexport.dtypes import Precision
from sfexport.errors import InputError
from sfexport.testing.tokenizer import END_OF_TEXT, IM_END, tokenizer_config, train_tokenizer

TOWER = ConvNextTower(depths=(1, 1, 2, 1), widths=(16, 24, 32, 48), stem_patch=4, kernel=7)
CONFIG_FILE = "config.json"
IMAGE_SIZE = 128  # pixels; 4 x 4 tokens per frame, 2 x 2 after pooling
MAX_LENGTH = 1024  # tokens
TRANSFORMERS_VERSION = "4.45.1"  # the reference's
# Mean and standard deviation: a leaky ReLU whose right piece is in use too, with t_right well above t_left.
_SRELU = {"t_right": (1.0, 0.1), "a_right": (0.7, 0.1), "t_left": (-0.2, 0.1), "a_left": (0.2, 0.05)}
_LAYER_SCALE = re.compile(re.escape(TOWER_PREFIX) + r"stages\.\d+\.blocks\.\d+\.weight$")


def write_random_checkpoint(
    path: Path, seed: int = 0, tower: Tower = TOWER, changes: Mapping[str, Any] | None = None
) -> None:
    """Write the checkpoint into the directory `path`: 0.75 MB, 4 decoder layers of width 64, two bf16 shards.

    The same seed gives the same bytes. A new directory appears when it is whole; an empty one is
    filled then, config.json last.

    Args:
        tower, changes: another vision tower, and other values for fields of config.json.

    Raises:
        InputError: `path` is a file or a directory that is not empty (it stays as it was), or it cannot be written.
    """
    path = Path(path).absolute()
    try:
        _refuse_unless_free(path)
        # An empty directory is filled and not replaced: it may be a mount point or somebody's working directory.
        home = path if path.exists() else path.parent
        home.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".sfexport-demo-", dir=home) as parent:
            draft = Path(parent) / path.name
            draft.mkdir()
            _write_files(draft, seed, tower, changes or {})
            _move(draft, path)
    except OSError as error:
        raise InputError(
            f"The demo checkpoint cannot be written to {path}: {error}.", "Choose another directory."
        ) from error


def _move(draft: Path, path: Path) -> None:
    if not path.exists():
        draft.rename(path)
        return
    for file in sorted(draft.iterdir(), key=lambda file: file.name == CONFIG_FILE):  # last: no checkpoint without it
        file.rename(path / file.name)


def _refuse_unless_free(path: Path) -> None:
    if path.is_dir():
        if any(path.iterdir()):
            raise InputError(
                f"The directory {path} is not empty.", "Choose a new or empty directory for the demo checkpoint."
            )
    elif path.exists() or path.is_symlink():
        raise InputError(f"{path} is not a directory.", "Choose a new or empty directory for the demo checkpoint.")


def _write_files(directory: Path, seed: int, tower: Tower, changes: Mapping[str, Any]) -> None:
    tokenizer = train_tokenizer()
    config = demo_config(tokenizer) | {"mm_hidden_size": tower.out_size} | dict(changes)
    (directory / "tokenizer.json").write_bytes(tokenizer.to_str(pretty=True).encode() + b"\n")
    _write_json(directory / "tokenizer_config.json", tokenizer_config(tokenizer, MAX_LENGTH))
    _write_json(directory / CONFIG_FILE, config)
    _write_json(directory / "generation_config.json", generation_config(tokenizer))
    size = tower.image_size if isinstance(tower, VitTower) else IMAGE_SIZE
    _write_json(directory / "preprocessor_config.json", preprocessor_config(size))
    tensors = {
        name: random_tensor(name, shape, np.random.default_rng([seed, zlib.crc32(name.encode())]))
        for name, shape in _all_shapes(config, tower).items()
    }
    # No token stands behind the vocabulary's padding: a logit of 0 keeps greedy decoding away from it.
    if "lm_head.weight" in tensors:
        tensors["lm_head.weight"][tokenizer.get_vocab_size() :] = 0
    _write_shards(directory, tensors)


def demo_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of config.json: every field that the reference's training script writes."""
    size = tokenizer.get_vocab_size()
    return {
        "_name_or_path": "sfexport-demo",
        "architectures": ["LlavaQwenSlowFastForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "cross_attn_every_n_layers": 2,
        "cross_attn_gating_type": "whole-dynamic-tanh-warmup",
        "cross_attn_implementation": "text-only-vanilla-flashattn",
        "cross_attn_max_layer_depth": 4,
        "cross_attn_min_layer_depth": 0,
        "eos_token_id": tokenizer.token_to_id(IM_END),
        "fast_token_spatial_stride": 1,
        "fast_token_temporal_sampling_stride": 1,
        "fast_token_temporal_stride": 4,
        "hidden_act": "silu",
        "hidden_size": 64,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 32768,
        "max_window_layers": 4,
        "min_fast_frames": 4,
        "mm_hidden_size": TOWER.out_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_training_video_frames": 16,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_video_pooling_stride": 2,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"convnext-{IMAGE_SIZE}",
        "model_type": MODEL_TYPE,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "tile_image_input": False,
        "tokenizer_model_max_length": MAX_LENGTH,
        "tokenizer_padding_side": "right",
        "torch_dtype": "bfloat16",
        "transformers_version": TRANSFORMERS_VERSION,
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vocab_size": 64 * (size // 64 + 1),
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of generation_config.json: greedy, ends at the end of the turn."""
    end_of_text, im_end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(IM_END)
    return {
        "bos_token_id": end_of_text,
        "do_sample": False,
        "eos_token_id": [im_end, end_of_text],
        "max_new_tokens": 32,
        "pad_token_id": end_of_text,
        "transformers_version": TRANSFORMERS_VERSION,
    }


def preprocessor_config(size: int) -> dict[str, Any]:
    """Return the content of preprocessor_config.json for square frames of `size` pixels."""
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(CLIP_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_bytes(text.encode() + b"\n")


def _all_shapes(config: Mapping[str, Any], tower: Tower) -> Shapes:
    """Return the shapes of the model's tensors, and of those that released files store and the model does not use.

    The latter are a ConvNeXt's head, or a ViT's last layers.
    """
    shapes = ModelConfig.from_dict(config).expected_tensors()
    if isinstance(tower, VitTower):
        return shapes | replace(tower, select_layer=-1).expected_tensors()
    width, head = tower.out_size, TOWER_PREFIX + "head."
    unused = {f"{head}norm.weight": (width,), f"{head}norm.bias": (width,)}
    classifier = {f"{head}fc.weight": (1000, width), f"{head}fc.bias": (1000,)}
    return {**shapes, **tower.expected_tensors(), **unused, **classifier}


def random_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw float32 values for one tensor, scaled so that activations stay near 1 and the gates are open."""
    mean, deviation = _distribution(name, shape)
    return np.float32(mean) + np.float32(deviation) * rng.standard_normal(shape, dtype=np.float32)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the mean and standard deviation for a tensor of this name."""
    if name.endswith("cross_attn_warm_up_gate"):
        return 0.8, 0.0
    if name.endswith("cross_attn_gate_proj.0.bias"):
        return 0.8, 0.3
    if name.endswith(".bias"):
        return 0.0, 0.05
    if _LAYER_SCALE.match(name):
        return 0.5, 0.05
    if (parameter := name.rpartition(".")[2]) in _SRELU:
        return _SRELU[parameter]
    if len(shape) == 1:  # the weight of a norm
        return 1.0, 0.1
    if name.endswith("embed_tokens.weight"):
        return 0.0, 1.0
    gain = 2.0 if name == "lm_head.weight" else 1.0  # logits far enough apart for a stable greedy choice
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def _write_shards(directory: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write two shards of about half the bytes each, in the order of `tensors`, and their index."""
    total = sum(2 * values.size for values in tensors.values())
    shards: list[dict[str, np.ndarray]] = [{}, {}]
    written = 0
    for name, values in tensors.items():
        shards[int(2 * written >= total)][name] = values
        written += 2 * values.size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_safetensors_bf16(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def save_safetensors_bf16(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write float32 arrays as bfloat16 into a safetensors file, sorted by name.

    Needs no safetensors library, which only the extra `torch` installs.
    """
    stored = {name: Precision.BF16.from_float32(tensors[name]) for name in sorted(tensors)}
    entries = ((name, Precision.BF16.safetensors, array.shape) for name, array in stored.items())
    header, _ = write_header(entries, file, "pt")
    file.write_bytes(b"".join([header, *(array.tobytes() for array in stored.values())]))
