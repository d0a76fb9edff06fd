"""Read config.json: every field that transformers' Qwen2, the reference and sfexport give a meaning.

A field is applied (an attribute of `ConfigFields`), known not to change what sfexport computes (IRRELEVANT), or
refused by name where it would change the mathematics. Names that nobody knows are reported (`unknown_fields`), as
transformers ignores them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec

from sfexport.errors import CheckpointError
from sfexport.fields import Count, Fields, Index, read_fields, shown

HINT = "Take config.json from the model's own download."
# Far beyond any model; keeps a slip or a hostile number from filling the memory.
MAX_LAYERS = 10_000
MAX_FRAMES = 65_536
Layers = Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)]
Frames = Annotated[int, msgspec.Meta(ge=1, le=MAX_FRAMES)]
Epsilon = Annotated[float, msgspec.Meta(gt=0, le=1)]
Base = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]

# Qwen2Config's defaults where sliding windows are asked for.
_WINDOW, _FULL_LAYERS = 4096, 28
# Values (besides null) that leave the mathematics as it is, for fields that change it.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (True,),
    "qkv_bias": (True,),
    "mlp_bias": (False,),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "use_mrope": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1, 1.0),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "fusion_config": ({},),
    "compression_config": (),
    "transformers_weights": (),
}
# The same within rope_parameters or rope_scaling; other names there are refused.
_ROPE = {
    "type": ("default",),
    "rope_type": ("default",),
    "factor": (1, 1.0),
    "partial_rotary_factor": (1, 1.0),
    "attention_factor": (1, 1.0),
}
_ROPE_IRRELEVANT = {"rope_theta", "original_max_position_embeddings", "max_position_embeddings"}

_TRANSFORMERS = """
    _name_or_path name_or_path _commit_hash transformers_version architectures auto_map dtype torch_dtype use_bfloat16
    attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset
    experts_implementation _experts_implementation _experts_implementation_internal _flash_attn_2_enabled
    _output_attentions _auto_class _post_init_done _pre_quantization_dtype ignore_keys_at_rope_validation
    output_attentions output_hidden_states return_dict torchscript use_return_dict tf_legacy_loss
    chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder tie_last_hidden_states finetuning_task id2label label2id num_labels problem_type
    task_specific_params tokenizer_class prefix sep_token_id decoder_start_token_id pad_token_id bos_token_id
    eos_token_id use_cache initializer_range attention_dropout max_position_embeddings distributed_config
    gradient_checkpointing pretraining_tp classifier_dropout hidden_dropout embd_pdrop resid_pdrop
"""
# Old files keep them here; transformers 5 drops them for generation_config.json's.
_GENERATION = """
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens epsilon_cutoff eta_cutoff encoder_repetition_penalty
"""
# Read by the reference in training only, or not at all.
_REFERENCE = """
    cross_attn_head_num cross_attn_kv_head_num cross_attn_use_mlp image_aspect_ratio image_grid_pinpoints
    image_crop_resolution image_split_resolution tile_image_input tune_mm_mlp_adapter freeze_mm_mlp_adapter
    unfreeze_mm_vision_tower mm_projector_lr mm_vision_tower_lr mm_tunable_parts use_mm_proj mm_use_im_patch_token
    vision_tower_pretrained pretrain_mm_mlp_adapter initialize_cross_attn_kv_from_lm cross_attention_layer_lr
"""


class ConfigFields(Fields, frozen=True, kw_only=True):
    """The fields of config.json that sfexport applies or checks; None: absent or null.

    Attributes:
        mm_training_video_frames: frames sampled from a video where the user asks for no other number.
        decode_mode: sfexport's own field.
        vision_tower_sizes: sfexport's own field.
        mm_vision_num_attention_heads: sfexport's own field.
    """

    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(f"{_TRANSFORMERS} {_GENERATION} {_REFERENCE}".split())

    model_type: str | None = None
    # Qwen2.
    hidden_size: Count | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    intermediate_size: Count | None = None
    vocab_size: Count | None = None
    rms_norm_eps: Epsilon | None = None
    tie_word_embeddings: bool = False
    hidden_act: Any = None
    rope_theta: Base | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: Any = None
    use_sliding_window: bool = False
    sliding_window: Count | None = None
    max_window_layers: Index | None = None
    layer_types: list[str] | None = None
    attention_bias: Any = None
    qkv_bias: Any = None
    mlp_bias: Any = None
    use_qk_norm: Any = None
    qk_norm: Any = None
    use_mrope: Any = None
    is_causal: Any = None
    use_bidirectional_attention: Any = None
    pruned_heads: Any = None
    per_layer_config: Any = None
    fusion_config: Any = None
    transformers_weights: Any = None
    compression_config: Any = None
    quantization_config: Any = None
    # The reference.
    tokenizer_model_max_length: Count | None = None
    tokenizer_padding_side: Text | None = None
    cross_attn_every_n_layers: Count | None = None
    cross_attn_min_layer_depth: Index | None = None
    cross_attn_max_layer_depth: Index | None = None
    cross_attn_implementation: Text | None = None
    cross_attn_gating_type: Text | None = None
    fast_token_temporal_sampling_stride: Count | None = None
    fast_token_temporal_stride: Count | None = None
    fast_token_spatial_stride: Count | None = None
    min_fast_frames: Count | None = None
    mm_video_pooling_stride: Count | None = None
    mm_projector_type: Text | None = None
    mm_hidden_size: Count | None = None
    mm_vision_tower: Any = None
    mm_vision_select_layer: Any = None
    mm_vision_select_feature: Text | None = None
    mm_patch_merge_type: Text | None = None
    mm_use_im_start_end: bool = False
    mm_training_video_frames: Frames | None = None
    # sfexport.
    decode_mode: Text | None = None
    vision_tower_sizes: dict[str, Any] | None = None
    mm_vision_num_attention_heads: Any = None

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> ConfigFields:
        """Read and check the fields.

        Raises:
            CheckpointError: naming a field of the wrong type or out of range, or one that changes the mathematics.
        """
        fields = read_fields(cls, raw, "config.json", hint=HINT)
        for name, allowed in _MUST_BE.items():
            _check(name, getattr(fields, name), allowed)
        _check_rope("rope_parameters", fields.rope_parameters)
        _check_rope("rope_scaling", fields.rope_scaling)
        fields._check_layer_types("sliding_window" in raw)
        if fields.tokenizer_padding_side not in (None, "left", "right"):
            raise wrong("tokenizer_padding_side", fields.tokenizer_padding_side, "'left' or 'right'")
        return fields

    def needed(self, name: str) -> Any:
        """Return the value of a field that the model cannot do without."""
        value = getattr(self, name)
        if value is None:
            raise CheckpointError(f"config.json has no value for '{name}', which this model needs.", HINT)
        return value

    @property
    def rotary_base(self) -> float:
        """Return RoPE's base: rope_parameters (transformers 5) come first, then rope_theta (the released files)."""
        inner = (self.rope_parameters or {}).get("rope_theta")
        value = inner if inner is not None else self.rope_theta
        outer = (self.rope_scaling or {}).get("rope_theta")
        value = value if value is not None else 10000.0
        if outer is not None and outer != value:
            raise wrong("rope_scaling.rope_theta", outer, f"absent, or {value!r} as elsewhere in the file")
        return float(value)

    def _check_layer_types(self, has_window: bool) -> None:
        layers = self.needed("num_hidden_layers")
        types = self.layer_types
        if types is not None and (len(types) != layers or set(types) - {"full_attention", "attention"}):
            raise wrong("layer_types", types, f"'full_attention' for each of the {layers} layers")
        window = self.sliding_window if has_window else _WINDOW
        full = _FULL_LAYERS if self.max_window_layers is None else self.max_window_layers
        if self.use_sliding_window and window is not None and types is None and full < layers:
            raise CheckpointError(
                "config.json asks for sliding-window attention (use_sliding_window), which sfexport does not export.",
                "Export a model of full attention.",
            )


def wrong(name: str, value: Any, wanted: str) -> CheckpointError:
    """Make the error for a field whose value cannot be used."""
    return CheckpointError(
        f"config.json: '{name}' is {shown(value)}; sfexport exports models where it is {wanted}.", HINT
    )


def _check(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that is not one of `allowed`, types included: 1 is not True."""
    if value is not None and not any(type(value) is type(other) and value == other for other in allowed):
        raise wrong(name, value, " or ".join(dict.fromkeys(map(repr, allowed))) or "absent")


def _check_rope(name: str, rope: dict[str, Any] | None) -> None:
    for key, value in (rope or {}).items():
        if key in _ROPE:
            _check(f"{name}.{key}", value, _ROPE[key])
        elif key not in _ROPE_IRRELEVANT:
            raise wrong(f"{name}.{key}"[:100], value, "absent")
    theta = (rope or {}).get("rope_theta")
    if theta is not None and (type(theta) not in (int, float) or not 0 < theta <= 1e30):
        raise CheckpointError(f"config.json: '{name}.rope_theta' must be a positive number, not {shown(theta)}.", HINT)
