"""The hybrid decoder: embeddings in, last-position logits and K/V out. Mirrors sfexport/model/hybrid_decoder.py.

Inputs  inputs_embeds   [batch, sequence, H]
        position_ids    int64 [batch, sequence]
        attention_mask  bool [batch, sequence]         False: padding
        prefix_key_values.<i>.key / .value  [1, kv heads, prefix, head_dim], keys after RoPE; shared by all rows
        past_key_values.<i>.key / .value  [batch, kv heads, capacity, head_dim]; each row's own, after the prefix
        past_lengths    int64 [batch]                  valid positions of past_key_values; the rest is ignored
        slow_attends    bool [batch, sequence]         positions that query the slow tokens
        slow_lengths    int64 [videos]                 slow tokens of each video (0: none); videos is 1 or batch
        slow_key_values.<k>.key / .value  [videos, kv heads, slow, head_dim]
Outputs logits          float32 [batch, V]             of the last position
        best_tokens     int64 [batch]                  the largest logit's; only in the form for TensorRT
        logit_sums      float32 [batch]                not finite if a logit is not; only in the form for TensorRT
        new_key_values.<i>.key / .value  [batch, kv heads, sequence, head_dim]: the step's own positions

prefix, capacity and slow may be 0. A position sees the prefix, the row's valid past and the step's positions up to
itself. The caller copies the new K/V behind the valid past; the graph copies a row's own K/V, which are few, and never
the prefix's.

A model without hybrid layers has no slow_* input. For tools that look inside, some values have fixed names:
`hidden_states.<i+1>` leaves layer i, `hybrid_self_attn.<i>` and `hybrid_attn_out.<i>` stand before and after the
cross-attention of hybrid layer i (all [batch * sequence, width]).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sfexport.checkpoint.config import GateConfig, ModelConfig
from sfexport.graphs.cross_attention import (
    DOMAIN,
    MASKED,
    OP_TYPE,
    PLUGIN_ATTRIBUTES,
    cross_attention_function,
)
from sfexport.graphs.initializers import Weights, even_parts, head_name
from sfexport.graphs.names import (
    BEST_TOKENS,
    EMBEDS,
    LOGIT_SUMS,
    LOGITS,
    MASK,
    PAST_LENGTHS,
    POSITIONS,
    SLOW_ATTENDS,
    SLOW_LENGTHS,
    hidden_name,
    new_names,
    past_names,
    prefix_names,
    slow_names,
)
from sfexport.graphs.self_attention import AttentionInParts, FusedAttention, SelfAttention
from sfexport.graphs.writer import INT4_OPSET, OPSET, GraphWriter, Shape

_END = np.iinfo(np.int64).max  # of a Slice: as far as the axis goes


@dataclass
class _Shared:
    """Values that every layer uses.

    Attributes:
        rows: int64 [2], batch and sequence.
        query_shape: int64 [4], of the query's heads before they are transposed; worked out once, since a small step is
            as many nodes as it is numbers.
        key_shape: int64 [4], of the key's and value's heads before they are transposed.
        cos: [batch, 1, sequence, head_dim], both halves of head_dim alike.
        sin: the same shape, the first half negated.
        self_attention: writes a layer's self-attention.
        prefix: K and V by layer, shared by all rows.
        past: K and V by layer, each row's own.
        slow: K and V by hybrid layer.
        attends: bool [batch, sequence], positions that attend to slow tokens; None without a slow branch.
        lengths: int64 [videos], numbers of slow tokens; None without a slow branch.
    """

    rows: ir.Value
    query_shape: ir.Value
    key_shape: ir.Value
    cos: ir.Value
    sin: ir.Value
    self_attention: SelfAttention
    prefix: dict[int, tuple[ir.Value, ir.Value]]
    past: dict[int, tuple[ir.Value, ir.Value]]
    slow: dict[int, tuple[ir.Value, ir.Value]]
    attends: ir.Value | None
    lengths: ir.Value | None


def build_decoder(
    config: ModelConfig,
    weights: Weights,
    dtype: ir.DataType = ir.DataType.FLOAT,
    head_parts: int = 1,
    for_tensorrt: bool = False,
    layers: range | None = None,
) -> ir.Model:
    """Build the decoder's graph, or that of some of its layers.

    Args:
        head_parts: number of pieces the language-model head is computed in.
        for_tensorrt: write attention and an 8-bit head in the form that TensorRT fuses, and add the output best_tokens.
            ONNX Runtime runs that too, but slower.
        layers: consecutive layers; None: all. Where others come before, the graph takes their last hidden state
            [batch, sequence, H] in the place of inputs_embeds; where others follow, it returns its own in the place of
            the logits. Both have hidden_name's name.
    """
    g = GraphWriter("decoder", weights, dtype, INT4_OPSET if weights.has_int4 else OPSET)
    text, layers = config.text, layers or range(config.text.num_layers)
    shape: Shape = ["batch", "sequence", text.hidden_size]
    embeds = g.input(hidden_name(layers.start - 1) if layers.start else EMBEDS, dtype, shape)
    # Without 16-bit K and V there is no fused kernel.
    fused = for_tensorrt and dtype != ir.DataType.FLOAT
    shared = _write_inputs(g, config, layers, embeds, fused)
    x = g.reshape(embeds, -1, text.hidden_size)
    new = []
    for i in layers:
        with g.scope(f"layers.{i}"):
            x, key_value = _write_layer(g, config, shared, x, i)
            if i + 1 < layers.stop or layers.stop == text.num_layers:  # else it is an output's name
                x.name = hidden_name(i)
            new += key_value
    if layers.stop == text.num_layers:
        _write_head(g, config, shared, x, head_parts, for_tensorrt)
    else:
        whole = g.op("Reshape", x, g.op("Concat", shared.rows, g.ints(text.hidden_size), axis=0))
        g.output(hidden_name(layers.stop - 1), whole, dtype, shape)
    for name, value in zip(new_names(config, layers), new, strict=True):
        g.output(name, value, dtype, ["batch", text.num_kv_heads, "sequence", text.head_dim])
    return g.model([cross_attention_function(g.opset, fused)] if shared.slow else [])


def _write_inputs(g: GraphWriter, config: ModelConfig, layers: range, embeds: ir.Value, fused: bool) -> _Shared:
    positions = g.input(POSITIONS, ir.DataType.INT64, ["batch", "sequence"])
    mask = g.input(MASK, ir.DataType.BOOL, ["batch", "sequence"])
    prefix = _key_value_inputs(g, config, prefix_names(config, layers), 1, "prefix")
    past = _key_value_inputs(g, config, past_names(config, layers), "batch", "capacity")
    past_lengths = g.input(PAST_LENGTHS, ir.DataType.INT64, ["batch"])
    slow = _key_value_inputs(g, config, slow_names(config, layers), "videos", "slow")
    attends = lengths = None
    if slow:
        attends = g.input(SLOW_ATTENDS, ir.DataType.BOOL, ["batch", "sequence"])
        lengths = g.input(SLOW_LENGTHS, ir.DataType.INT64, ["videos"])
    with g.scope("rotary"):
        cos, sin = _write_rotary(g, config, positions)
    hybrid = [i for i in config.slow_fast.hybrid_layers if i in layers]
    by_layer = dict(zip(hybrid, slow, strict=True))
    with g.scope("shapes"):
        prefix_length = g.dims(prefix[0][0], 2, 3)
        cached = g.op("Add", prefix_length, g.dims(past[0][0], 2, 3))
        rows, batch, sequence = (g.dims(embeds, *span) for span in ((0, 2), (0, 1), (1, 2)))
        heads = (config.text.num_heads, config.text.num_kv_heads)
        query, key = (g.op("Concat", rows, g.ints(n, config.text.head_dim), axis=0) for n in heads)
    with g.scope("mask"):
        bias = _write_mask(g, embeds, mask, past_lengths, prefix_length, cached)
    with g.scope("self_attn"):
        attention: SelfAttention = (
            FusedAttention(g, config.text, batch, bias)
            if fused
            else AttentionInParts(g, config.text, batch, sequence, prefix_length, cached, bias)
        )
    shared, own = (dict(zip(layers, values, strict=True)) for values in (prefix, past))
    return _Shared(rows, query, key, cos, sin, attention, shared, own, by_layer, attends, lengths)


def _key_value_inputs(
    g: GraphWriter, config: ModelConfig, names: list[str], rows: str | int, length: str
) -> list[tuple[ir.Value, ir.Value]]:
    shape: Shape = [rows, config.text.num_kv_heads, length, config.text.head_dim]
    values = [g.input(name, g.dtype, shape) for name in names]
    return list(zip(values[::2], values[1::2], strict=True))


def _write_rotary(g: GraphWriter, config: ModelConfig, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Write cos and sin of position * theta^(-2i/d), in float32 because positions pass 2^11; see _rotate."""
    dim = config.text.head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    inverse = (1.0 / np.power(np.float32(config.text.rope_theta), exponents)).astype(np.float32)
    at = g.op("Unsqueeze", g.op("Cast", positions, to=int(ir.DataType.FLOAT)), g.ints(1, 3))
    angles = g.op("Mul", at, g.constant(inverse, "inv_freq"))
    cos, sin = (g.from_float32(g.op(function, angles)) for function in ("Cos", "Sin"))
    return g.op("Concat", cos, cos, axis=-1), g.op("Concat", g.op("Neg", sin), sin, axis=-1)


def _write_mask(
    g: GraphWriter, embeds: ir.Value, mask: ir.Value, past_lengths: ir.Value, prefix: ir.Value, cached: ir.Value
) -> ir.Value:
    """Write the mask as a bias over the prefix, the past and the step's own positions.

    Args:
        past_lengths: int64 [batch].
        prefix: [1], positions of the prefix.
        cached: [1], positions of the prefix and of the past's capacity.
    """
    zero, one = (g.constant(np.array(i, dtype=np.int64)) for i in (0, 1))
    stored, sequence = g.op("Squeeze", cached, g.ints(0)), g.op("Squeeze", g.dims(embeds, 1, 2), g.ints(0))
    # Places before the past are negative, which every length exceeds.
    places = g.op("Sub", g.op("Range", zero, stored, one), prefix)
    valid = g.op("Less", g.op("Unsqueeze", places, g.ints(0)), g.op("Unsqueeze", past_lengths, g.ints(1)))
    seen = g.op("Unsqueeze", g.op("Concat", valid, mask, axis=1), g.ints(1))
    keys = g.op("Unsqueeze", g.op("Range", g.op("Neg", stored), sequence, one), g.ints(0))
    queries = g.op("Unsqueeze", g.op("Range", zero, sequence, one), g.ints(1))
    allowed = g.op("And", g.op("LessOrEqual", keys, queries), seen)
    bias = g.op("Where", allowed, g.float32(0.0), g.float32(MASKED))
    return g.op("Unsqueeze", bias, g.ints(1, 2))


def _write_layer(
    g: GraphWriter, config: ModelConfig, shared: _Shared, x: ir.Value, i: int
) -> tuple[ir.Value, list[ir.Value]]:
    """Write a layer: x [batch * sequence, H] -> the same shape, and the layer's present K and V."""
    p, eps = f"model.layers.{i}.", config.text.rms_norm_eps
    with g.scope("self_attn"):
        normed = g.rms_norm(x, f"{p}input_layernorm", eps)
        attended, present = _write_attention(g, config, shared, normed, i)
    x = g.op("Add", x, attended)
    with g.scope("mlp"):
        y = g.rms_norm(x, f"{p}post_attention_layernorm", eps)
        gate = g.linear(y, f"{p}mlp.gate_proj", bias=False)
        silu = g.op("Mul", gate, g.op("Sigmoid", gate))
        y = g.op("Mul", silu, g.linear(y, f"{p}mlp.up_proj", bias=False))
        y = g.linear(y, f"{p}mlp.down_proj", bias=False)
    return g.op("Add", x, y), present


def _write_attention(
    g: GraphWriter, config: ModelConfig, shared: _Shared, x: ir.Value, i: int
) -> tuple[ir.Value, list[ir.Value]]:
    text, p = config.text, f"model.layers.{i}.self_attn."

    def project(name: str, shape: ir.Value) -> ir.Value:
        return g.transpose(g.heads(x, f"{p}{name}", shape, text.head_dim), 0, 2, 1, 3)

    query = _rotate(g, shared, project("q_proj", shared.query_shape))
    # Scaled here rather than after the product, because the cross-attention takes a scaled query too.
    query = g.op("Mul", query, g.scalar(text.head_dim**-0.5))
    key, value = _rotate(g, shared, project("k_proj", shared.key_shape)), project("v_proj", shared.key_shape)
    own = [g.op("Concat", past, new, axis=2) for past, new in zip(shared.past[i], (key, value), strict=True)]
    output = shared.self_attention(query, shared.prefix[i], (own[0], own[1]))
    if i in shared.slow:
        output.name = f"hybrid_self_attn.{i}"
        with g.scope("cross_attn"):
            output = g.op("Add", output, _write_cross_attention(g, config, shared, query, output, i))
        output.name = f"hybrid_attn_out.{i}"
    return g.linear(output, f"{p}o_proj", bias=False), [key, value]


def _rotate(g: GraphWriter, shared: _Shared, x: ir.Value) -> ir.Value:
    """Write the rotary embedding of [batch, heads, sequence, d]: the halves of d are the pairs' two coordinates."""
    a, b = g.split(x, 2, axis=-1)
    turned = g.op("Mul", g.op("Concat", b, a, axis=-1), shared.sin)
    return g.op("Add", g.op("Mul", x, shared.cos), turned)


def _write_cross_attention(
    g: GraphWriter, config: ModelConfig, shared: _Shared, query: ir.Value, output: ir.Value, i: int
) -> ir.Value:
    """Write gate(self-attention output) * context -> [batch * sequence, heads * d]."""
    if config.slow_fast.gate is None:
        raise ValueError("a hybrid layer needs a gate")
    inputs = (query, *shared.slow[i], shared.attends, shared.lengths)
    context = g.op(OP_TYPE, *inputs, domain=DOMAIN, **PLUGIN_ATTRIBUTES)
    context = g.reshape(context, -1, config.text.num_heads * config.text.head_dim)
    gate = _write_gate(g, config.slow_fast.gate, output, f"model.layers.{i}.self_attn.")
    return g.op("Mul", gate, context)


def _write_gate(g: GraphWriter, gate: GateConfig, output: ir.Value, p: str) -> ir.Value:
    value = g.linear(output, f"{p}cross_attn_gate_proj.0")
    if gate.dynamic_tanh:
        value = g.op("Tanh", value)
    if gate.warm_up:
        warm_up = g.weight(f"{p}cross_attn_warm_up_gate")
        value = g.op("Mul", value, g.op("Tanh", warm_up) if gate.warm_up_tanh else warm_up)
    return value


def _write_head(
    g: GraphWriter, config: ModelConfig, shared: _Shared, x: ir.Value, parts: int, for_tensorrt: bool
) -> None:
    """Write the logits of the last position, in pieces where one matrix of the whole vocabulary is too large."""
    text = config.text
    shape = g.op("Concat", shared.rows, g.ints(text.hidden_size), axis=0)
    # A slice, because TensorRT does not define a Gather with a negative index.
    last = g.op("Slice", g.op("Reshape", x, shape), g.ints(-1), g.ints(_END), g.ints(1))
    normed = g.rms_norm(g.op("Squeeze", last, g.ints(1)), "model.norm", text.rms_norm_eps)
    name, product = head_name(config.text), g.scaled_linear if for_tensorrt else g.float32_linear
    spans = even_parts(text.vocab_size, parts) if parts > 1 else [None]
    pieces = [product(normed, name, rows) for rows in spans]
    logits = g.op("Concat", *pieces, axis=1) if parts > 1 else pieces[0]
    g.output(LOGITS, logits, ir.DataType.FLOAT, ["batch", text.vocab_size])
    if for_tensorrt:
        g.output(BEST_TOKENS, g.op("ArgMax", logits, axis=1, keepdims=0), ir.DataType.INT64, ["batch"])
        sums = g.op("ReduceSum", logits, g.ints(1), keepdims=0)
        g.output(LOGIT_SUMS, sums, ir.DataType.FLOAT, ["batch"])
