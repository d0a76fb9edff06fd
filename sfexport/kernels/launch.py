"""Run the kernels on torch tensors: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1) on a CPU.

For tests, checks and benchmarks; engines launch the compiled PTX themselves.
"""

from __future__ import annotations

import torch

from sfexport.kernels.cross_attention import cross_attention_combine, cross_attention_split
from sfexport.kernels.launch_config import (
    COMBINE_POSITIONS,
    COMBINE_WARPS,
    Integers,
    LaunchConfig,
    Tiles,
    combine_launch,
    combine_outputs,
    split_launch,
    split_outputs,
)


def cross_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attends: torch.Tensor,
    lengths: torch.Tensor,
    tiles: Tiles,
    multiprocessors: int,
    poison: bool = True,
) -> torch.Tensor:
    """Return the context [B, S, heads * d] in query's type, as the node CrossAttention defines it.

    Args:
        query: [B, heads, S, d], times 1/sqrt(d); contiguous, as key and value.
        key: [N, kv heads, T, d]; N is B, or 1: all have the same slow tokens.
        value: the key's shape.
        attends: bool or int32 [B, S].
        lengths: int64 [N].
        multiprocessors: how many programs to make: the GPU's count, or any number for a test.
        poison: fill outputs with NaN first, so that reading what no program wrote shows.
    """
    attends = attends.to(torch.int32)
    split_shapes = split_outputs(Integers(), query.shape, key.shape, multiprocessors)
    split = split_launch(Integers(), query.shape, key.shape, tiles, multiprocessors)
    combine = combine_launch(Integers(), query.shape, split_shapes[0])

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        empty = torch.empty(shape, dtype=dtype, device=query.device)
        return empty.fill_(float("nan")) if poison else empty

    partial, logsumexp = (make(shape, torch.float32) for shape in split_shapes)
    output = make(combine_outputs(Integers(), query.shape)[0], query.dtype)
    launch_split(query, key, value, attends, lengths, partial, logsumexp, split, tiles)
    launch_combine(query, partial, logsumexp, attends, output, combine)
    return output


def launch_split(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attends: torch.Tensor,
    lengths: torch.Tensor,
    partial: torch.Tensor,
    logsumexp: torch.Tensor,
    launch: LaunchConfig,
    tiles: Tiles,
) -> None:
    """Fill `partial` and `logsumexp`, of split_outputs' shapes. `attends` is int32."""
    cross_attention_split[launch.grid](
        query,
        key,
        value,
        attends,
        lengths,
        *launch.arguments,
        partial,
        logsumexp,
        D=query.shape[3],
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.tokens,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def launch_combine(
    query: torch.Tensor,
    partial: torch.Tensor,
    logsumexp: torch.Tensor,
    attends: torch.Tensor,
    output: torch.Tensor,
    launch: LaunchConfig,
) -> None:
    """Fill `output` [B, S, heads * d]. `attends` is int32."""
    cross_attention_combine[launch.grid](
        query,
        partial,
        logsumexp,
        attends,
        *launch.arguments,
        output,
        D=query.shape[3],
        BLOCK_S=COMBINE_POSITIONS,
        num_warps=COMBINE_WARPS,
    )
