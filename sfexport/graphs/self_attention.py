"""The decoder's self-attention over a prefix that all rows share and each row's own positions, in two forms.

In both, the scores are float32 from the product on: Qwen2's large key biases make them leave float16's range, and lose
in bfloat16 what tells the keys apart.

Arguments  query   [batch, heads, sequence, d], times 1/sqrt(d)
           prefix  K and V that all rows share, [1, kv heads, prefix, d] each
           own     K and V of each row's past and of the step's own positions, [batch, kv heads, own, d] each
Result     [batch * sequence, heads * d], before o_proj
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx_ir as ir

from sfexport.checkpoint.config import TextConfig
from sfexport.graphs.cross_attention import HEADROOM
from sfexport.graphs.writer import GraphWriter

KeyValue = tuple[ir.Value, ir.Value]
_END = np.iinfo(np.int64).max  # of a Slice: as far as the axis goes


class SelfAttention(Protocol):
    """Writes the self-attention of one layer; what all layers share was written when it was made."""

    def __call__(self, query: ir.Value, prefix: KeyValue, own: KeyValue) -> ir.Value: ...


class AttentionInParts:
    """Writes attention for runtimes that run node by node.

    Query heads are grouped by kv head: K and V are not repeated. The scores over the prefix and over a row's own
    positions are put together for one softmax, so that the prefix's K and V, the larger ones, are never copied.
    """

    def __init__(
        self,
        g: GraphWriter,
        text: TextConfig,
        batch: ir.Value,
        sequence: ir.Value,
        prefix: ir.Value,
        cached: ir.Value,
        bias: ir.Value,
    ) -> None:
        """Write the shapes.

        Args:
            batch, sequence: [1].
            prefix: [1], positions of the prefix.
            cached: [1], positions of the prefix and of the past's capacity.
            bias: float32 [batch, 1, 1, sequence, prefix + own], 0 or MASKED.
        """
        self._g, self._text, self._prefix, self._bias = g, text, prefix, bias
        group, total = text.num_heads // text.num_kv_heads, g.op("Add", cached, sequence)
        heads = (batch, g.ints(text.num_heads), sequence, g.ints(text.head_dim))
        self._heads = g.op("Concat", *heads, axis=0)
        self._scores = g.op("Concat", batch, g.ints(text.num_kv_heads, -1), total, axis=0)
        self._by_head = g.op("Concat", batch, g.ints(text.num_kv_heads, group), sequence, total, axis=0)

    def __call__(self, query: ir.Value, prefix: KeyValue, own: KeyValue) -> ir.Value:
        g, text = self._g, self._text
        grouped = g.to_float32(g.reshape(query, 0, text.num_kv_heads, -1, text.head_dim))
        products = [g.op("MatMul", grouped, g.to_float32(g.transpose(key, 0, 1, 3, 2))) for key, _ in (prefix, own)]
        scores = g.op("Reshape", g.op("Concat", *products, axis=-1), self._by_head)
        probabilities = g.from_float32(g.op("Softmax", g.op("Add", scores, self._bias), axis=-1))
        probabilities = g.op("Reshape", probabilities, self._scores)
        parts = (g.ints(0), self._prefix), (self._prefix, g.ints(_END))
        contexts = [
            g.op("MatMul", g.op("Slice", probabilities, *part, g.ints(3)), value)
            for part, (_, value) in zip(parts, (prefix, own), strict=True)
        ]
        return _merge_heads(g, text, g.op("Reshape", g.op("Add", *contexts), self._heads))


class FusedAttention:
    """Writes attention in the form that TensorRT's builder makes one kernel of, so that no scores are in memory.

    The query heads of a kv head are one longer sequence over K and V of all positions, which are put together in
    memory; the bias is repeated for it once for all layers. The product is 16 bits wide in the graph; with the softmax
    in float32 behind it, the kernel keeps the scores in float32 (`_gemm_mha_v2` with `Ampere_hmma_fp32_traits` or
    `Ampere_hmma_bf16_traits` in plans of TensorRT for RTX 1.7.1). A runtime that does not fuse rounds them to 16 bits;
    HEADROOM keeps them finite there.
    """

    def __init__(self, g: GraphWriter, text: TextConfig, batch: ir.Value, bias: ir.Value) -> None:
        """Write the shapes and the bias; arguments as for AttentionInParts."""
        self._g, self._text = g, text
        self._rows = g.op("Concat", batch, g.ints(1, 1, 1), axis=0)
        group = text.num_heads // text.num_kv_heads
        repeated = g.op("Expand", bias, g.ints(1, 1, group, 1, 1))
        shape = g.op("Concat", batch, g.ints(1, -1), g.dims(bias, 4, 5), axis=0)
        self._bias = g.op("Reshape", repeated, shape)

    def __call__(self, query: ir.Value, prefix: KeyValue, own: KeyValue) -> ir.Value:
        g, text = self._g, self._text
        grouped = g.reshape(query, 0, text.num_kv_heads, -1, text.head_dim)
        keys, values = (
            g.op("Concat", g.op("Expand", shared, self._rows), rest, axis=2)
            for shared, rest in zip(prefix, own, strict=True)
        )
        small = g.op("Mul", grouped, g.scalar(1 / HEADROOM))
        scores = g.to_float32(g.op("MatMul", small, g.transpose(keys, 0, 1, 3, 2)))
        scores = g.op("Mul", scores, g.float32(HEADROOM))
        probabilities = g.from_float32(g.op("Softmax", g.op("Add", scores, self._bias), axis=-1))
        context = g.op("MatMul", probabilities, values)
        return _merge_heads(g, text, g.op("Reshape", context, g.op("Shape", query)))


def _merge_heads(g: GraphWriter, text: TextConfig, context: ir.Value) -> ir.Value:
    return g.reshape(g.transpose(context, 0, 2, 1, 3), -1, text.num_heads * text.head_dim)
