"""Decoder layers: Qwen2's, and the hybrid ones in which chosen positions also attend to the slow tokens.

The slow branch's tensors are arguments (`SlowBranch`), never state on a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache

from sfexport.checkpoint.config import GateConfig, ModelConfig, TextConfig
from sfexport.model.qwen2 import Attention, CausalMask, Mlp, RMSNorm, Rotary, attend


@dataclass
class SlowBranch:
    """The slow branch's tensors for a batch of videos, which the hybrid layers attend to.

    Attributes:
        key_values: [B, hybrid layers, 2, kv heads, Ls, head_dim], K then V.
        attends: bool [B, S], positions that query the slow tokens.
        mask: bool [B, Ls], False for padding; a row without a True gets a contribution of exactly 0.
    """

    key_values: Tensor
    attends: Tensor
    mask: Tensor


class HybridAttention(Attention):
    """Self-attention whose output, before o_proj, is increased by g * cross-attention for some positions."""

    def __init__(
        self, text: TextConfig, layer_index: int, hybrid_index: int, gate: GateConfig, dropout: float = 0.0
    ) -> None:
        super().__init__(text, layer_index, dropout)
        self.hybrid_index, self.gate, self.kv_heads = hybrid_index, gate, text.num_kv_heads
        self.cross_attn_kv_proj = nn.Linear(text.hidden_size, 2 * text.num_kv_heads * text.head_dim)
        # A Sequential, because checkpoints call the linear layer 'cross_attn_gate_proj.0'.
        self.cross_attn_gate_proj = nn.Sequential(
            nn.Linear(text.num_heads * text.head_dim, 1), nn.Tanh() if gate.dynamic_tanh else nn.Identity()
        )
        if gate.warm_up:
            self.cross_attn_warm_up_gate = nn.Parameter(torch.zeros(1))

    def slow_key_values(self, normed_slow: Tensor) -> Tensor:
        """Project normed slow tokens to K and V: [B, Ls, H] -> [B, 2, kv heads, Ls, head_dim].

        The projection's rows lie head by head, K then V.
        """
        packed = self.cross_attn_kv_proj(normed_slow).unflatten(-1, (self.kv_heads, 2, self.head_dim))
        return packed.permute(0, 3, 2, 1, 4)

    def forward(
        self, hidden: Tensor, rotary: Rotary, mask: CausalMask, cache: Cache | None, slow: SlowBranch | None = None
    ) -> Tensor:
        query, output = self.query_and_output(hidden, rotary, mask, cache)
        if slow is not None:
            output = output + self.cross_attention(query, output, slow)
        return self.o_proj(output)

    def cross_attention(self, query: Tensor, output: Tensor, slow: SlowBranch) -> Tensor:
        """Compute g * softmax(q k^T / sqrt(d)) v; zero where a position does not attend or a row has no slow token.

        Args:
            query: [B, heads, S, d], after RoPE. The slow keys carry no positions.
            output: [B, S, heads * d], the self-attention output, from which the gate is computed.
        """
        key, value = slow.key_values[:, self.hybrid_index].unbind(1)
        has_slow = slow.mask.any(-1)
        # A softmax over nothing is NaN: a row without slow tokens sees all of them, and its result is dropped.
        mask = (slow.mask | ~has_slow[:, None])[:, None, None, :]
        context = attend(query, key, value, attn_mask=mask)
        attends = slow.attends & has_slow[:, None]
        return torch.where(attends[..., None], self.gate_value(output) * context, 0)

    def gate_value(self, output: Tensor) -> Tensor:
        """Compute the gate g, one scalar per position: [B, S, heads * d] -> [B, S, 1]."""
        value = self.cross_attn_gate_proj(output)
        if self.gate.warm_up:
            warm_up = self.cross_attn_warm_up_gate
            value = value * (warm_up.tanh() if self.gate.warm_up_tanh else warm_up)
        return value


class DecoderLayer(nn.Module):
    """Norm and attention, norm and MLP, each added to its input. Only hybrid layers look at `slow`."""

    def __init__(self, config: ModelConfig, index: int, dropout: float = 0.0) -> None:
        super().__init__()
        text, slow_fast = config.text, config.slow_fast
        self.is_hybrid = index in slow_fast.hybrid_layers
        self.self_attn: Attention
        if self.is_hybrid:
            assert slow_fast.gate is not None  # it is None only without hybrid layers
            hybrid_index = slow_fast.hybrid_layers.index(index)
            self.self_attn = HybridAttention(text, index, hybrid_index, slow_fast.gate, dropout)
        else:
            self.self_attn = Attention(text, index, dropout)
        self.mlp = Mlp(text)
        self.input_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)

    def slow_key_values(self, slow: Tensor) -> Tensor:
        """Compute a hybrid layer's slow K/V: slow tokens [B, Ls, H] -> [B, 2, kv heads, Ls, head_dim]."""
        assert isinstance(self.self_attn, HybridAttention)
        return self.self_attn.slow_key_values(self.input_layernorm(slow))

    def forward(
        self, hidden: Tensor, rotary: Rotary, mask: CausalMask, cache: Cache | None, slow: SlowBranch | None
    ) -> Tensor:
        given = {"slow": slow} if self.is_hybrid else {}
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, mask, cache, **given)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
