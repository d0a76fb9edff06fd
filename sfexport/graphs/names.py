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
SLOW_ATTENDS = "slow_attends"
SLOW_LENGTHS = "slow_lengths"
LOGITS = "logits"

# Values inside a graph that keep a name, for tools that look there.
FEATURES = "vision_features"


def slow_names(config: ModelConfig) -> list[str]:
    """Name slow K/V, key and value by hybrid layer: compressor outputs, decoder inputs."""
    return [f"slow_key_values.{k}.{x}" for k in range(len(config.slow_fast.hybrid_layers)) for x in ("key", "value")]


def past_names(config: ModelConfig) -> list[str]:
    """Name text K/V before a step, key and value by layer."""
    return [f"past_key_values.{i}.{x}" for i in range(config.text.num_layers) for x in ("key", "value")]


def present_names(config: ModelConfig) -> list[str]:
    """Name text K/V after a step, in the order of past_names."""
    return [name.replace("past_key_values", "present") for name in past_names(config)]


def hidden_name(layer: int) -> str:
    """Name the output of decoder layer `layer`."""
    return f"hidden_states.{layer + 1}"
