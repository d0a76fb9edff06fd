"""Read generation_config.json: every field of transformers' GenerationConfig (5.0 to 5.24).

A field is applied, known not to change tokens here, or refused by name.
Transformers' own rules hold: what acts when sampling only is ignored by a greedy model, an absent or null `top_k` is
50, `max_new_tokens` comes before `max_length`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from sfexport.checkpoint.small_files import read_optional_json
from sfexport.errors import CheckpointError
from sfexport.fields import LARGEST, Count, Fields, Index, read_fields, shown, unknown_fields

FILE = "generation_config.json"
HINT = "Correct it and export again."
_Whole = Annotated[int, msgspec.Meta(ge=-LARGEST, le=LARGEST)]
_Sequence = Annotated[list[Index], msgspec.Meta(min_length=1)]
# What acts when sampling only.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


class GenerationConfig(Fields, frozen=True, kw_only=True):
    """The fields of generation_config.json. The defaults are transformers', except for the length of an answer."""

    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(
        {
            # Beams, caches, speed and what is returned.
            *("early_stopping", "length_penalty", "use_cache", "cache_config", "max_cache_len", "low_memory"),
            *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "compile_config"),
            *("return_dict_in_generate", "disable_compile", "continuous_batching_config", "prefill_chunk_size"),
            # The prompt enters as embeddings: there are no ids that these could look at.
            *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "decoder_start_token_id"),
            *("pad_token_id", "bos_token_id"),
            # Speculation without loss: the same tokens in less time.
            *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "prompt_lookup_num_tokens"),
            *("assistant_confidence_threshold", "max_matching_ngram_size", "assistant_early_exit"),
            *("assistant_lookbehind", "target_lookbehind", "speculation_type"),
            *("_commit_hash", "_from_model_config", "transformers_version"),
        }
    )

    max_new_tokens: Count | None = None
    max_length: Count | None = None
    min_new_tokens: Index | None = None
    min_length: Index = 0
    eos_token_id: Index | list[Index] | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: _Whole = 50
    top_p: float = 1.0
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: Index = 0
    bad_words_ids: Annotated[list[_Sequence], msgspec.Meta(min_length=1)] | None = None
    sequence_bias: Annotated[list[tuple[_Sequence, float]], msgspec.Meta(min_length=1)] | None = None
    suppress_tokens: list[_Whole] | None = None
    begin_suppress_tokens: list[_Whole] | None = None
    forced_bos_token_id: Index | None = None
    forced_eos_token_id: Index | list[Index] | None = None
    exponential_decay_length_penalty: tuple[Index, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    # Read to be refused where they are set (see NEUTRAL).
    num_beams: _Whole = 1
    num_beam_groups: _Whole = 1
    num_return_sequences: _Whole = 1
    diversity_penalty: float = 0.0
    penalty_alpha: float = 0.0
    guidance_scale: float = 1.0
    cache_implementation: str | None = None
    token_healing: bool = False
    use_mtp: bool = False
    dola_layers: Any = None
    constraints: Any = None
    force_words_ids: Any = None
    watermarking_config: Any = None
    stop_strings: Any = None
    max_time: Any = None
    assistant_ensemble_weight: Any = None
    logits_processor: Any = None
    stopping_criteria: Any = None
    prefix_allowed_tokens_fn: Any = None
    assistant_model: Any = None
    negative_prompt_ids: Any = None
    negative_prompt_attention_mask: Any = None


# Fields that would change tokens in a way that is not built, with the values that change nothing; and what to do.
_BEAMS = "beam search is not built"
NEUTRAL: dict[str, tuple[Any, str]] = {
    "num_beams": (1, _BEAMS),
    "num_beam_groups": (1, _BEAMS),
    "diversity_penalty": (0.0, _BEAMS),
    "constraints": (None, _BEAMS),
    "force_words_ids": (None, _BEAMS),
    "num_return_sequences": (1, "a question has one answer"),
    "penalty_alpha": (0.0, "contrastive search is not built"),
    "dola_layers": (None, "decoding by contrasting layers is not built"),
    "guidance_scale": (1.0, "classifier-free guidance is not built"),
    "watermarking_config": (None, "watermarks are not built"),
    "token_healing": (False, "prompts are used as they are"),
    "use_mtp": (False, "the model has no layers that predict several tokens"),
    "assistant_ensemble_weight": (None, "assistant models are not used"),
    "assistant_model": (None, "assistant models are not used"),
    "stop_strings": (None, "ask with --stop, which takes a text of one token"),
    "max_time": (None, "answers are limited by max_new_tokens"),
    **dict.fromkeys(
        ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"),
        (None, "it is an argument of generate(), not a field"),
    ),
    **dict.fromkeys(
        ("negative_prompt_ids", "negative_prompt_attention_mask"),
        (None, "it is an argument of generate(), not a field"),
    ),
}


def read_generation_config(values: Mapping[str, Any]) -> GenerationConfig:
    """Read the fields of generation_config.json.

    Raises:
        CheckpointError: a field has the wrong type, is out of range, or asks for what is not built.
    """
    config = read_fields(GenerationConfig, values, FILE, hint=HINT)
    if config.exponential_decay_length_penalty and not abs(config.exponential_decay_length_penalty[1]) <= 1e30:
        raise CheckpointError(f"{FILE}: the factor of 'exponential_decay_length_penalty' is not a finite number.", HINT)
    if any(not bias <= 1e30 for _, bias in config.sequence_bias or ()):  # -inf forbids a sequence
        raise CheckpointError(f"{FILE}: 'sequence_bias' has a bias that is not a finite number.", HINT)
    for name, (neutral, reason) in NEUTRAL.items():
        if (value := getattr(config, name)) != neutral:
            raise CheckpointError(f"{FILE}: '{name}' is {shown(value)}, which is not supported: {reason}.", HINT)
    if config.cache_implementation == "quantized":
        raise CheckpointError(
            f"{FILE}: 'cache_implementation' is 'quantized', which is not supported: K and V are kept as they are.",
            HINT,
        )
    return config


def generation_notes(directory: Path) -> list[str]:
    """List, for `export` and `inspect`, the fields that are ignored, or why the file cannot be used."""
    try:
        values = read_optional_json(directory / FILE)
        return [] if values is None else ignored_fields(values)
    except CheckpointError as error:
        return [f"questions cannot be asked (sfexport ask): {error}"]


def ignored_fields(values: Mapping[str, Any]) -> list[str]:
    """List the fields that are ignored: those of sampling for a greedy model, and unknown ones."""
    config, notes = read_generation_config(values), []
    default = GenerationConfig()
    idle = [name for name in SAMPLING if getattr(config, name) != getattr(default, name)]
    if idle and not config.do_sample:
        notes.append(f"{FILE}: {', '.join(idle)} ignored: do_sample is not true")
    if config.max_length is not None and config.max_new_tokens is not None:
        notes.append(f"{FILE}: max_length ignored: max_new_tokens comes before it")
    if unknown := unknown_fields(GenerationConfig, values):
        notes.append(f"{FILE}: unknown fields ignored: {shown(', '.join(unknown))}")
    return notes
