"""Merge text and fast tokens into one sequence per row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfexport.checkpoint.config import Attending
from sfexport.errors import InputError

logger = logging.getLogger(__name__)

VIDEO_TOKEN = -200  # stands for the whole video (or image) in input_ids
IGNORED_LABEL = -100
PROMPT_TEXT, ANSWER_TEXT, VISUAL, PADDING = 1, 2, 3, 4  # the reference's token types


@dataclass
class Merged:
    """A batch after merging; L is the longest row.

    Attributes:
        inputs_embeds: [B, L, H].
        token_types: the reference's token types, int64 [B, L].
        attention_mask: False for padding, bool [B, L].
        position_ids: int64 [B, L].
        labels: int64 [B, L].
    """

    inputs_embeds: Tensor
    token_types: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor


@dataclass
class _Row:
    embeds: Tensor
    types: Tensor
    labels: Tensor

    def cut(self, length: int) -> _Row:
        return _Row(self.embeds[:length], self.types[:length], self.labels[:length])


def merge(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    fast: Sequence[Tensor | None] | None,
    embed: Callable[[Tensor], Tensor],
    max_length: int | None,
    padding_side: str,
) -> Merged:
    """Replace each row's VIDEO_TOKEN by its fast tokens, cut to `max_length`, pad to the longest row.

    Args:
        input_ids: int64 [B, N] with at most one VIDEO_TOKEN a row.
        attention_mask: [B, N]; positions that are 0 are removed before merging. None: all are kept.
        fast: per row [F, H], or None for a row without video; None where no row has one.

    Raises:
        InputError: a row has several videos, or a video token without a video.
    """
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    labels = torch.full_like(input_ids, IGNORED_LABEL) if labels is None else labels
    rows = []
    for b in range(len(input_ids)):
        row = _merge_row(input_ids[b][keep[b]], labels[b][keep[b]], None if fast is None else fast[b], embed)
        rows.append(_truncate(row, max_length))
    return _pad(rows, padding_side)


def _merge_row(ids: Tensor, labels: Tensor, fast: Tensor | None, embed: Callable[[Tensor], Tensor]) -> _Row:
    at = (ids == VIDEO_TOKEN).nonzero().flatten().tolist()
    types = torch.where(labels == IGNORED_LABEL, PROMPT_TEXT, ANSWER_TEXT)
    if not at:
        return _Row(embed(ids), types, labels)
    if len(at) > 1:
        raise InputError(f"A prompt has {len(at)} videos or images; the model takes one per prompt.")
    if fast is None:
        raise InputError("The prompt has a video token but no video was given.")
    before, after = slice(0, at[0]), slice(at[0] + 1, None)
    visual = torch.full((len(fast),), VISUAL, device=ids.device)
    ignored = torch.full((len(fast),), IGNORED_LABEL, device=ids.device)
    return _Row(
        torch.cat([embed(ids[before]), fast, embed(ids[after])]),
        torch.cat([types[before], visual, types[after]]),
        torch.cat([labels[before], ignored, labels[after]]),
    )


def _truncate(row: _Row, max_length: int | None) -> _Row:
    if max_length is None or len(row.types) <= max_length:
        return row
    lost = row.types[max_length:]
    logger.warning(
        "The prompt has %d positions and the model takes %d: the last %d are cut off, of them %d text tokens%s. "
        "Use fewer frames or a larger fast-token stride.",
        len(row.types),
        max_length,
        len(lost),
        int((lost != VISUAL).sum()),
        ", the question among them" if bool((lost != VISUAL).any()) else "",
    )
    return row.cut(max_length)


def _pad(rows: list[_Row], side: str) -> Merged:
    longest = max(len(row.types) for row in rows)
    device, width = rows[0].embeds.device, rows[0].embeds.shape[-1]
    out = Merged(
        inputs_embeds=rows[0].embeds.new_zeros(len(rows), longest, width),
        token_types=torch.full((len(rows), longest), PADDING, device=device),
        attention_mask=torch.zeros(len(rows), longest, dtype=torch.bool, device=device),
        position_ids=torch.zeros(len(rows), longest, dtype=torch.long, device=device),
        labels=torch.full((len(rows), longest), IGNORED_LABEL, device=device),
    )
    for b, row in enumerate(rows):
        length = len(row.types)
        where = slice(longest - length, longest) if side == "left" else slice(0, length)
        out.inputs_embeds[b, where] = row.embeds
        out.token_types[b, where] = row.types
        out.attention_mask[b, where] = True
        out.position_ids[b, where] = torch.arange(length, device=device)
        out.labels[b, where] = row.labels
    return out


def attending_positions(token_types: Tensor, attends: Attending) -> Tensor:
    """Return the positions that query the slow tokens, bool [B, L].

    TEXT takes prompt and answer text; TEXT_AFTER_VIDEO leaves out text before the first visual token; ALL takes every
    position, with padding, as the reference does.
    """
    if attends == Attending.ALL:
        return torch.ones_like(token_types, dtype=torch.bool)
    text = token_types <= ANSWER_TEXT
    if attends == Attending.TEXT_AFTER_VIDEO:
        visual = token_types == VISUAL
        text &= (visual.cumsum(-1) > 0) | ~visual.any(-1, keepdim=True)
    return text
