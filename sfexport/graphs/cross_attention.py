"""sfexport::CrossAttention: one node with a function body.

ONNX Runtime inlines the body, and so does a TensorRT build without the plugin. A build with it parses a sibling file
(plugin_nodes.py) that has two plugin nodes in this one's place and no function.

Inputs  query    [B, heads, S, d]      after RoPE, times 1/sqrt(d)
        key      [N, kv heads, T, d]   value likewise; heads are consecutive groups of kv heads. N is B, or 1: all rows
                                       have the same slow tokens
        attends  bool [B, S]           positions that query the slow tokens
        lengths  int64 [N]             slow tokens; the rest of T is padding
Output  context  [B, S, heads * d]     exactly 0 where a position does not attend or a row has no slow token
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

DOMAIN = "sfexport"
OP_TYPE = "CrossAttention"
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": "1"}
Op = Callable[..., ir.Value]
# Queries are divided by it where a product has 16 bits: Qwen2's scores pass float16's range, but not 16 times it.
HEADROOM = 16.0
MASKED = -1e30  # added in float32: large enough to vanish in the softmax, finite so that no row becomes nan


def cross_attention_function(opset: int, fused: bool = False) -> ir.Function:
    """Build the function's body in plain operators; its softmax is float32 whatever type it is given.

    Args:
        fused: write it in the form that TensorRT makes one kernel of, with products in the inputs' type (see
            self_attention.FusedAttention); otherwise all of it is float32.
    """
    names = ("query", "key", "value", "attends", "lengths")
    inputs = [ir.Value(name=name) for name in names]
    query, key, value, attends, lengths = inputs
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": opset}, name=OP_TYPE)
    op = ir.tape.Tape(graph).op
    bias = _write_bias(op, key, lengths)
    write = _write_fused if fused else _write_grouped
    context = write(op, query, key, value, bias)
    context = op("Reshape", [op("Transpose", [context], {"perm": [0, 2, 1, 3]}), _ints(op, 0, 0, -1)])
    has_slow = op("Unsqueeze", [op("Greater", [lengths, _ints(op, 0)]), _ints(op, 1)])
    counts = op("Unsqueeze", [op("And", [attends, has_slow]), _ints(op, 2)])
    zero = op("CastLike", [_number(op, 0.0), context])
    output = op("CastLike", [op("Where", [counts, context, zero]), query])
    output.name = "context"
    graph.outputs.append(output)
    return ir.Function(DOMAIN, OP_TYPE, graph=graph, attributes=[])


def _ints(op: Op, *values: int) -> ir.Value:
    return op("Constant", [], {"value": ir.tensor(np.array(values, dtype=np.int64))})


def _number(op: Op, value: float) -> ir.Value:
    return op("Constant", [], {"value": ir.tensor(np.array(value, dtype=np.float32))})


def _float32(op: Op, x: ir.Value) -> ir.Value:
    return op("Cast", [x], {"to": int(ir.DataType.FLOAT)})


def _write_bias(op: Op, key: ir.Value, lengths: ir.Value) -> ir.Value:
    """Write what hides the padding: float32 [N, 1, 1, T], 0 or MASKED."""
    slow_tokens = op("Squeeze", [op("Shape", [key], {"start": 2, "end": 3}), _ints(op, 0)])
    zero, one = (op("Squeeze", [_ints(op, i), _ints(op, 0)]) for i in (0, 1))
    index = op("Range", [zero, slow_tokens, one])
    valid = op("Less", [op("Unsqueeze", [index, _ints(op, 0)]), op("Unsqueeze", [lengths, _ints(op, 1)])])
    return op("Unsqueeze", [op("Where", [valid, _number(op, 0.0), _number(op, MASKED)]), _ints(op, 1, 2)])


def _write_grouped(op: Op, query: ir.Value, key: ir.Value, value: ir.Value, bias: ir.Value) -> ir.Value:
    """Write the context, float32 [B, heads, S, d], with one matrix per kv head: its group of query heads times S."""
    q, k, v = (_float32(op, x) for x in (query, key, value))
    kv_heads = op("Shape", [key], {"start": 1, "end": 2})
    width = op("Shape", [key], {"start": 3, "end": 4})
    grouped = op("Concat", [_ints(op, 0), kv_heads, _ints(op, -1), width], {"axis": 0})
    scores = op("MatMul", [op("Reshape", [q, grouped]), op("Transpose", [k], {"perm": [0, 1, 3, 2]})])
    probabilities = op("Softmax", [op("Add", [scores, bias])], {"axis": -1})
    return op("Reshape", [op("MatMul", [probabilities, v]), op("Shape", [query])])


def _write_fused(op: Op, query: ir.Value, key: ir.Value, value: ir.Value, bias: ir.Value) -> ir.Value:
    """Write the context in the query's type, [B, heads, S, d].

    All query heads of a kv head, of all rows of a video, are one sequence of it: K and V are neither repeated nor cast.
    """
    videos, kv_heads, width = (op("Shape", [key], {"start": i, "end": i + 1}) for i in (0, 1, 3))
    rows = op("Div", [op("Shape", [query], {"start": 0, "end": 1}), videos])

    def join(*parts: ir.Value) -> ir.Value:
        return op("Concat", list(parts), {"axis": 0})

    def swap(x: ir.Value, shape: ir.Value) -> ir.Value:
        return op("Transpose", [op("Reshape", [x, shape])], {"perm": [0, 2, 1, 3, 4]})

    rest = _ints(op, -1)
    by_video = op(
        "Reshape", [swap(query, join(videos, rows, kv_heads, rest, width)), join(videos, kv_heads, rest, width)]
    )
    small = op("Mul", [by_video, op("CastLike", [_number(op, 1 / HEADROOM), query])])
    scores = _float32(op, op("MatMul", [small, op("Transpose", [key], {"perm": [0, 1, 3, 2]})]))
    scores = op("Mul", [scores, _number(op, HEADROOM)])
    probabilities = op("Softmax", [op("Add", [scores, bias])], {"axis": -1})
    context = op("MatMul", [op("CastLike", [probabilities, query]), value])
    return op("Reshape", [swap(context, join(videos, kv_heads, rows, rest, width)), op("Shape", [query])])
