"""Writing a trained model as a checkpoint in the released layout: bf16 safetensors, configuration, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainee import TOWER, make_fields, make_tokenizer

from sfexport.checkpoint.checkpoint import SINGLE_FILE, Checkpoint
from sfexport.demo.scenes import SIZE
from sfexport.model import LlavaQwenSlowFastForCausalLM
from sfexport.testing.random_checkpoint import generation_config, preprocessor_config, save_safetensors_bf16
from sfexport.testing.tokenizer import tokenizer_config

MAX_NEW_TOKENS = 8


def write_checkpoint(lm: LlavaQwenSlowFastForCausalLM, projector: str, path: Path) -> Checkpoint:
    """Write `lm` into the directory `path` (created, files in it replaced) and check that it opens."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    (path / "tokenizer.json").write_bytes(tokenizer.to_str(pretty=True).encode() + b"\n")
    fields = make_fields(projector, bool(lm.config.model_config.slow_fast.hybrid_layers))
    # Answer tokens saw the slow tokens in training, so they do when it answers.
    mode = {"decode_mode": "trained"} if lm.config.model_config.slow_fast.hybrid_layers else {}
    _write(path / "config.json", fields | {"torch_dtype": "bfloat16"} | mode)
    _write(path / "tokenizer_config.json", tokenizer_config(tokenizer, fields["tokenizer_model_max_length"]))
    _write(path / "generation_config.json", generation_config(tokenizer) | {"max_new_tokens": MAX_NEW_TOKENS})
    _write(path / "preprocessor_config.json", preprocessor_config(SIZE))
    weights = {name: value.float().numpy() for name, value in lm.state_dict().items()}
    save_safetensors_bf16(path / SINGLE_FILE, weights)
    checkpoint = Checkpoint.open(path)
    checkpoint.validate()
    assert checkpoint.tower == TOWER
    return checkpoint


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
