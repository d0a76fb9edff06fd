"""The transformers configuration of a Slow-Fast model. May import sfexport.facts and sfexport.towers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import Qwen2Config

from sfexport.facts import MODEL_TYPE, ModelFacts
from sfexport.towers import CONVNEXT_XXL, Tower, tower_from_sizes


class LlavaQwenSlowFastConfig(Qwen2Config):
    """Qwen2's fields plus the reference's `mm_*`, `cross_attn_*` and `fast_token_*` fields, kept as they are.

    Two fields are ours: `decode_mode` ('released' or 'trained', see DECODE_MODES) and `vision_tower_sizes`, the
    tower's sizes, which released files do not store: `from_pretrained` reads them from the tensors.
    """

    model_type = MODEL_TYPE

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs["rope_scaling"] = None  # the reference forces it
        super().__post_init__(**kwargs)

    @property
    def facts(self) -> ModelFacts:
        """The parsed fields; raises CheckpointError naming a field without meaning."""
        return ModelFacts.from_config(vars(self) | {"model_type": MODEL_TYPE})

    @property
    def tower(self) -> Tower:
        """The vision tower's sizes; ConvNeXt-XXL, the released one, where nothing says otherwise."""
        sizes = getattr(self, "vision_tower_sizes", None)
        return tower_from_sizes(sizes) if sizes else CONVNEXT_XXL

    def set_tower(self, tower: Tower) -> None:
        """Record the tower's sizes as plain values, so that the configuration can be saved."""
        self.vision_tower_sizes = asdict(tower)
