"""A full-size checkpoint that takes no disk: real headers, sparse data (zeros). For measuring export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sfexport.checkpoint.config import ModelConfig
from sfexport.checkpoint.vision_tower import CONVNEXT_XXL

SHARDS = 4
QWEN2_7B: dict[str, Any] = {
    "architectures": ["LlavaQwenSlowFastForCausalLM"],
    "model_type": "llava_qwen_slow_fast",
    "cross_attn_every_n_layers": 8,
    "cross_attn_gating_type": "whole-dynamic-tanh-warmup",
    "cross_attn_implementation": "text-only-vanilla-flashattn",
    "cross_attn_max_layer_depth": 28,
    "cross_attn_min_layer_depth": 0,
    "fast_token_spatial_stride": 1,
    "fast_token_temporal_sampling_stride": 1,
    "fast_token_temporal_stride": 4,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "min_fast_frames": 16,
    "mm_hidden_size": 3072,
    "mm_projector_type": "mlp2x_gelu",
    "mm_training_video_frames": 64,
    "mm_video_pooling_stride": 2,
    "mm_vision_tower": "convnext-576",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right",
    "vocab_size": 152064,
}


def write_sparse_checkpoint(path: Path, config: dict[str, Any] | None = None) -> int:
    """Write headers and empty data of a bf16 checkpoint; returns the bytes its weights pretend to have."""
    config = config or QWEN2_7B
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    shapes = ModelConfig.from_dict(config).expected_tensors() | CONVNEXT_XXL.expected_tensors()
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(SHARDS)]
    written = 0
    for name, shape in shapes.items():
        shards[min(SHARDS * written // total, SHARDS - 1)][name] = shape
        written += 2 * math.prod(shape)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        _write_sparse_shard(path / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def bf16_header(shapes: dict[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """A safetensors file's first bytes, length included, and the bytes of the tensors that follow."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def _write_sparse_shard(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, length = bf16_header(shapes)
    with file.open("wb") as out:
        out.write(header)
        out.truncate(len(header) + length)
