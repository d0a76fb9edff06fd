"""What is trained: the released architecture at toy size, with heads that are thrown away afterwards."""

from __future__ import annotations

import math
from typing import Any

import torch
from packing import HEADS, IGNORED, Collator
from tokenizers import Tokenizer as BpeTokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from sfexport.checkpoint.fast_path import fast_token_count
from sfexport.checkpoint.vision_tower import ConvNextTower
from sfexport.demo.scenes import FRAMES, SIZE, make_scene
from sfexport.model import LlavaQwenSlowFastConfig, LlavaQwenSlowFastForCausalLM
from sfexport.model.compressor import fast_tokens, slow_tokens
from sfexport.model.hybrid_decoder import SlowBranch
from sfexport.model.vision import ConvNextBlock
from sfexport.qa.prompt import ChatTokenizer
from sfexport.testing.corpus import CORPUS
from sfexport.testing.random_checkpoint import demo_config
from sfexport.testing.tokenizer import train_tokenizer

TOWER = ConvNextTower(depths=(1, 2), widths=(32, 96), stem_patch=4, kernel=7)
HYBRID = {"cross_attn_every_n_layers": 2, "cross_attn_min_layer_depth": 0, "cross_attn_max_layer_depth": 4}
ORDINARY_TOKENS = 600
QUERY_GAIN = 1.7  # larger queries and keys: attention binds earlier


def make_tokenizer() -> BpeTokenizer:
    """Byte-level BPE in which every word of the questions and answers is one token."""
    texts = list(CORPUS)
    for i in range(400):
        for q in make_scene(0, i).questions():
            texts += [q.text, q.answer, f"flash {q.answer}"]
    return train_tokenizer(texts, ORDINARY_TOKENS)


def make_fields(projector: str, hybrid: bool) -> dict[str, Any]:
    """config.json at toy size; the fast path is the released 128-frame setting in small (sampling 2, pooling 4)."""
    fields = demo_config(make_tokenizer()) | {
        "_name_or_path": "sfexport-shapes",
        "mm_vision_tower": f"convnext-{SIZE}",
        "hidden_size": 128,
        "intermediate_size": 384,
        "mm_hidden_size": TOWER.out_size,
        "mm_projector_type": projector,
        "mm_training_video_frames": FRAMES,
        "fast_token_temporal_sampling_stride": 2,
        "fast_token_temporal_stride": 4,
        "min_fast_frames": 2,
    }
    return fields | (HYBRID if hybrid else {"cross_attn_every_n_layers": None})


def make_config(projector: str, hybrid: bool) -> LlavaQwenSlowFastConfig:
    fields = make_fields(projector, hybrid)
    del fields["torch_dtype"]
    config = LlavaQwenSlowFastConfig(**fields)
    config.set_tower(TOWER)
    return config


def make_collator(lm: LlavaQwenSlowFastForCausalLM, tokenizer: ChatTokenizer, slow_dropout: float = 0.0) -> Collator:
    """Packs questions behind as many fast tokens as the model makes of a clip."""
    config = lm.config.model_config.slow_fast
    cells = (TOWER.grid(SIZE) // config.video_pooling_stride) ** 2
    fast = fast_token_count(FRAMES, cells, config.fast)
    return Collator(tokenizer.prompt("?").before, fast, slow_dropout if config.hybrid_layers else 0.0)


def initialise(model: nn.Module) -> None:
    """Weights for training from scratch at this size; gates start open (|g| about 0.6)."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            gain = QUERY_GAIN if name.endswith(("q_proj", "k_proj", "cross_attn_kv_proj")) else 1.0
            nn.init.normal_(module.weight, std=gain * 0.58 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
        elif isinstance(module, ConvNextBlock):
            nn.init.constant_(module.weight, 0.5)
    open_gates(model)


def open_gates(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "cross_attn_gate_proj" in name:
            nn.init.constant_(parameter, float(name.endswith("bias")))
        if name.endswith("cross_attn_warm_up_gate"):
            nn.init.ones_(parameter)


class Heads(nn.Module):
    """Linear read-outs of frames [N, n, C]: flash, digit, corner from the mean cell, shape and colour per cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in HEADS.items()})

    def forward(self, tokens: Tensor, batch: dict[str, Tensor], cells: bool) -> Tensor:
        mean = tokens.mean(1)
        loss = sum(
            F.cross_entropy(self.heads[n](mean), batch[f"head_{n}"].flatten()) for n in ("flash", "digit", "corner")
        )
        for n in ("shape", "colour") if cells else ():
            labels = batch[f"head_{n}"].flatten(0, 1)
            side = math.isqrt(tokens.shape[1])
            labels = F.adaptive_max_pool2d(labels[:, None].float(), side).long().flatten()
            # Most cells are empty: those with something in them weigh more.
            weight = torch.ones(HEADS[n], device=tokens.device)
            weight[0] = 0.1
            loss = loss + F.cross_entropy(self.heads[n](tokens).flatten(0, 1), labels, weight)
        return loss


class TowerTrainee(nn.Module):
    """Stage 0: the tower alone, on single frames."""

    def __init__(self, lm: LlavaQwenSlowFastForCausalLM) -> None:
        super().__init__()
        self.lm, self.heads = lm, Heads(TOWER.out_size)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        features = self.lm.model.vision_tower(batch["pixels"].flatten(0, 1))
        return {"loss": self.heads(F.layer_norm(features, features.shape[-1:]), batch, cells=True)}


class Trainee(nn.Module):
    """The later stages: the whole model on packed questions. `auxiliary` weighs the heads on slow tokens."""

    def __init__(self, lm: LlavaQwenSlowFastForCausalLM, auxiliary: float, cells: bool = True) -> None:
        super().__init__()
        self.lm, self.heads, self.auxiliary, self.cells = lm, Heads(lm.config.hidden_size), auxiliary, cells

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        lm = self.lm
        slow, hidden = self._run(batch)
        # Position i predicts the label of i + 1.
        labels = batch["labels"][:, 1:]
        counts = labels != IGNORED
        loss = F.cross_entropy(lm.lm_head(hidden[:, :-1][counts]), labels[counts])
        if self.auxiliary:
            loss = loss + self.auxiliary * self.heads(F.rms_norm(slow, slow.shape[-1:]), batch, self.cells)
        return {"loss": loss}

    def predictions(self, batch: dict[str, Any]) -> Tensor:
        """The likeliest next token of every position, [B, L]."""
        return self.lm.lm_head(self._run(batch)[1]).argmax(-1)

    def _run(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Slow tokens [clips * frames, P, H] and the decoder's last hidden states [clips, L, H]."""
        model, config = self.lm.model, self.lm.config.model_config.slow_fast
        projected = model.mm_projector(model.vision_tower(batch["pixels"].flatten(0, 1)))
        slow = slow_tokens(projected, config.video_pooling_stride)
        by_clip = slow.unflatten(0, (len(batch["pixels"]), -1))
        fast = torch.stack([fast_tokens(s, config.fast) for s in by_clip])
        return slow, self._decode(fast, by_clip.flatten(1, 2), batch)

    def _decode(self, fast: Tensor, slow: Tensor, batch: dict[str, Any]) -> Tensor:
        segments = batch["segments"]
        prefix = int((segments[0] == 0).sum())
        visual = slice(prefix - fast.shape[1], prefix)
        embeds = self.lm.model.embed_tokens(batch["ids"])
        embeds = torch.cat([embeds[:, : visual.start], fast, embeds[:, prefix:]], dim=1)
        branch = None
        if self.lm.config.model_config.slow_fast.hybrid_layers and not batch["slow_off"]:
            attends = segments >= 0
            attends[:, visual] = False
            mask = torch.ones(slow.shape[:2], dtype=torch.bool, device=slow.device)
            branch = SlowBranch(self.lm.model.slow_key_values(slow), attends, mask)
        return self.lm.model(
            inputs_embeds=embeds,
            attention_mask=block_mask(segments),
            position_ids=batch["positions"],
            use_cache=False,
            slow=branch,
        ).last_hidden_state


def block_mask(segments: Tensor) -> Tensor:
    """bool [B, 1, L, L]: earlier positions of the prefix and of the same segment (padding sees itself)."""
    same = segments[:, :, None] == segments[:, None, :]
    prefix = (segments == 0)[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    return ((same | prefix) & causal)[:, None]
