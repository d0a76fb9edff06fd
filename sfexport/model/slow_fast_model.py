"""Vision tower, projector and hybrid decoder: from frames or embeddings to the last hidden states."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from sfexport.errors import InputError
from sfexport.model import caches
from sfexport.model.compressor import fast_tokens, slow_tokens
from sfexport.model.configuration import LlavaQwenSlowFastConfig
from sfexport.model.hybrid_decoder import DecoderLayer, HybridAttention, SlowBranch
from sfexport.model.projector import build_projector
from sfexport.model.qwen2 import CausalMask, RMSNorm, rotary_tables
from sfexport.model.srelu import SReLU
from sfexport.model.vision import ConvNextBlock, VisionTower, VitEmbeddings

logger = logging.getLogger(__name__)


@dataclass
class EncodedVideos:
    """A batch's visual tokens, empty for a row without a video.

    Attributes:
        slow: slow tokens of each row, [T * P, H].
        fast: fast tokens of each row, [F * P', H].
    """

    slow: list[Tensor]
    fast: list[Tensor]

    def padded_slow(self) -> tuple[Tensor, Tensor]:
        """Return the slow tokens [B, Ls, H], zero-padded on the right, and their mask, bool [B, Ls]."""
        lengths = torch.tensor([len(s) for s in self.slow], device=self.slow[0].device)
        padded = nn.utils.rnn.pad_sequence(self.slow, batch_first=True)
        return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


class SlowFastPreTrainedModel(PreTrainedModel):
    """Base of both model classes: their configuration, and initial values for tensors that a checkpoint lacks."""

    config_class = LlavaQwenSlowFastConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer", "ConvNextBlock", "VitLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if (bias := getattr(module, "bias", None)) is not None:
                nn.init.zeros_(bias)
        elif isinstance(module, (RMSNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
            if (bias := getattr(module, "bias", None)) is not None:
                nn.init.zeros_(bias)
        elif isinstance(module, ConvNextBlock):
            nn.init.constant_(module.weight, 1e-6)
        elif isinstance(module, VitEmbeddings) and hasattr(module, "class_embedding"):
            nn.init.normal_(module.class_embedding, std=std)
        elif isinstance(module, HybridAttention) and module.gate.warm_up:
            nn.init.zeros_(module.cross_attn_warm_up_gate)
        elif isinstance(module, SReLU):
            module.reset_parameters()


class LlavaQwenSlowFastModel(SlowFastPreTrainedModel):
    """Tower, projector and hybrid decoder under the checkpoint's names."""

    def __init__(self, config: LlavaQwenSlowFastConfig) -> None:
        super().__init__(config)
        model_config = config.model_config
        text = model_config.text
        self.embed_tokens: nn.Module = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(model_config, i, config.attention_dropout) for i in range(text.num_layers)
        )
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.gradient_checkpointing = False
        self.vision_tower = VisionTower(config.tower)
        self.mm_projector = build_projector(model_config.projector, text.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def encode_videos(self, videos: Sequence[Tensor | None]) -> EncodedVideos:
        """Encode one video [T, 3, S, S], image [3, S, S] or None per row into slow and fast tokens."""
        model_config = self.config.model_config.slow_fast
        frames = [v if v.ndim == 4 else v[None] for v in videos if v is not None]
        projected = self.mm_projector(self.vision_tower(torch.cat([v.to(self.dtype) for v in frames])))
        per_video = iter(projected.split([len(v) for v in frames]))
        nothing = projected[:0].flatten(0, 1)
        out = EncodedVideos([], [])
        for video in videos:
            slow = None if video is None else slow_tokens(next(per_video), model_config.video_pooling_stride)
            out.slow.append(nothing if slow is None else slow.flatten(0, 1))
            out.fast.append(nothing if slow is None else fast_tokens(slow, model_config.fast))
        return out

    def slow_key_values(self, slow: Tensor) -> Tensor:
        """Compute K and V of all hybrid layers: [B, Ls, H] -> [B, hybrid layers, 2, kv heads, Ls, head_dim]."""
        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer) and layer.is_hybrid]
        return torch.stack([layer.slow_key_values(slow) for layer in layers], dim=1)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        slow: SlowBranch | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            inputs_embeds: [B, S, H].
            attention_mask: [B, past + S], 0 for padding; or 4-D as scaled_dot_product_attention takes it.
            position_ids: [B, S]; default counted over the positions that are not padding.
            use_cache: make a cache if none is given; default the configuration's, and False in training.
            slow: the slow branch's tensors; None: no position attends to slow tokens.
            kwargs: the cache, as `cache` or `past_key_values`.

        Raises:
            InputError: the mask does not cover the cache's and the new positions, or the cache did not take the new
                ones.
        """
        cache = caches.take_cache(kwargs)
        _warn_of(kwargs)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        is_recomputing = self.gradient_checkpointing and self.training
        if is_recomputing and caches.length(cache):
            raise InputError("Gradient checkpointing runs layers twice, which a cache cannot bear.", "Give no cache.")
        if is_recomputing:
            cache, use_cache = None, False
        elif use_cache and cache is None:
            cache = DynamicCache()
        past, count = caches.length(cache), inputs_embeds.shape[1]
        _check_lengths(attention_mask, past, count, slow)
        if position_ids is None:
            position_ids = count_positions(attention_mask, past, count, inputs_embeds.device)
        hidden = inputs_embeds
        rotary = rotary_tables(position_ids, self.config.model_config.text, hidden.dtype)
        mask = CausalMask(attention_mask, past, count, hidden.device)
        states = []
        for layer in self.layers:
            states.append(hidden)
            if is_recomputing:
                hidden = checkpoint(layer, hidden, rotary, mask, cache, slow, use_reentrant=False)
            else:
                hidden = layer(hidden, rotary, mask, cache, slow)
        caches.check_length(cache, past + count)
        hidden = self.norm(hidden)
        kept: dict[str, Any] = {caches.NAME: cache if use_cache else None}
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, hidden_states=(*states, hidden) if output_hidden_states else None, **kept
        )


def count_positions(attention_mask: Tensor | None, past: int, count: int, device: torch.device) -> Tensor:
    """Return the new positions' numbers, [B or 1, count], counted from 0 without padding."""
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(past, past + count, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def _check_lengths(attention_mask: Tensor | None, past: int, count: int, slow: SlowBranch | None) -> None:
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] != past + count:
        raise InputError(
            f"The attention mask covers {attention_mask.shape[1]} positions; the cache holds {past} and {count} are "
            "new.",
            "Give a mask over both, and the cache of the positions before.",
        )
    if slow is not None and slow.attends.shape[1] != count:
        raise InputError(f"slow_attends covers {slow.attends.shape[1]} positions; {count} are new.")


_warned: set[str] = set()


def _warn_of(arguments: dict[str, Any]) -> None:
    """Warn once of each unknown argument, and refuse output_attentions, which the model does not have."""
    if arguments.pop("output_attentions", None):
        raise InputError("The model does not return attention weights.", "Leave output_attentions out.")
    unknown = {name for name, value in arguments.items() if value is not None} - _warned
    if unknown:
        _warned.update(unknown)
        logger.warning("The model takes no %s: ignored.", ", ".join(sorted(unknown)))
