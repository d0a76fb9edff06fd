"""Compute the core of gated cross-attention, softmax(q k^T) v over the slow tokens, in two Triton kernels.

`cross_attention_split` lets several programs share one row tile's slow tokens; each writes its share's context and
log-sum-exp. `cross_attention_combine` weighs the shares. Two launches, because one without workspace cannot fill a
datacenter GPU: four kv heads and a question of 30 tokens make 16 row tiles for 132 multiprocessors.

Grouped queries: query [B, heads, S, d] is read as [B * kv heads, group * S, d], so that one tile of rows holds the
whole group (or a large part of it) and K and V are read once for it.

Importing this module needs triton; sfexport/kernels/launch_config.py holds what does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def cross_attention_split(
    query,  # [B * kv heads, rows, D], times 1/sqrt(d); rows = group * seq
    key,  # [videos * kv heads, slow, D]; videos is B, or 1: all have the same slow tokens
    value,  # [videos * kv heads, slow, D]
    attends,  # int32 [B, seq], 0 or 1
    lengths,  # int64 [videos]
    seq,
    rows,
    slow,
    kv_heads,
    videos,
    partial,  # float32 [B * kv heads, splits, rows, D]
    logsumexp,  # float32 [B * kv heads, splits, rows]
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (row tiles, splits, B * kv heads). Rows that do not attend are left unwritten or hold anything."""
    split, splits, head = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    batch, video = head // kv_heads, head // kv_heads % videos
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    wanted = tl.load(attends + batch * seq + row % seq, mask=inside, other=0)
    if tl.max(wanted) == 0:
        return

    length = tl.minimum(tl.load(lengths + video), slow).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    start = split * share
    end = tl.minimum(start + share, length)

    # 64 bits: 1,536 frames of 81 tokens and a batch pass 2^31 elements.
    column = tl.arange(0, D)
    rows_at = head.to(tl.int64) * rows + row
    slow_at = (video * kv_heads + head % kv_heads).to(tl.int64) * slow * D
    q = tl.load(query + rows_at[:, None] * D + column[None, :], mask=inside[:, None], other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    context = tl.zeros([BLOCK_M, D], tl.float32)
    for at in range(start, end, BLOCK_N):
        token = at + tl.arange(0, BLOCK_N)
        valid = token < end
        offsets = slow_at + token[:, None] * D + column[None, :]
        k = tl.load(key + offsets, mask=valid[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * LOG2_E
        scores = tl.where(valid[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(p, 1)
        v = tl.load(value + offsets, mask=valid[:, None], other=0.0)
        context = context * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = higher

    has_any = total > 0
    total = tl.where(has_any, total, 1.0)
    out = (head.to(tl.int64) * splits + split) * rows + row
    tl.store(partial + out[:, None] * D + column[None, :], context / total[:, None], mask=inside[:, None])
    # In base 2, as the combination wants it; -inf: no slow token in this share.
    tl.store(logsumexp + out, tl.where(has_any, top + tl.log2(total), float("-inf")), mask=inside)


@triton.jit
def cross_attention_combine(
    query,  # not read: it gives the plugin's output its shape and type
    partial,  # float32 [B * kv heads, splits, rows, D]
    logsumexp,  # float32 [B * kv heads, splits, rows]
    attends,  # int32 [B, seq], 0 or 1
    seq,
    splits,
    group,
    output,  # [B, seq, heads * D]
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid: (position tiles, heads, B). Writes every element: zero where a position does not attend."""
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    batch = tl.program_id(2)
    position = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = position < seq
    wanted = tl.load(attends + batch * seq + position, mask=inside, other=0) != 0
    column = tl.arange(0, D)
    kv_head = (batch * heads + head) // group
    rows = group * seq
    row = (head % group) * seq + position

    top = tl.full([BLOCK_S], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    context = tl.zeros([BLOCK_S, D], tl.float32)
    for split in range(splits):
        at = (kv_head.to(tl.int64) * splits + split) * rows + row
        # What cross_attention_split left unwritten is not read.
        weight = tl.load(logsumexp + at, mask=wanted, other=float("-inf"))
        counts = weight > float("-inf")
        part = tl.load(partial + at[:, None] * D + column[None, :], mask=counts[:, None], other=0.0)
        higher = tl.maximum(top, weight)
        safe = tl.where(higher > float("-inf"), higher, 0.0)  # -inf minus -inf is no number
        p = tl.exp2(weight - safe)
        fade = tl.exp2(top - safe)
        total = total * fade + p
        context = context * fade[:, None] + part * p[:, None]
        top = higher
    result = context / tl.where(total > 0, total, 1.0)[:, None]
    at = (batch.to(tl.int64) * seq + position) * heads + head
    tl.store(output + at[:, None] * D + column[None, :], result.to(output.dtype.element_ty), mask=inside[:, None])
