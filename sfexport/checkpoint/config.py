"""Hold config.json's account of a model in dataclasses, and the tensors such a model must have.

Pure Python: no torch, no onnx. The torch model, the graphs and the host code all read these, so that a
field's meaning and its default (which follow the reference implementation) are decided in one place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sfexport.checkpoint.config_fields import HINT, ConfigFields, wrong
from sfexport.errors import CheckpointError, InputError
from sfexport.fields import shown

MODEL_TYPE = "llava_qwen_slow_fast"
GATING_TYPES = (
    "whole-dynamic",
    "whole-dynamic-tanh",
    "whole-dynamic-warmup",
    "whole-dynamic-tanh-warmup",
)


class DecodeMode(str, Enum):
    """Decode modes: with TRAINED, as in training, answer tokens attend to the slow tokens.

    With RELEASED, as in the released code, those after the first do not.
    """

    RELEASED = "released"
    TRAINED = "trained"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def parse(cls, mode: str) -> DecodeMode:
        """Return the mode of that name. Raises InputError for an unknown one."""
        try:
            return cls(mode)
        except ValueError:
            raise InputError(f"Unknown decode mode {mode!r}; choose one of {', '.join(cls)}.") from None


class Attending(str, Enum):
    """Positions that query the slow tokens; TEXT_AFTER_VIDEO is masksystem in config.json."""

    TEXT = "text"
    TEXT_AFTER_VIDEO = "text-after-video"
    ALL = "all"

    def __str__(self) -> str:
        return self.value


TOWER_PREFIX = "model.vision_tower.vision_tower."
SRELU_PARAMETERS = ("t_right", "a_right", "t_left", "a_left")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TextConfig:
    """The Qwen2 decoder.

    Attributes:
        max_length: merged sequences (text and fast tokens) are cut to this many positions; None: no limit.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_length: int | None
    padding_side: str

    @classmethod
    def from_fields(cls, fields: ConfigFields) -> TextConfig:
        hidden, heads = fields.needed("hidden_size"), fields.needed("num_attention_heads")
        kv_heads = fields.num_key_value_heads or heads
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json: {heads} num_attention_heads cannot share {kv_heads} num_key_value_heads evenly.", HINT
            )
        head_dim = fields.head_dim or hidden // heads
        if head_dim < 2 or head_dim % 2:
            raise wrong("head_dim", head_dim, "an even number: rotary embeddings take pairs")
        return cls(
            hidden_size=hidden,
            num_layers=fields.needed("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=fields.needed("intermediate_size"),
            vocab_size=fields.needed("vocab_size"),
            rms_norm_eps=fields.rms_norm_eps or 1e-6,
            rope_theta=fields.rotary_base,
            tie_word_embeddings=fields.tie_word_embeddings,
            max_length=fields.tokenizer_model_max_length,
            padding_side=fields.tokenizer_padding_side or "right",
        )


@dataclass(frozen=True)
class GateConfig:
    """g = [tanh](W_g o + b_g) * [tanh](warm_up_gate): which of the two factors exist and pass through tanh."""

    dynamic_tanh: bool
    warm_up: bool
    warm_up_tanh: bool

    @classmethod
    def from_fields(cls, fields: ConfigFields) -> GateConfig:
        gating = fields.needed("cross_attn_gating_type")
        if gating not in GATING_TYPES:
            raise CheckpointError(
                f"config.json: unknown cross_attn_gating_type {shown(gating)}.",
                f"The types that work in the reference are: {', '.join(GATING_TYPES)}.",
            )
        warm_up = gating.endswith("warmup")
        text_only = fields.needed("cross_attn_implementation").startswith("text-only-vanilla")
        return cls(dynamic_tanh="tanh" in gating, warm_up=warm_up, warm_up_tanh=warm_up and text_only)


@dataclass(frozen=True)
class FastPathConfig:
    """Settings of the fast path: frame sampling, then temporal pooling, then spatial pooling.

    The formulas are in docs/reference.md, section 4.
    """

    sampling_stride: int
    temporal_stride: int
    spatial_stride: int
    min_frames: int


@dataclass(frozen=True)
class SlowFastConfig:
    """The slow branch.

    Attributes:
        hybrid_layers: indices of the decoder layers with cross-attention; empty: a plain video MLLM.
        attends: positions that query the slow tokens.
        video_pooling_stride: k of the k x k average pooling of each frame's tokens (videos only).
    """

    hybrid_layers: tuple[int, ...]
    attends: Attending
    gate: GateConfig | None
    fast: FastPathConfig
    video_pooling_stride: int
    decode_mode: DecodeMode

    @classmethod
    def from_fields(cls, fields: ConfigFields) -> SlowFastConfig:
        hybrid = _hybrid_layers(fields)
        mode = DecodeMode.RELEASED if fields.decode_mode is None else fields.decode_mode
        if mode not in tuple(DecodeMode):
            raise CheckpointError(f"config.json: decode_mode {shown(mode)} is not one of {', '.join(DecodeMode)}.")

        def stride(name: str) -> int:
            return fields.needed(name) if hybrid else getattr(fields, name) or 1

        return cls(
            hybrid_layers=hybrid,
            attends=_attends(fields.needed("cross_attn_implementation")) if hybrid else Attending.TEXT,
            gate=GateConfig.from_fields(fields) if hybrid else None,
            fast=FastPathConfig(
                sampling_stride=stride("fast_token_temporal_sampling_stride"),
                temporal_stride=stride("fast_token_temporal_stride"),
                spatial_stride=stride("fast_token_spatial_stride"),
                min_frames=fields.min_fast_frames or 1,
            ),
            video_pooling_stride=fields.needed("mm_video_pooling_stride"),
            decode_mode=DecodeMode(mode),
        )


def _hybrid_layers(fields: ConfigFields) -> tuple[int, ...]:
    """Return range(min depth, max depth, every n); the presence of cross_attn_every_n_layers turns the branch on."""
    if fields.cross_attn_every_n_layers is None:
        return ()
    layers, stop = fields.needed("num_hidden_layers"), fields.cross_attn_max_layer_depth
    stop = layers if stop is None else min(stop, layers)
    return tuple(range(fields.cross_attn_min_layer_depth or 0, stop, fields.cross_attn_every_n_layers))


def _attends(implementation: str) -> Attending:
    if implementation.startswith("vanilla"):
        return Attending.ALL
    if implementation.startswith("text-only-vanilla"):
        return Attending.TEXT_AFTER_VIDEO if "masksystem" in implementation else Attending.TEXT
    raise CheckpointError(
        f"config.json: unknown cross_attn_implementation {shown(implementation)}.",
        "It must begin with 'text-only-vanilla' or 'vanilla' (with '-masksystem' or '-flashattn' as options).",
    )


@dataclass(frozen=True)
class ProjectorConfig:
    """Linear, identity, or an MLP of `depth` linear layers (tensor names mm_projector.0, .2, .4, ...).

    Attributes:
        activation: 'gelu' or 'srelu', between the linear layers; an SReLU has tensors (mm_projector.1, .3, ...).
    """

    kind: str
    depth: int
    in_size: int
    activation: str = "gelu"

    @classmethod
    def from_fields(cls, fields: ConfigFields) -> ProjectorConfig:
        name = "linear" if fields.mm_projector_type is None else fields.mm_projector_type
        size = fields.needed("mm_hidden_size")
        if name in ("linear", "identity"):
            return cls(name, int(name == "linear"), size)
        match = re.fullmatch(r"mlp([1-9]\d{0,2})x_(gelu|srelu)", name)  # up to 999 layers
        if not match:
            raise CheckpointError(
                f"config.json: unknown mm_projector_type {shown(name)}.",
                "Known: linear, identity, mlp<N>x_gelu, mlp<N>x_srelu.",
            )
        return cls("mlp", int(match.group(1)), size, match.group(2))

    def linear_names(self) -> list[str]:
        """List the names of the linear layers, without '.weight'."""
        if self.kind == "linear":
            return ["model.mm_projector"]
        return [f"model.mm_projector.{2 * i}" for i in range(self.depth)]

    def srelu_names(self) -> list[str]:
        """List the names of the SReLUs, without '.t_right'; the one at i follows the linear layer at i."""
        return [f"model.mm_projector.{2 * i + 1}" for i in range(self.depth - 1) if self.activation == "srelu"]

    def srelu_tensors(self) -> list[str]:
        """List the names of the SReLUs' tensors, each of shape [hidden_size]."""
        return [f"{name}.{parameter}" for name in self.srelu_names() for parameter in SRELU_PARAMETERS]


@dataclass(frozen=True)
class ModelConfig:
    """Everything but the vision tower, whose size is read from the tensors (see sfexport.checkpoint.vision_tower)."""

    text: TextConfig
    slow_fast: SlowFastConfig
    projector: ProjectorConfig

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read config.json's content. Raises CheckpointError for a field that is missing or has no meaning here."""
        if raw.get("model_type") != MODEL_TYPE:
            raise CheckpointError(
                f"config.json: model_type is {shown(raw.get('model_type'))}, not {MODEL_TYPE!r}.",
                "sfexport takes Slow-Fast Video MLLM checkpoints only.",
            )
        fields = ConfigFields.read(raw)
        return cls(
            TextConfig.from_fields(fields), SlowFastConfig.from_fields(fields), ProjectorConfig.from_fields(fields)
        )

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """List the tensors outside the vision tower: name -> shape."""
        text, gate = self.text, self.slow_fast.gate
        out: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (text.vocab_size, text.hidden_size),
            "model.norm.weight": (text.hidden_size,),
        }
        if not text.tie_word_embeddings:
            out["lm_head.weight"] = (text.vocab_size, text.hidden_size)
        for i in range(text.num_layers):
            out |= _layer_tensors(text, f"model.layers.{i}.")
            if i in self.slow_fast.hybrid_layers and gate is not None:
                out |= _cross_attention_tensors(text, gate, f"model.layers.{i}.self_attn.")
        return out | self._projector_tensors()

    def _projector_tensors(self) -> dict[str, tuple[int, ...]]:
        out: dict[str, tuple[int, ...]] = {}
        width = self.projector.in_size
        for name in self.projector.linear_names() if self.projector.kind != "identity" else []:
            out[f"{name}.weight"] = (self.text.hidden_size, width)
            out[f"{name}.bias"] = (self.text.hidden_size,)
            width = self.text.hidden_size
        return out | dict.fromkeys(self.projector.srelu_tensors(), (self.text.hidden_size,))


def _layer_tensors(text: TextConfig, p: str) -> dict[str, tuple[int, ...]]:
    hidden, inter = text.hidden_size, text.intermediate_size
    q_size, kv_size = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    return {
        f"{p}self_attn.q_proj.weight": (q_size, hidden),
        f"{p}self_attn.q_proj.bias": (q_size,),
        f"{p}self_attn.k_proj.weight": (kv_size, hidden),
        f"{p}self_attn.k_proj.bias": (kv_size,),
        f"{p}self_attn.v_proj.weight": (kv_size, hidden),
        f"{p}self_attn.v_proj.bias": (kv_size,),
        f"{p}self_attn.o_proj.weight": (hidden, q_size),
        f"{p}mlp.gate_proj.weight": (inter, hidden),
        f"{p}mlp.up_proj.weight": (inter, hidden),
        f"{p}mlp.down_proj.weight": (hidden, inter),
        f"{p}input_layernorm.weight": (hidden,),
        f"{p}post_attention_layernorm.weight": (hidden,),
    }


def _cross_attention_tensors(text: TextConfig, gate: GateConfig, p: str) -> dict[str, tuple[int, ...]]:
    rows = 2 * text.num_kv_heads * text.head_dim
    q_size = text.num_heads * text.head_dim
    out = {
        f"{p}cross_attn_kv_proj.weight": (rows, text.hidden_size),
        f"{p}cross_attn_kv_proj.bias": (rows,),
        f"{p}cross_attn_gate_proj.0.weight": (1, q_size),
        f"{p}cross_attn_gate_proj.0.bias": (1,),
    }
    if gate.warm_up:
        out[f"{p}cross_attn_warm_up_gate"] = (1,)
    return out
