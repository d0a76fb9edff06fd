"""Qwen2's decoder: RMSNorm, rotary positions, causal attention with grouped keys, gated MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from sfexport.checkpoint.config import TextConfig
from sfexport.errors import InputError

Rotary = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, times the weight in the model's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_tables(position_ids: Tensor, text: TextConfig, dtype: torch.dtype) -> Rotary:
    """Compute the cosine and sine of positions [B, S] in float32; each [B, 1, S, head_dim]."""
    steps = torch.arange(0, text.head_dim, 2, dtype=torch.float32, device=position_ids.device)
    angles = position_ids[..., None].float() * (1.0 / text.rope_theta ** (steps / text.head_dim))
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate [B, heads, S, head_dim]; the first half of a head's numbers pairs with the second."""
    first, second = x.chunk(2, dim=-1)
    return x * rotary[0] + torch.cat([-second, first], dim=-1) * rotary[1]


class CausalMask:
    """The mask of one call: queries see keys up to their own position that are not padding.

    Args:
        attention_mask: [B, past + queries], 0 for padding; or 4-D, taken as scaled_dot_product_attention takes it;
            None: no padding.
        past: number of positions in the cache.
        queries: number of positions of this call.
    """

    def __init__(self, attention_mask: Tensor | None, past: int, queries: int, device: torch.device) -> None:
        self.past, self.queries, self.device = past, queries, device
        self.given = self.keep = None
        if attention_mask is not None and attention_mask.ndim == 4:
            self.given = attention_mask
        elif attention_mask is not None and not bool(attention_mask.all()):
            self.keep = attention_mask.bool()
        self._built: dict[int, dict[str, Any]] = {}

    def arguments(self, keys: int) -> dict[str, Any]:
        """Return scaled_dot_product_attention's mask for this many keys; a cache of fixed size has unused ones."""
        if keys not in self._built:
            self._built[keys] = self._build(keys)
        return self._built[keys]

    def _build(self, keys: int) -> dict[str, Any]:
        if self.given is not None:
            return {"attn_mask": self.given}
        used = self.past + self.queries
        if keys < used:
            raise InputError(
                f"The cache gave back {keys} positions, but {self.past} were stored and {self.queries} are new.",
                "Use a cache that keeps all of them, such as transformers.DynamicCache().",
            )
        if self.keep is None and keys == used and self.queries in (1, keys):
            return {"is_causal": self.queries > 1}
        slots = torch.arange(keys, device=self.device)
        own = torch.arange(self.past, used, device=self.device)[:, None]
        seen = (slots <= own)[None, None]
        if self.keep is not None:
            keep = F.pad(self.keep, (0, keys - used))[:, None, None]
            seen = (seen & keep) | (slots == own)  # padding sees itself: a softmax over nothing is NaN
        return {"attn_mask": seen}


def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, **mask: Any) -> Tensor:
    """Compute attention of [B, heads, S, d] over [B, kv heads, K, d]; neighbouring heads share K and V.

    Returns:
        [B, S, heads * d].
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, **mask).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention.

    Args:
        layer_index: the layer's place in the cache.
        dropout: dropout of the attention's probabilities, in training.
    """

    def __init__(self, text: TextConfig, layer_index: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.head_dim, self.layer_index, self.dropout = text.head_dim, layer_index, dropout
        width, kv_width = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
        self.q_proj = nn.Linear(text.hidden_size, width)
        self.k_proj = nn.Linear(text.hidden_size, kv_width)
        self.v_proj = nn.Linear(text.hidden_size, kv_width)
        self.o_proj = nn.Linear(width, text.hidden_size, bias=False)

    def query_and_output(
        self, hidden: Tensor, rotary: Rotary, mask: CausalMask, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Return the rotated query [B, heads, S, d] and the output before o_proj, [B, S, heads * d]."""
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_index)
        dropout = self.dropout if self.training else 0.0
        return query, attend(query, key, value, dropout, **mask.arguments(key.shape[2]))

    def forward(self, hidden: Tensor, rotary: Rotary, mask: CausalMask, cache: Cache | None) -> Tensor:
        return self.o_proj(self.query_and_output(hidden, rotary, mask, cache)[1])


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.up_proj = nn.Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.down_proj = nn.Linear(text.intermediate_size, text.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
