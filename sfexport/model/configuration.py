"""The transformers configuration of a Slow-Fast model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transformers import PretrainedConfig

from sfexport.checkpoint.config import MODEL_TYPE, ModelConfig
from sfexport.checkpoint.vision_tower import CONVNEXT_XXL, Tower, tower_from_sizes

logger = logging.getLogger(__name__)

# Fields that transformers' own code reads, and their values where a file leaves them out.
_DEFAULTS = {
    "use_cache": True,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


class LlavaQwenSlowFastConfig(PretrainedConfig):
    """The fields of config.json, kept as they are; `model_config` interprets them.

    Two fields are sfexport's own: `decode_mode` ('released' or 'trained') and `vision_tower_sizes`. Released files do
    not store the latter: `from_pretrained` reads them from the tensors.

    `attn_implementation` in a file is ignored: the attention is this model's own, and the name of a kernel must not
    make transformers look for code.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(self, **kwargs: Any) -> None:
        for name in ("attn_implementation", "_attn_implementation"):
            value = kwargs.pop(name, None)
            if value not in (None, "eager", "sdpa"):
                logger.warning("%s %r is not used: the model's attention is its own.", name, str(value)[:100])
        # These are set after transformers' __init__, which drops some and rewrites others, each version in its own way.
        names = ("rope_theta", "rope_scaling", "rope_parameters")
        rope: dict[str, Any] = {name: kwargs.pop(name) for name in names if name in kwargs}
        own = {name: kwargs.pop(name, default) for name, default in _DEFAULTS.items()}
        super().__init__(**kwargs)
        for name, value in own.items():
            setattr(self, name, value)
        self._set_rope(rope)

    def _set_rope(self, given: Mapping[str, Any]) -> None:
        """Keep `rope_theta` and whatever else there is as `rope_parameters` (its old name is `rope_scaling`)."""
        parameters = given.get("rope_parameters") or given.get("rope_scaling")
        if "rope_theta" in given:
            self.rope_theta = given["rope_theta"]
        if parameters is not None:
            self.rope_parameters = parameters

    @property
    def model_config(self) -> ModelConfig:
        """The parsed fields. Raises CheckpointError naming a field without meaning."""
        return ModelConfig.from_dict(vars(self) | {"model_type": MODEL_TYPE})

    @property
    def tower(self) -> Tower:
        """The vision tower's sizes; default those of ConvNeXt-XXL, the released one."""
        sizes = getattr(self, "vision_tower_sizes", None)
        return tower_from_sizes(sizes) if sizes else CONVNEXT_XXL

    def set_tower(self, tower: Tower) -> None:
        """Record the tower's sizes as plain values, so that the configuration can be saved."""
        self.vision_tower_sizes = asdict(tower)
