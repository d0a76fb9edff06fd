"""Names of the graphs' inputs and outputs: what builders write and backends feed."""

from __future__ import annotations

from sfexport.checkpoint.config import ModelConfig

# vision_encoder
PIXELS = "pixel_values"
SLOW_TOKENS = "slow_tokens"  # also the compressor's input
PROJECTED = "projected_features"

# compressor
FRAME_WEIGHTS = "frame_weights"
CELL_WEIGHTS = "cell_weights"
FAST_TOKENS = "fast_tokens"

# decoder
EMBEDS = "inputs_embeds"
POSITIONS = "position_ids"
MASK = "attention_mask"
PAST_LENGTHS = "past_lengths"
SLOW_ATTENDS = "slow_attends"
SLOW_LENGTHS = "slow_lengths"
LOGITS = "logits"
NEW_KEY_VALUES = "new_key_values"
# Only in the form for TensorRT.
BEST_TOKENS = "best_tokens"
LOGIT_SUMS = "logit_sums"

# Values inside a graph that keep a name, for tools that look there.
FEATURES = "vision_features"


def slow_names(config: ModelConfig, layers: range | None = None) -> list[str]:
    """Name slow K/V, key and value by hybrid layer (of `layers`, or all): compressor outputs, decoder inputs."""
    hybrid = [k for k, i in enumerate(config.slow_fast.hybrid_layers) if layers is None or i in layers]
    return [f"slow_key_values.{k}.{x}" for k in hybrid for x in ("key", "value")]


def prefix_names(config: ModelConfig, layers: range | None = None) -> list[str]:
    """Name the K/V of the positions that all rows share, key and value by layer: decoder inputs."""
    return _text_names("prefix_key_values", config, layers)


def past_names(config: ModelConfig, layers: range | None = None) -> list[str]:
    """Name each row's own K/V before a step, in the order of prefix_names: decoder inputs."""
    return _text_names("past_key_values", config, layers)


def new_names(config: ModelConfig, layers: range | None = None) -> list[str]:
    """Name the K/V of a step's own positions, in the order of prefix_names: decoder outputs."""
    return _text_names(NEW_KEY_VALUES, config, layers)


def _text_names(kind: str, config: ModelConfig, layers: range | None) -> list[str]:
    return [f"{kind}.{i}.{x}" for i in layers or range(config.text.num_layers) for x in ("key", "value")]


def hidden_name(layer: int) -> str:
    """Name the output of decoder layer `layer`."""
    return f"hidden_states.{layer + 1}"
