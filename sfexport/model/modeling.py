"""The full model: frames and a prompt in, logits, loss or an answer out.

Names, defaults and maths follow the reference (LlavaQwenSlowFastForCausalLM); what it does not do follows
transformers. Two decode modes: 'released' (answer tokens after the first do not see the slow tokens, as the
published code behaves) and 'trained' (they do, as in training).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM, Qwen2Model
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.qwen2.modeling_qwen2 import Qwen2PreTrainedModel, Qwen2RMSNorm, Qwen2RotaryEmbedding

from sfexport.checkpoint import Checkpoint
from sfexport.errors import InputError
from sfexport.facts import DECODE_MODES
from sfexport.model.compressor import fast_tokens, slow_tokens
from sfexport.model.configuration import LlavaQwenSlowFastConfig
from sfexport.model.hybrid_decoder import DecoderLayer, HybridAttention, SlowBranch
from sfexport.model.merging import VISUAL, Merged, attending_positions, merge
from sfexport.model.projector import build_projector
from sfexport.model.srelu import SReLU
from sfexport.model.vision import ConvNextBlock, VisionTower


@dataclass
class EncodedVideos:
    """A batch's visual tokens: slow [T * P, H] and fast [F * P', H] per row."""

    slow: list[Tensor]
    fast: list[Tensor]

    def padded_slow(self) -> tuple[Tensor, Tensor]:
        """Slow tokens [B, Ls, H], zero-padded on the right, and their mask, bool [B, Ls]."""
        lengths = torch.tensor([len(s) for s in self.slow], device=self.slow[0].device)
        padded = nn.utils.rnn.pad_sequence(self.slow, batch_first=True)
        return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


class LlavaQwenSlowFastModel(Qwen2Model):
    """Tower, projector and hybrid decoder under the checkpoint's names."""

    config_class = LlavaQwenSlowFastConfig

    def __init__(self, config: LlavaQwenSlowFastConfig) -> None:
        # Not Qwen2Model.__init__: it would build the plain layers first, only for them to be replaced.
        Qwen2PreTrainedModel.__init__(self, config)
        facts = config.facts
        self.padding_idx, self.vocab_size = None, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        hybrid = {layer: k for k, layer in enumerate(facts.slow_fast.hybrid_layers)}
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, hybrid.get(i), facts.slow_fast.gate) for i in range(config.num_hidden_layers)
        )
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config=config)
        self.gradient_checkpointing, self.has_sliding_layers = False, False
        self.vision_tower = VisionTower(config.tower)
        self.mm_projector = build_projector(facts.projector, config.hidden_size)
        self.post_init()

    def encode_videos(self, videos: Sequence[Tensor]) -> EncodedVideos:
        """Frames [T, 3, S, S] (or one image [3, S, S]) per row -> slow and fast tokens."""
        facts = self.config.facts.slow_fast
        videos = [v if v.ndim == 4 else v[None] for v in videos]
        frames = torch.cat([v.to(self.dtype) for v in videos])
        projected = self.mm_projector(self.vision_tower(frames)).split([len(v) for v in videos])
        slow = [slow_tokens(p, facts.video_pooling_stride) for p in projected]
        return EncodedVideos([s.flatten(0, 1) for s in slow], [fast_tokens(s, facts.fast) for s in slow])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """For what a checkpoint lacks. Here, because transformers asks the innermost PreTrainedModel."""
        super()._init_weights(module)
        if isinstance(module, ConvNextBlock):
            nn.init.constant_(module.weight, 1e-6)
        if isinstance(module, HybridAttention) and module.gate.warm_up:
            nn.init.zeros_(module.cross_attn_warm_up_gate)
        if isinstance(module, SReLU):
            module.reset_parameters()

    def slow_key_values(self, slow: Tensor) -> Tensor:
        """Slow tokens [B, Ls, H] -> K and V of all hybrid layers, [B, hybrid layers, 2, kv heads, Ls, head_dim]."""
        return torch.stack([layer.slow_key_values(slow) for layer in self.layers if layer.is_hybrid], dim=1)


class LlavaQwenSlowFastForCausalLM(Qwen2ForCausalLM):
    """The model users load: `AutoModelForCausalLM.from_pretrained(checkpoint)` after `import sfexport.model`."""

    config_class = LlavaQwenSlowFastConfig
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\.vision_tower\.(head|vision_model\.(head|post_layernorm))\."]
    _keys_to_ignore_on_load_missing = [r"vision_tower\.vision_tower\.vision_model\.embeddings\.position_ids"]

    def __init__(self, config: LlavaQwenSlowFastConfig) -> None:
        Qwen2PreTrainedModel.__init__(self, config)
        self.model = LlavaQwenSlowFastModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """transformers' from_pretrained; the tower's sizes are read from a local checkpoint's tensors."""
        if config is None:
            config = cls.config_class.from_pretrained(path)
        if "decode_mode" in kwargs:
            config.decode_mode = kwargs.pop("decode_mode")
        if getattr(config, "vision_tower_sizes", None) is None and Path(path).is_dir():
            config.set_tower(Checkpoint.open(path).tower)
        return super().from_pretrained(path, *args, config=config, **kwargs)

    def prepare_multimodal(
        self,
        input_ids: Tensor,
        images: Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Merged, SlowBranch | None]:
        """Encode the videos and merge them into the prompts.

        Args:
            input_ids: int64 [B, N]; -200 stands for the row's video.
            images: one [T, 3, S, S] or [3, S, S] per row (T = 1: an image), also for rows without a -200; None
                for text only.
            attention_mask, labels: [B, N] or None.
        """
        text, slow_fast = self.config.facts.text, self.config.facts.slow_fast
        if images is not None and len(images) != len(input_ids):
            raise InputError(f"{len(input_ids)} prompts need as many videos or images; {len(images)} were given.")
        videos = None if images is None else self.model.encode_videos(images)
        merged = merge(
            input_ids,
            attention_mask,
            labels,
            None if videos is None else videos.fast,
            self.model.embed_tokens,
            text.max_length,
            text.padding_side,
        )
        if videos is None or not slow_fast.hybrid_layers:
            return merged, None
        slow, mask = videos.padded_slow()
        mask = mask & (merged.token_types == VISUAL).any(-1, keepdim=True)
        attends = attending_positions(merged.token_types, slow_fast.attends)
        return merged, SlowBranch(self.model.slow_key_values(slow), attends, mask)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        images: Sequence[Tensor] | None = None,
        slow_key_values: Tensor | None = None,
        slow_attends: Tensor | None = None,
        slow_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, L, V] over the merged sequence, and the loss where labels [B, N] are given.

        `slow_*` are SlowBranch's fields, for callers (such as generate) that have encoded the videos already.
        """
        if inputs_embeds is None and past_key_values is None:
            merged, slow = self.prepare_multimodal(input_ids, images, attention_mask, labels)
            input_ids, inputs_embeds, position_ids = None, merged.inputs_embeds, merged.position_ids
            attention_mask = merged.attention_mask
            labels = None if labels is None else merged.labels
        else:
            slow = None if slow_key_values is None else SlowBranch(slow_key_values, slow_attends, slow_mask)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            slow=slow,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        decode_mode: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate on [B, N] prompts and one video a row; returns the new tokens only.

        Args:
            decode_mode: 'released' or 'trained'; None takes the configuration's.
        """
        decode_mode = decode_mode or self.config.facts.slow_fast.decode_mode
        if decode_mode not in DECODE_MODES:
            raise InputError(f"Unknown decode mode {decode_mode!r}; choose one of {', '.join(DECODE_MODES)}.")
        if inputs is None:
            inputs = kwargs.pop("input_ids")
        merged, slow = self.prepare_multimodal(inputs, images, attention_mask)
        if slow is not None:
            kwargs |= {"slow_key_values": slow.key_values, "slow_attends": slow.attends, "slow_mask": slow.mask}
        return super().generate(
            inputs_embeds=merged.inputs_embeds,
            attention_mask=merged.attention_mask.long(),
            decode_mode=decode_mode,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        decode_mode: str = "released",
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prefill as merged; a decode step drops the slow branch ('released') or attends to it ('trained')."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if inputs.get("slow_key_values") is None or is_first_iteration:
            return inputs
        if decode_mode == "released":
            return inputs | {"slow_key_values": None, "slow_attends": None, "slow_mask": None}
        return inputs | {"slow_attends": torch.ones_like(inputs["input_ids"], dtype=torch.bool)}


# timm and open_clip call ConvNeXt's layer scale 'gamma'; the released files say 'weight'.
register_checkpoint_conversion_mapping(
    LlavaQwenSlowFastForCausalLM.__name__,
    [WeightRenaming(r"(vision_tower\.stages\.\d+\.blocks\.\d+)\.gamma", r"\1.weight")],
    overwrite=True,
)
