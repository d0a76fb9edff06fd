"""The compressor: slow tokens -> fast tokens, and slow K/V per hybrid layer. Mirrors sfexport/model/compressor.py.

Inputs  slow_tokens    [frames, P, H]
        frame_weights  [fast_frames, frames]  float32, from fast_path.frame_weights
        cell_weights   [fast_cells, P]        float32, only where fast tokens are pooled in space too
Outputs fast_tokens    [fast_frames * fast_cells, H]
        slow_key_values.<k>.key / .value   [1, kv heads, frames * P, head_dim], k-th hybrid layer
"""

from __future__ import annotations

import onnx_ir as ir

from sfexport.checkpoint.config import ModelConfig
from sfexport.graphs.initializers import Weights
from sfexport.graphs.names import CELL_WEIGHTS, FAST_TOKENS, FRAME_WEIGHTS, SLOW_TOKENS, slow_names
from sfexport.graphs.writer import GraphWriter, Shape


def build_compressor(config: ModelConfig, weights: Weights, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    g = GraphWriter("compressor", weights, dtype)
    hidden = config.text.hidden_size
    slow = g.input(SLOW_TOKENS, dtype, ["frames", "cells", hidden])
    with g.scope("fast_path"):
        _write_fast_path(g, config, slow)
    flat = g.reshape(slow, -1, hidden)
    names = iter(slow_names(config))
    for layer in config.slow_fast.hybrid_layers:
        with g.scope(f"layers.{layer}"):
            _write_slow_key_values(g, config, flat, layer, (next(names), next(names)))
    return g.model()


def _write_fast_path(g: GraphWriter, config: ModelConfig, slow: ir.Value) -> None:
    """Write means in float32 whatever the tokens' type: the weights (1/3, say) are not exact in any other."""
    hidden = config.text.hidden_size
    weights = g.input(FRAME_WEIGHTS, ir.DataType.FLOAT, ["fast_frames", "frames"])
    by_frame = g.op("Flatten", g.to_float32(slow), axis=1)
    frames = g.op("MatMul", weights, by_frame)
    if config.slow_fast.fast.spatial_stride > 1:
        cells = g.input(CELL_WEIGHTS, ir.DataType.FLOAT, ["fast_cells", "cells"])
        shape = g.op("Concat", g.ints(-1), g.dims(slow, 1, 3), axis=0)
        frames = g.op("MatMul", cells, g.op("Reshape", frames, shape))
    tokens = g.from_float32(g.reshape(frames, -1, hidden))
    g.output(FAST_TOKENS, tokens, g.dtype, ["fast_tokens", hidden])


def _write_slow_key_values(
    g: GraphWriter, config: ModelConfig, flat: ir.Value, layer: int, names: tuple[str, str]
) -> None:
    """Write RMSNorm and projection of one hybrid layer; the projection's rows lie head by head, K then V."""
    text, p = config.text, f"model.layers.{layer}."
    normed = g.rms_norm(flat, f"{p}input_layernorm", text.rms_norm_eps)
    packed = g.linear(normed, f"{p}self_attn.cross_attn_kv_proj")
    packed = g.reshape(packed, -1, text.num_kv_heads, 2, text.head_dim)
    # [Ls, kv heads, 2, d] -> [2, kv heads, Ls, d] -> two of [1, kv heads, Ls, d]
    key_value = g.split(g.transpose(packed, 2, 1, 0, 3), 2, axis=0)
    shape: Shape = [1, text.num_kv_heads, "slow_tokens", text.head_dim]
    for name, value in zip(names, key_value, strict=True):
        g.output(name, value, g.dtype, shape)
