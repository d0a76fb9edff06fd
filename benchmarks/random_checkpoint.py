"""Checkpoints of real sizes with random weights, written tensor by tensor: bf16 shards, tokenizer, side files.

    python benchmarks/random_checkpoint.py 0.5b DIR      1.3 GB; a tiny vision tower
    python benchmarks/random_checkpoint.py 7b DIR        17 GB; the released model's sizes, ConvNeXt-XXL included

For measuring: zeros would be deduplicated by runtimes, and take no disk. Answers mean nothing. Needs memory for some
millions of weights only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sparse_checkpoint import QWEN2_7B, bf16_header  # noqa: E402

from sfexport.checkpoint.config import ModelConfig  # noqa: E402
from sfexport.checkpoint.vision_tower import CONVNEXT_XXL, Tower  # noqa: E402
from sfexport.dtypes import Precision
from sfexport.testing.random_checkpoint import (  # noqa: E402
    IMAGE_SIZE,
    TOWER,
    demo_config,
    generation_config,
    preprocessor_config,
    random_tensor,
)
from sfexport.testing.tokenizer import tokenizer_config, train_tokenizer  # noqa: E402

AT_ONCE = 8 << 20  # weights
SHARD_BYTES = 4 << 30
QWEN2_SMALL: dict[str, Any] = QWEN2_7B | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "cross_attn_max_layer_depth": 24,
    "vocab_size": 151936,
    "mm_hidden_size": TOWER.out_size,
}
# Configuration, vision tower, pixels of a frame's side.
SIZES: dict[str, tuple[dict[str, Any], Tower, int]] = {
    "0.5b": (QWEN2_SMALL, TOWER, IMAGE_SIZE),
    "7b": (QWEN2_7B, CONVNEXT_XXL, 576),
}


def write_random_checkpoint(path: Path, size: str = "0.5b", seed: int = 0) -> int:
    """Write one of SIZES into the new directory `path`; returns the bytes of its weights."""
    changes, tower, pixels = SIZES[size]
    path.mkdir(parents=True)
    tokenizer = train_tokenizer()
    config = demo_config(tokenizer) | {"mm_vision_tower": f"convnext-{pixels}"} | changes
    files = {
        "tokenizer_config.json": tokenizer_config(tokenizer, config["tokenizer_model_max_length"]),
        "generation_config.json": generation_config(tokenizer),
        "preprocessor_config.json": preprocessor_config(pixels),
        "config.json": config,
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=2))
    tokenizer.save(str(path / "tokenizer.json"))
    shapes = ModelConfig.from_dict(config).expected_tensors() | tower.expected_tensors()
    shards = list(_shards(shapes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(path / file, shard, seed)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if shard and sum(2 * math.prod(s) for s in (*shard.values(), shape)) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _write_shard(file: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    with file.open("wb") as out:
        out.write(bf16_header(shapes)[0])
        for name, shape in shapes.items():
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            for rows in _row_chunks(shape):
                out.write(Precision.BF16.from_float32(random_tensor(name, rows, rng)).tobytes())


def _row_chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Shapes of runs of rows that make up `shape`; how a tensor is distributed depends on its name and rows' shape."""
    step = max(1, AT_ONCE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield (min(step, shape[0] - start), *shape[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    total = write_random_checkpoint(options.path, options.size, options.seed)
    print(f"{total / 1e9:.2f} GB of weights in {options.path}")


if __name__ == "__main__":
    main()
