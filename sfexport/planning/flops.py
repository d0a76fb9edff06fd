"""Count FLOPs and bytes of every part of a Slow-Fast model from its sizes alone. No other module has such formulas.

A multiply-add is two FLOPs. Matrix products and convolutions are counted, as torch's FlopCounterMode does; norms,
activations, softmax, rotary angles, pooling and the means that make fast tokens are not. Attention is counted over
all positions, masked or not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sfexport.checkpoint.config import TOWER_PREFIX, Attending, ModelConfig
from sfexport.checkpoint.fast_path import fast_token_count
from sfexport.checkpoint.vision_tower import ConvNextTower, Tower, VitTower
from sfexport.exporting.rounding import block_for

PARTS = ("tower", "projector", "compressor", "decoder", "head", "embedding")
EMBEDDING_BYTES = 2  # per element: the table is read from the checkpoint's file, which usually has 16 bits


@dataclass(frozen=True)
class Storage:
    """Formats of a model's weights, activations and K/V.

    4-bit matrices have a scale per block, 8-bit ones a scale per output; a scale takes `width` bytes. A matrix that
    cannot be cut into blocks is not quantised to 4 bits.

    Attributes:
        name: 'fp32', 'fp16', 'bf16', or the decoder's layers and its head: 'int4+fp16', 'int4+int8'.
        width: bytes of an activation, of a K/V element and of every weight that is not quantised.
        body_bits: bits of a weight of the decoder's matrices.
        head_bits: bits of a weight of the head's matrix.
    """

    name: str
    width: int
    body_bits: int
    head_bits: int

    @property
    def quantised(self) -> bool:
        return self.body_bits < 16


def storages(half: str) -> tuple[Storage, ...]:
    """List the weight formats of a model, widest first.

    Args:
        half: 'fp16' or 'bf16', the checkpoint's 16-bit dtype.
    """
    return (
        Storage("fp32", 4, 32, 32),
        Storage(half, 2, 16, 16),
        Storage(f"int4+{half}", 2, 4, 16),
        Storage("int4+int8", 2, 4, 8),
    )


@dataclass(frozen=True)
class Lengths:
    """Numbers of frames and tokens of a prompt.

    Attributes:
        frames: number of frames sampled from the video.
        before: number of text tokens before the video.
        fast: number of the video's fast tokens.
        question: number of text tokens from the video's end to the answer.
        slow: number of the video's slow tokens, which take no position.
    """

    frames: int
    before: int
    fast: int
    question: int
    slow: int

    @property
    def prompt(self) -> int:
        """Positions of the whole prompt."""
        return self.before + self.fast + self.question


def prompt_lengths(
    config: ModelConfig, tower: Tower, image_size: int, frames: int, before: int, question: int
) -> Lengths:
    """Count the tokens of a prompt about `frames` frames.

    One frame is a single image, whose tokens are not pooled.
    """
    side = tower.grid(image_size)
    cells = side**2 if frames == 1 else (side // config.slow_fast.video_pooling_stride) ** 2
    fast = fast_token_count(frames, cells, config.slow_fast.fast)
    return Lengths(frames, before, fast, question, frames * cells if config.slow_fast.hybrid_layers else 0)


def tower_flops(tower: Tower, image_size: int) -> int:
    """Count the tower's FLOPs for one frame of image_size x image_size pixels."""
    if isinstance(tower, ConvNextTower):
        return _convnext_flops(tower, image_size)
    return _vit_flops(tower, image_size)


def _convnext_flops(tower: ConvNextTower, image_size: int) -> int:
    side = image_size // tower.stem_patch
    total = 2 * side**2 * 3 * tower.stem_patch**2 * tower.widths[0]
    for stage, (depth, width) in enumerate(zip(tower.depths, tower.widths, strict=True)):
        if stage:
            side //= 2
            total += 2 * side**2 * 4 * tower.widths[stage - 1] * width
        # Depthwise convolution, then an MLP four times as wide.
        total += depth * 2 * side**2 * (tower.kernel**2 * width + 8 * width**2)
    return total


def _vit_flops(tower: VitTower, image_size: int) -> int:
    cells, width = tower.grid(image_size) ** 2, tower.width
    tokens = cells + (tower.kind == "clip")
    layer = 4 * width**2 + 2 * width * tower.intermediate_size + 2 * tokens * width
    return 2 * cells * 3 * tower.patch**2 * width + tower.num_layers_used * 2 * tokens * layer


def projector_flops(config: ModelConfig, tokens: int) -> int:
    """Count the projector's FLOPs for `tokens` tower features: every cell of every frame, before pooling."""
    projector, hidden = config.projector, config.text.hidden_size
    if projector.kind == "identity":
        return 0
    return 2 * tokens * (projector.in_size * hidden + (projector.depth - 1) * hidden**2)


def vision_flops(config: ModelConfig, tower: Tower, image_size: int, frames: int) -> int:
    """Count the FLOPs of tower and projector for all frames."""
    cells = tower.grid(image_size) ** 2
    return frames * tower_flops(tower, image_size) + projector_flops(config, frames * cells)


def slow_key_value_flops(config: ModelConfig, slow: int) -> int:
    """Count the FLOPs of the compressor's projections of `slow` slow tokens, made once per video."""
    text = config.text
    width = 2 * text.num_kv_heads * text.head_dim
    return 2 * slow * text.hidden_size * width * len(config.slow_fast.hybrid_layers)


@dataclass(frozen=True)
class DecoderFlops:
    """FLOPs of one decoder call, by operation."""

    linear: int
    self_attention: int
    cross_attention: int
    head: int

    @property
    def total(self) -> int:
        return self.linear + self.self_attention + self.cross_attention + self.head


def decoder_flops(
    config: ModelConfig, positions: int, past: int = 0, slow: int = 0, rows: int | None = None, logits: int = 1
) -> DecoderFlops:
    """Count the FLOPs of one decoder call: a prefill, or a decode step of one position.

    Args:
        positions: number of positions computed.
        past: number of positions before them, whose K/V are kept.
        slow: number of slow tokens attended to; 0: the call has no slow tokens.
        rows: number of positions that attend to slow tokens; None: all.
        logits: number of positions whose logits are computed.
    """
    text, hybrid = config.text, len(config.slow_fast.hybrid_layers) if slow else 0
    width, kv_width = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    rows = positions if rows is None else rows
    per_position = 2 * text.hidden_size * (width + kv_width) + 3 * text.hidden_size * text.intermediate_size
    return DecoderFlops(
        linear=2 * positions * text.num_layers * per_position,
        self_attention=4 * positions * (past + positions) * width * text.num_layers,
        cross_attention=hybrid * rows * width * (4 * slow + 2),  # scores and context, and the gate's one output
        head=2 * logits * text.hidden_size * text.vocab_size,
    )


@dataclass(frozen=True)
class Call:
    """One decoder call as a session makes it.

    Attributes:
        positions: number of positions computed.
        past: number of positions before them.
        slow: number of slow tokens attended to.
    """

    positions: int
    past: int
    slow: int


def prefill_calls(config: ModelConfig, lengths: Lengths) -> dict[str, Call]:
    """Name the prefill calls of a prompt: 'before' and 'fast', once per video, and 'question'.

    A call gets slow tokens only if one of its positions attends to them.
    """
    attends = config.slow_fast.attends
    return {
        "before": Call(lengths.before, 0, 0 if attends == Attending.TEXT_AFTER_VIDEO else lengths.slow),
        "fast": Call(lengths.fast, lengths.before, lengths.slow if attends == Attending.ALL else 0),
        "question": Call(lengths.question, lengths.before + lengths.fast, lengths.slow),
    }


def call_flops(config: ModelConfig, call: Call) -> int:
    """Count the FLOPs of one decoder call as a session makes it."""
    return decoder_flops(config, call.positions, call.past, call.slow).total


def weight_bytes(config: ModelConfig, tower: Tower, storage: Storage) -> dict[str, int]:
    """Count the bytes of the weights by part (PARTS).

    A head tied to the embedding counts in both: the decoder holds it, the table stays a file.
    """
    out = dict.fromkeys(PARTS, 0)
    text = config.text
    for name, shape in (config.expected_tensors() | tower.expected_tensors()).items():
        out[_part(name)] += _tensor_bytes(name, shape, storage)
    if text.tie_word_embeddings:
        out["head"] = _matrix_bytes(text.vocab_size, text.hidden_size, storage.head_bits, storage.width)
    out["embedding"] = EMBEDDING_BYTES * text.vocab_size * text.hidden_size
    return out


def _part(name: str) -> str:
    if name.startswith(TOWER_PREFIX):
        return "tower"
    if name.startswith("model.mm_projector"):
        return "projector"
    if "cross_attn_kv_proj" in name:
        return "compressor"
    return {"lm_head.weight": "head", "model.embed_tokens.weight": "embedding"}.get(name, "decoder")


def _tensor_bytes(name: str, shape: tuple[int, ...], storage: Storage) -> int:
    bits = {"decoder": storage.body_bits, "head": storage.head_bits}.get(_part(name))
    if bits is None or len(shape) != 2 or "cross_attn" in name:
        return storage.width * math.prod(shape)
    return _matrix_bytes(*shape, bits, storage.width)


def _matrix_bytes(outputs: int, inputs: int, bits: int, width: int) -> int:
    """Count the bytes of a matrix in `bits` with its scales; `width`: bytes of a scale."""
    block = {4: block_for(inputs, outputs), 8: inputs}.get(bits)
    if block is None:
        return outputs * inputs * (bits // 8 or width)
    return outputs * inputs * bits // 8 + outputs * inputs // block * width


def text_key_value_bytes(config: ModelConfig, positions: int, width: int) -> int:
    """Count the bytes of K and V of `positions` positions in every layer; `width`: bytes of an element."""
    text = config.text
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * positions * width


def slow_key_value_bytes(config: ModelConfig, slow: int, width: int) -> int:
    """Count the bytes of K and V of `slow` slow tokens in every hybrid layer; `width`: bytes of an element."""
    text = config.text
    return 2 * len(config.slow_fast.hybrid_layers) * text.num_kv_heads * text.head_dim * slow * width


def call_bytes(config: ModelConfig, weights: Mapping[str, int], call: Call, width: int) -> int:
    """Count the bytes that a decoder call reads at least: every weight once, and the K/V attended to.

    Args:
        weights: bytes by part, from weight_bytes.
        width: bytes of a K/V element.
    """
    text = text_key_value_bytes(config, call.past + call.positions, width)
    return weights["decoder"] + weights["head"] + text + slow_key_value_bytes(config, call.slow, width)
