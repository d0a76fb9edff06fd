"""The hybrid decoder: embeddings in, last-position logits and K/V out. Mirrors sfexport/model/hybrid_decoder.py.

Inputs  inputs_embeds   [batch, sequence, H]
        position_ids    int64 [batch, sequence]
        attention_mask  bool [batch, past + sequence]  False: padding
        past_key_values.<i>.key / .value  [batch, kv heads, past, head_dim], keys after RoPE; past may be 0
        slow_attends    bool [batch, sequence]         positions that query the slow tokens
        slow_lengths    int64 [batch]                  slow tokens of each row (0: none)
        slow_key_values.<k>.key / .value  [batch, kv heads, slow, head_dim]; slow may be 0
Outputs logits          float32 [batch, V]             of the last position
        present.<i>.key / .value  [batch, kv heads, past + sequence, head_dim]

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
    EMBEDS,
    LOGITS,
    MASK,
    POSITIONS,
    SLOW_ATTENDS,
    SLOW_LENGTHS,
    hidden_name,
    past_names,
    present_names,
    slow_names,
)
from sfexport.graphs.writer import INT4_OPSET, OPSET, GraphWriter, Shape

_END = np.iinfo(np.int64).max  # of a Slice: as far as the axis goes


@dataclass
class _Shared:
    """Values that every layer uses.

    Shapes, int64: worked out once, since a small step is as many nodes as it is numbers.

    Attributes:
        shape: [2], batch and sequence.
        query_shape: [4], of the query's heads before they are transposed.
        key_shape: [4], of the key's and value's heads before they are transposed.
        heads_shape: [4], of the query.
        scores_shape: [4], the query heads of a kv head in one matrix.
        by_head_shape: [5], the scores head by head.
        cos: [batch, 1, sequence, head_dim], both halves of head_dim alike.
        sin: the same shape, the first half negated.
        bias: float32 [batch, 1, 1, sequence, past + sequence], 0 or MASKED.
        past: K and V by layer.
        slow: K and V by hybrid layer.
        attends: bool [batch, sequence], positions that attend to slow tokens; None without a slow branch.
        lengths: int64 [batch], numbers of slow tokens; None without a slow branch.
    """

    shape: ir.Value
    query_shape: ir.Value
    key_shape: ir.Value
    heads_shape: ir.Value
    scores_shape: ir.Value
    by_head_shape: ir.Value
    cos: ir.Value
    sin: ir.Value
    bias: ir.Value
    past: list[tuple[ir.Value, ir.Value]]
    slow: dict[int, tuple[ir.Value, ir.Value]]
    attends: ir.Value | None
    lengths: ir.Value | None


def build_decoder(
    config: ModelConfig, weights: Weights, dtype: ir.DataType = ir.DataType.FLOAT, head_parts: int = 1
) -> ir.Model:
    """Build the decoder's graph.

    Args:
        head_parts: number of pieces the language-model head is computed in.
    """
    g = GraphWriter("decoder", weights, dtype, INT4_OPSET if weights.has_int4 else OPSET)
    text = config.text
    embeds = g.input(EMBEDS, dtype, ["batch", "sequence", text.hidden_size])
    shared = _write_inputs(g, config, embeds)
    x = g.reshape(embeds, -1, text.hidden_size)
    presents = []
    for i in range(text.num_layers):
        with g.scope(f"layers.{i}"):
            x, present = _write_layer(g, config, shared, x, i)
            x.name = hidden_name(i)
            presents += present
    _write_head(g, config, shared, x, head_parts)
    shape: Shape = ["batch", text.num_kv_heads, "total", text.head_dim]
    for name, value in zip(present_names(config), presents, strict=True):
        g.output(name, value, dtype, shape)
    return g.model([cross_attention_function(g.opset)] if config.slow_fast.hybrid_layers else [])


def _write_inputs(g: GraphWriter, config: ModelConfig, embeds: ir.Value) -> _Shared:
    positions = g.input(POSITIONS, ir.DataType.INT64, ["batch", "sequence"])
    mask = g.input(MASK, ir.DataType.BOOL, ["batch", "total"])
    past = _key_value_inputs(g, config, past_names(config), "past")
    slow = _key_value_inputs(g, config, slow_names(config), "slow")
    attends = lengths = None
    if slow:
        attends = g.input(SLOW_ATTENDS, ir.DataType.BOOL, ["batch", "sequence"])
        lengths = g.input(SLOW_LENGTHS, ir.DataType.INT64, ["batch"])
    with g.scope("rotary"):
        cos, sin = _write_rotary(g, config, positions)
    with g.scope("mask"):
        bias = _write_mask(g, embeds, mask, past[0][0])
    by_layer = dict(zip(config.slow_fast.hybrid_layers, slow, strict=True))
    with g.scope("shapes"):
        shape, query, key, heads, scores, by_head = _write_shapes(g, config, embeds, mask)
    return _Shared(shape, query, key, heads, scores, by_head, cos, sin, bias, past, by_layer, attends, lengths)


def _write_shapes(g: GraphWriter, config: ModelConfig, embeds: ir.Value, mask: ir.Value) -> list[ir.Value]:
    """Write the shapes of _Shared, in its order."""
    text = config.text
    group = text.num_heads // text.num_kv_heads
    shape, total = g.dims(embeds, 0, 2), g.dims(mask, 1, 2)
    batch, sequence = g.dims(embeds, 0, 1), g.dims(embeds, 1, 2)
    wanted = [
        (shape, g.ints(text.num_heads, text.head_dim)),
        (shape, g.ints(text.num_kv_heads, text.head_dim)),
        (batch, g.ints(text.num_heads), sequence, g.ints(text.head_dim)),
        (batch, g.ints(text.num_kv_heads, -1), total),
        (batch, g.ints(text.num_kv_heads, group), sequence, total),
    ]
    return [shape, *(g.op("Concat", *parts, axis=0) for parts in wanted)]


def _key_value_inputs(
    g: GraphWriter, config: ModelConfig, names: list[str], length: str
) -> list[tuple[ir.Value, ir.Value]]:
    shape: Shape = ["batch", config.text.num_kv_heads, length, config.text.head_dim]
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


def _write_mask(g: GraphWriter, embeds: ir.Value, mask: ir.Value, past_key: ir.Value) -> ir.Value:
    """Write the causal and padding mask as a bias: key l is seen by query s if l <= past + s and mask[l]."""
    past = g.op("Squeeze", g.dims(past_key, 2, 3), g.ints(0))
    total = g.op("Add", past, g.op("Squeeze", g.dims(embeds, 1, 2), g.ints(0)))
    zero, one = (g.constant(np.array(i, dtype=np.int64)) for i in (0, 1))
    keys = g.op("Unsqueeze", g.op("Range", zero, total, one), g.ints(0))
    queries = g.op("Unsqueeze", g.op("Range", past, total, one), g.ints(1))
    causal = g.op("LessOrEqual", keys, queries)
    allowed = g.op("And", causal, g.op("Unsqueeze", mask, g.ints(1)))
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
    past_key, past_value = shared.past[i]
    key = g.op("Concat", past_key, _rotate(g, shared, project("k_proj", shared.key_shape)), axis=2)
    value = g.op("Concat", past_value, project("v_proj", shared.key_shape), axis=2)
    output = _write_self_attention(g, config, shared, query, key, value)
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


def _write_self_attention(
    g: GraphWriter, config: ModelConfig, shared: _Shared, query: ir.Value, key: ir.Value, value: ir.Value
) -> ir.Value:
    """Write attention -> [batch * sequence, heads * d], before o_proj.

    Query heads are grouped by kv head: K and V are not repeated.

    The scores are float32 from the product on: Qwen2's large key biases make them leave float16's range, and lose
    in bfloat16 what tells the keys apart.
    """
    text = config.text
    grouped = g.to_float32(g.reshape(query, 0, text.num_kv_heads, -1, text.head_dim))
    scores = g.op("MatMul", grouped, g.to_float32(g.transpose(key, 0, 1, 3, 2)))
    scores = g.op("Add", g.op("Reshape", scores, shared.by_head_shape), shared.bias)
    probabilities = g.from_float32(g.op("Softmax", scores, axis=-1))
    context = g.op("MatMul", g.op("Reshape", probabilities, shared.scores_shape), value)
    context = g.op("Reshape", context, shared.heads_shape)
    return g.reshape(g.transpose(context, 0, 2, 1, 3), -1, text.num_heads * text.head_dim)


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


def _write_head(g: GraphWriter, config: ModelConfig, shared: _Shared, x: ir.Value, parts: int) -> None:
    """Write the logits of the last position, in pieces where one matrix of the whole vocabulary is too large."""
    text = config.text
    shape = g.op("Concat", shared.shape, g.ints(text.hidden_size), axis=0)
    # A slice, because TensorRT does not define a Gather with a negative index.
    last = g.op("Slice", g.op("Reshape", x, shape), g.ints(-1), g.ints(_END), g.ints(1))
    normed = g.rms_norm(g.op("Squeeze", last, g.ints(1)), "model.norm", text.rms_norm_eps)
    name = head_name(config.text)
    if parts == 1:
        logits = g.linear(normed, name, bias=False)
    else:
        pieces = [g.linear(normed, name, bias=False, rows=rows) for rows in even_parts(text.vocab_size, parts)]
        logits = g.op("Concat", *pieces, axis=1)
    g.output(LOGITS, g.to_float32(logits), ir.DataType.FLOAT, ["batch", text.vocab_size])
