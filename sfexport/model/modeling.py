"""The full model: frames and a prompt in, logits, loss or an answer out.

Names, defaults and maths follow the reference (LlavaQwenSlowFastForCausalLM); what it does not do follows
transformers. Two decode modes: 'released' (answer tokens after the first do not see the slow tokens, as the
published code behaves) and 'trained' (they do, as in training).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.config import DecodeMode
from sfexport.errors import InputError
from sfexport.model import caches
from sfexport.model.configuration import LlavaQwenSlowFastConfig
from sfexport.model.hybrid_decoder import SlowBranch
from sfexport.model.merging import IGNORED_LABEL, VISUAL, Merged, attending_positions, merge
from sfexport.model.slow_fast_model import LlavaQwenSlowFastModel, SlowFastPreTrainedModel

# timm and open_clip call ConvNeXt's layer scale 'gamma'; the released files say 'weight'.
_LAYER_SCALE = re.compile(r"(vision_tower\.stages\.\d+\.blocks\.\d+)\.gamma$")


class LlavaQwenSlowFastForCausalLM(SlowFastPreTrainedModel, GenerationMixin):
    """The model users load: `AutoModelForCausalLM.from_pretrained(checkpoint)` after `import sfexport.model`."""

    accepts_loss_kwargs = True  # transformers' Trainer then gives num_items_in_batch
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\.vision_tower\.(head|vision_model\.(head|post_layernorm))\."]

    def __init__(self, config: LlavaQwenSlowFastConfig) -> None:
        super().__init__(config)
        text = config.model_config.text
        self.model = LlavaQwenSlowFastModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[Any] | None,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model as transformers does, with the tower's sizes read from a local checkpoint's tensors."""
        path = pretrained_model_name_or_path
        if config is None and path is not None:
            config = cls.config_class.from_pretrained(path)
        if "decode_mode" in kwargs:
            config.decode_mode = kwargs.pop("decode_mode")
        if kwargs.get("state_dict") is not None or path is None or not Path(path).is_dir():
            return super().from_pretrained(path, *model_args, config=config, **kwargs)
        checkpoint = Checkpoint.open(Path(path))
        if getattr(config, "vision_tower_sizes", None) is None:
            config.set_tower(checkpoint.tower)
        state = _renamed_layer_scale(checkpoint)
        if state is None:
            return super().from_pretrained(path, *model_args, config=config, **kwargs)
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=state, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = str(path)
        if (checkpoint.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
        return loaded

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def prepare_multimodal(
        self,
        input_ids: Tensor,
        images: Sequence[Tensor | None] | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: str | None = None,
    ) -> tuple[Merged, SlowBranch | None]:
        """Encode the videos and merge their fast tokens into the prompts.

        Args:
            input_ids: int64 [B, N]; -200 stands for the row's video.
            images: one [T, 3, S, S] or [3, S, S] (T = 1: an image) or None per row, also for rows without a -200;
                None for text only.
            attention_mask: [B, N] or None.
            labels: [B, N] or None.
            padding_side: 'left' or 'right', for the merged rows; default the configuration's.

        Returns:
            The merged prompts, and the slow branch's tensors or None without videos or hybrid layers.

        Raises:
            InputError: the numbers of prompts and videos differ, or a prompt and its video do not fit together.
        """
        text, slow_fast = self.config.model_config.text, self.config.model_config.slow_fast
        if images is not None and len(images) != len(input_ids):
            raise InputError(f"{len(input_ids)} prompts need as many videos or images; {len(images)} were given.")
        videos = None
        if images is not None and any(video is not None for video in images):
            videos = self.model.encode_videos(images)
        fast = (
            None if videos is None else [f if len(s) else None for s, f in zip(videos.slow, videos.fast, strict=True)]
        )
        merged = merge(
            input_ids,
            attention_mask,
            labels,
            fast,
            self.model.embed_tokens,
            text.max_length,
            padding_side or text.padding_side,
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
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        images: Sequence[Tensor | None] | None = None,
        slow_key_values: Tensor | None = None,
        slow_attends: Tensor | None = None,
        slow_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute logits [B, L, V] over the merged sequence, and the loss if labels [B, N] are given.

        `slow_*` are SlowBranch's fields, for callers (such as generate) that have encoded the videos already. A call
        that continues a cache (`cache` or `past_key_values`) takes token ids or embeddings, and an attention mask
        over all positions from the first on.
        """
        kwargs |= {"cache": cache, "past_key_values": past_key_values}
        cache = caches.take_cache(kwargs)
        slow = _slow_branch(slow_key_values, slow_attends, slow_mask)
        continues = caches.length(cache) > 0
        _check_inputs(input_ids, inputs_embeds, images, continues)
        # 1. Embed token ids, and encode and merge the videos of a prompt.
        if input_ids is not None and continues:
            inputs_embeds = self.model.embed_tokens(input_ids)
        elif input_ids is not None:
            merged, slow = self.prepare_multimodal(input_ids, images, attention_mask, labels)
            inputs_embeds, position_ids = merged.inputs_embeds, merged.position_ids
            attention_mask, labels = merged.attention_mask, None if labels is None else merged.labels
        # 2. Run the decoder.
        out = self.model(
            inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            slow=slow,
            output_hidden_states=bool(output_hidden_states),
            **{caches.NAME: cache},
            **kwargs,
        )
        # 3. Compute the logits and the loss.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        result = CausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=out.hidden_states,
            **{caches.NAME: out.get(caches.NAME)},
        )
        return result.to_tuple() if return_dict is False else result

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Sequence[Tensor | None] | None = None,
        attention_mask: Tensor | None = None,
        decode_mode: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate answers to [B, N] prompts with one video per row, as transformers does; return the new tokens only.

        Rows of different lengths are padded on the left, whatever the configuration says, so that each answer is the
        one that its row has alone.

        Args:
            decode_mode: 'released' or 'trained'; default the configuration's.

        Raises:
            InputError: there is no prompt, the mode is unknown, or an argument does not work with videos.
        """
        mode = DecodeMode.parse(decode_mode) if decode_mode else self.config.model_config.slow_fast.decode_mode
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        if inputs is None:
            raise InputError("generate needs a prompt's token ids, [B, N].")
        cache = caches.take_cache(kwargs)
        if caches.length(cache):
            raise InputError("generate starts with an empty cache.", "Give the whole prompt and no cache.")
        if cache is not None:
            kwargs[caches.NAME] = cache
        config = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)) is not None:
            raise InputError("prefill_chunk_size does not work with a video's embeddings.", "Leave it out.")
        merged, slow = self.prepare_multimodal(inputs, images, attention_mask, padding_side="left")
        if slow is not None:
            kwargs |= {"slow_key_values": slow.key_values, "slow_attends": slow.attends, "slow_mask": slow.mask}
        return super().generate(
            inputs_embeds=merged.inputs_embeds,
            attention_mask=merged.attention_mask.long(),
            decode_mode=mode,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decode_mode: str = DecodeMode.RELEASED,
        slow_key_values: Tensor | None = None,
        slow_attends: Tensor | None = None,
        slow_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of generate's next forward call, for the positions that the cache does not hold.

        Args:
            input_ids: the tokens generated so far, [B, new].
            inputs_embeds: the merged prompt.
            attention_mask: over the prompt and the new tokens; None: no padding.
            decode_mode: 'trained' if new tokens attend to the slow tokens, else 'released'.

        Raises:
            InputError: the cache or the mask does not fit the tokens, or there is no merged prompt.
        """
        if inputs_embeds is None:
            raise InputError("Generation continues a prompt's embeddings, and none were given.", "Call generate.")
        cache = caches.take_cache(kwargs)
        past, prompt = caches.length(cache), inputs_embeds.shape[1]
        total = prompt + input_ids.shape[1]
        covered = total if attention_mask is None else attention_mask.shape[1]
        if covered != total or 0 < past < prompt or past >= total:
            raise InputError(
                f"The cache holds {past} positions and the attention mask covers {covered}; the prompt and the tokens "
                f"generated so far are {total}.",
                "This transformers version may hand over its cache in another way; use another version.",
            )
        embeds = self.model.embed_tokens(input_ids[:, max(0, past - prompt) :])
        new_attends = torch.full(embeds.shape[:2], decode_mode == DecodeMode.TRAINED, device=embeds.device)
        attends: Tensor | None = new_attends
        if not past:
            embeds = torch.cat([inputs_embeds, embeds], dim=1)
            attends = None if slow_attends is None else torch.cat([slow_attends, new_attends], dim=1)
        names = ("use_cache", "logits_to_keep", "output_hidden_states")
        out: dict[str, Any] = {name: kwargs[name] for name in names if name in kwargs}
        if kwargs.get("output_attentions"):
            raise InputError("The model does not return attention weights.", "Leave output_attentions out.")
        if slow_key_values is not None and (not past or decode_mode == DecodeMode.TRAINED):
            out |= {"slow_key_values": slow_key_values, "slow_attends": attends, "slow_mask": slow_mask}
        return out | {"inputs_embeds": embeds, "attention_mask": attention_mask, caches.NAME: cache}


def _check_inputs(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, images: Sequence[Tensor | None] | None, continues: bool
) -> None:
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("The model takes either input_ids or inputs_embeds.")
    if images is not None and (continues or inputs_embeds is not None):
        raise InputError("Videos belong to a prompt's token ids, not to embeddings or to what follows a prompt.")


def _slow_branch(key_values: Tensor | None, attends: Tensor | None, mask: Tensor | None) -> SlowBranch | None:
    """Make a SlowBranch of forward's arguments, of which all or none are given."""
    if key_values is None:
        return None
    if attends is None or mask is None:
        raise InputError("slow_key_values needs slow_attends and slow_mask.")
    return SlowBranch(key_values, attends, mask)


def _renamed_layer_scale(checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    """Read all tensors with each `gamma` renamed to `weight`; None if no tensor is called `gamma`."""
    state: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(shard.path, framework="pt")) for shard in checkpoint.shards]
        if not any(_LAYER_SCALE.search(name) for file in files for name in file.keys()):  # noqa: SIM118
            return None
        for file in files:
            state |= {_LAYER_SCALE.sub(r"\1.weight", name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return state


def next_token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Compute the cross-entropy of each position's next label, without those that are IGNORED_LABEL.

    Args:
        logits: [B, L, V].
        labels: int64 [B, L].
        num_items_in_batch: number of labels of all batches that one optimizer step sums up; None: the mean of this
            batch.

    Raises:
        InputError: the logits are of some positions only.
    """
    if logits.shape[:2] != labels.shape:
        raise InputError(f"{logits.shape[1]} positions have logits and {labels.shape[1]} have labels.")
    found, wanted = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    if num_items_in_batch is None:
        return F.cross_entropy(found, wanted, ignore_index=IGNORED_LABEL)
    return F.cross_entropy(found, wanted, ignore_index=IGNORED_LABEL, reduction="sum") / num_items_in_batch
