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

import numpy as np
import onnx_ir as ir

DOMAIN = "sfexport"
OP_TYPE = "CrossAttention"
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": "1"}
MASKED = -1e30  # added in float32: large enough to vanish in the softmax, finite so that no row becomes nan


def cross_attention_function(opset: int) -> ir.Function:
    """Build the function's body in plain operators; it computes in float32 whatever type it is given."""
    names = ("query", "key", "value", "attends", "lengths")
    inputs = [ir.Value(name=name) for name in names]
    query, key, value, attends, lengths = inputs
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": opset}, name=OP_TYPE)
    op = ir.tape.Tape(graph).op

    def ints(*values: int) -> ir.Value:
        return op("Constant", [], {"value": ir.tensor(np.array(values, dtype=np.int64))})

    def number(value: float) -> ir.Value:
        return op("Constant", [], {"value": ir.tensor(np.array(value, dtype=np.float32))})

    q, k, v = (op("Cast", [x], {"to": int(ir.DataType.FLOAT)}) for x in (query, key, value))
    # One matrix per kv head: its group of query heads times S, so that K and V are never repeated.
    kv_heads = op("Shape", [key], {"start": 1, "end": 2})
    width = op("Shape", [key], {"start": 3, "end": 4})
    grouped = op("Concat", [ints(0), kv_heads, ints(-1), width], {"axis": 0})
    scores = op("MatMul", [op("Reshape", [q, grouped]), op("Transpose", [k], {"perm": [0, 1, 3, 2]})])

    slow_tokens = op("Squeeze", [op("Shape", [key], {"start": 2, "end": 3}), ints(0)])
    zero, one = (op("Squeeze", [ints(i), ints(0)]) for i in (0, 1))
    index = op("Range", [zero, slow_tokens, one])
    valid = op("Less", [op("Unsqueeze", [index, ints(0)]), op("Unsqueeze", [lengths, ints(1)])])
    bias = op("Unsqueeze", [op("Where", [valid, number(0.0), number(MASKED)]), ints(1, 2)])
    probabilities = op("Softmax", [op("Add", [scores, bias])], {"axis": -1})

    context = op("Reshape", [op("MatMul", [probabilities, v]), op("Shape", [query])])
    context = op("Reshape", [op("Transpose", [context], {"perm": [0, 2, 1, 3]}), ints(0, 0, -1)])
    has_slow = op("Unsqueeze", [op("Greater", [lengths, ints(0)]), ints(1)])
    counts = op("Unsqueeze", [op("And", [attends, has_slow]), ints(2)])
    output = op("CastLike", [op("Where", [counts, context, number(0.0)]), query])
    output.name = "context"
    graph.outputs.append(output)
    return ir.Function(DOMAIN, OP_TYPE, graph=graph, attributes=[])
