"""Decoder layers: Qwen2's, and the hybrid ones in which chosen positions also attend to the slow tokens.

Source: REFERENCE section 5. The slow branch's tensors are arguments (`SlowBranch`), never state on a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen2.modeling_qwen2 import (
    ALL_ATTENTION_FUNCTIONS,
    Qwen2Attention,
    Qwen2Config,
    Qwen2DecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
    repeat_kv,
)

from sfexport.facts import GateFacts


@dataclass
class SlowBranch:
    """What the hybrid layers need of a batch's videos.

    Attributes:
        key_values: [B, hybrid layers, 2, kv heads, Ls, head_dim], K then V.
        attends: bool [B, S], positions that query the slow tokens.
        mask: bool [B, Ls], False for padding; a row without a True gets a contribution of exactly 0.
    """

    key_values: Tensor
    attends: Tensor
    mask: Tensor


class HybridAttention(Qwen2Attention):
    """Self-attention whose output, before o_proj, is increased by g * cross-attention for some positions."""

    def __init__(self, config: Qwen2Config, layer_idx: int, hybrid_index: int, gate: GateFacts) -> None:
        super().__init__(config, layer_idx)
        self.hybrid_index, self.gate = hybrid_index, gate
        self.kv_heads = config.num_key_value_heads
        width = config.num_attention_heads * self.head_dim
        self.cross_attn_kv_proj = nn.Linear(config.hidden_size, 2 * self.kv_heads * self.head_dim)
        # A Sequential, because checkpoints call the linear layer 'cross_attn_gate_proj.0'.
        self.cross_attn_gate_proj = nn.Sequential(
            nn.Linear(width, 1), nn.Tanh() if gate.dynamic_tanh else nn.Identity()
        )
        if gate.warm_up:
            self.cross_attn_warm_up_gate = nn.Parameter(torch.zeros(1))

    def slow_key_values(self, normed_slow: Tensor) -> Tensor:
        """[B, Ls, H] -> [B, 2, kv heads, Ls, head_dim]; rows of the projection lie head by head, K then V."""
        packed = self.cross_attn_kv_proj(normed_slow).unflatten(-1, (self.kv_heads, 2, self.head_dim))
        return packed.permute(0, 3, 2, 1, 4)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        slow: SlowBranch | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=None,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        if slow is not None:
            output = output + self.cross_attention(query, output, slow)
        return self.o_proj(output), weights

    def cross_attention(self, query: Tensor, output: Tensor, slow: SlowBranch) -> Tensor:
        """g * softmax(q k^T / sqrt(d)) v, zero where a position does not attend or a row has no slow token.

        Args:
            query: [B, heads, S, d], after RoPE. The slow keys carry no positions.
            output: [B, S, heads * d], the self-attention output, from which the gate is computed.
        """
        key, value = slow.key_values[:, self.hybrid_index].unbind(1)
        key, value = (repeat_kv(x, self.num_key_value_groups) for x in (key, value))
        has_slow = slow.mask.any(-1)
        # A row without slow tokens would be a softmax over nothing: let it see all, then multiply by zero.
        mask = (slow.mask | ~has_slow[:, None])[:, None, None, :]
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        context = context.transpose(1, 2).flatten(2)
        attends = slow.attends & has_slow[:, None]
        return torch.where(attends[..., None], self.gate_value(output) * context, 0)

    def gate_value(self, output: Tensor) -> Tensor:
        """One scalar per position, [B, S, 1]."""
        value = self.cross_attn_gate_proj(output)
        if self.gate.warm_up:
            warm_up = self.cross_attn_warm_up_gate
            value = value * (warm_up.tanh() if self.gate.warm_up_tanh else warm_up)
        return value


class DecoderLayer(Qwen2DecoderLayer):
    """Qwen2's layer; hybrid where `hybrid_index` is given. Only hybrid layers look at `slow`."""

    def __init__(self, config: Qwen2Config, layer_idx: int, hybrid_index: int | None, gate: GateFacts | None) -> None:
        super().__init__(config, layer_idx)
        self.is_hybrid = hybrid_index is not None
        if self.is_hybrid:
            self.self_attn = HybridAttention(config, layer_idx, hybrid_index, gate)

    def slow_key_values(self, slow: Tensor) -> Tensor:
        """Slow tokens [B, Ls, H] through this layer's input norm -> [B, 2, kv heads, Ls, head_dim]."""
        return self.self_attn.slow_key_values(self.input_layernorm(slow))

    def forward(self, hidden_states: Tensor, *, slow: SlowBranch | None = None, **kwargs: Any) -> Tensor:
        if self.is_hybrid:
            kwargs["slow"] = slow
        return super().forward(hidden_states, **kwargs)
