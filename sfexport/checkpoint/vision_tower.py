"""Vision towers: which kind a checkpoint has, its sizes read from the tensors, and the tensors it must have.

Pure Python, as config.py is. Released checkpoints do not store the tower's sizes in config.json, so
they are inferred from tensor shapes; what shapes cannot tell (a ViT's head count) comes from the published
models of that width or from `mm_vision_num_attention_heads`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from sfexport.checkpoint.config import TOWER_PREFIX, Shapes
from sfexport.checkpoint.config_fields import MAX_LAYERS
from sfexport.checkpoint.tower_names import VIT_PREFIX, tower_kind
from sfexport.errors import CheckpointError
from sfexport.fields import LARGEST, shown

_ACTIVATIONS = {"clip": "quick_gelu", "siglip": "gelu_tanh"}
# Widths of the published CLIP and SigLIP towers -> attention heads.
VIT_HEADS = {768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 16, 1664: 16}


@dataclass(frozen=True)
class ConvNextTower:
    """ConvNeXt as in timm: stem k x k / k, stages of depthwise blocks, no final norm, no head.

    `layer_norm_eps` is 1e-5 for every LayerNorm (the reference's ConvNeXt-XXL; timm's default is 1e-6).
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    stem_patch: int
    kernel: int
    layer_norm_eps: float = 1e-5
    kind: str = "convnext"

    @property
    def out_size(self) -> int:
        return self.widths[-1]

    def grid(self, image_size: int) -> int:
        """Compute the tokens per side of a square image of `image_size` pixels."""
        side = image_size // self.stem_patch
        for _ in self.depths[1:]:
            side //= 2
        return side

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        p, widths = TOWER_PREFIX, self.widths
        out = {f"{p}stem.0.weight": (widths[0], 3, self.stem_patch, self.stem_patch), f"{p}stem.0.bias": (widths[0],)}
        out |= _norm(f"{p}stem.1", widths[0])
        for s, (depth, width) in enumerate(zip(self.depths, widths, strict=True)):
            if s:
                out |= _norm(f"{p}stages.{s}.downsample.0", widths[s - 1])
                out[f"{p}stages.{s}.downsample.1.weight"] = (width, widths[s - 1], 2, 2)
                out[f"{p}stages.{s}.downsample.1.bias"] = (width,)
            for j in range(depth):
                out |= _convnext_block(f"{p}stages.{s}.blocks.{j}.", width, self.kernel)
        return out


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, out_size: int, in_size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out_size, in_size), f"{name}.bias": (out_size,)}


def _convnext_block(p: str, width: int, kernel: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{p}weight": (width,),
        f"{p}conv_dw.weight": (width, 1, kernel, kernel),
        f"{p}conv_dw.bias": (width,),
        **_norm(f"{p}norm", width),
        **_linear(f"{p}mlp.fc1", 4 * width, width),
        **_linear(f"{p}mlp.fc2", width, 4 * width),
    }


@dataclass(frozen=True)
class VitTower:
    """CLIP or SigLIP vision transformer in transformers' names, cut after `num_layers_used` layers.

    The reference takes hidden_states[mm_vision_select_layer] (default -2: without the last layer) and drops
    CLIP's class token.
    """

    kind: str
    width: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch: int
    image_size: int
    select_layer: int
    layer_norm_eps: float
    activation: str

    @property
    def out_size(self) -> int:
        return self.width

    @property
    def num_layers_used(self) -> int:
        """Encoder layers that run: hidden_states[k] is the output of k layers ([0] is the embedding)."""
        k = self.select_layer
        return k if k >= 0 else self.num_layers + 1 + k

    def grid(self, image_size: int) -> int:
        return image_size // self.patch

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        p, width = VIT_PREFIX, self.width
        cells = self.grid(self.image_size) ** 2
        out: dict[str, tuple[int, ...]] = {f"{p}embeddings.patch_embedding.weight": (width, 3, self.patch, self.patch)}
        if self.kind == "clip":
            out[f"{p}embeddings.class_embedding"] = (width,)
            out |= _norm(f"{p}pre_layrnorm", width)
            cells += 1
        else:
            out[f"{p}embeddings.patch_embedding.bias"] = (width,)
        out[f"{p}embeddings.position_embedding.weight"] = (cells, width)
        for i in range(self.num_layers_used):
            q = f"{p}encoder.layers.{i}."
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                out |= _linear(f"{q}self_attn.{name}", width, width)
            out |= _linear(f"{q}mlp.fc1", self.intermediate_size, width)
            out |= _linear(f"{q}mlp.fc2", width, self.intermediate_size)
            out |= _norm(f"{q}layer_norm1", width) | _norm(f"{q}layer_norm2", width)
        return out


Tower = ConvNextTower | VitTower

# ConvNeXt-XXL (convnext_xxlarge.clip_laion2b_soup), the tower of the released checkpoints.
CONVNEXT_XXL = ConvNextTower(depths=(3, 4, 30, 3), widths=(384, 768, 1536, 3072), stem_patch=4, kernel=7)


def read_tower(raw: Mapping[str, Any], shapes: Shapes) -> Tower:
    """Read the tower's sizes from tensor shapes (or from `vision_tower_sizes`, which files saved by sfexport have).

    Raises:
        CheckpointError: naming the tensor that is missing or cannot be understood.
    """
    kind = tower_kind(raw, shapes)
    if raw.get("vision_tower_sizes") is not None:
        tower = tower_from_sizes(raw["vision_tower_sizes"])
        if tower.kind != kind:
            raise CheckpointError(
                f"config.json: vision_tower_sizes are of a {tower.kind} tower, mm_vision_tower names a {kind}.",
                "Remove vision_tower_sizes from config.json.",
            )
        return tower
    return _read_convnext(shapes) if kind == "convnext" else _read_vit(kind, raw, shapes)


def tower_from_sizes(sizes: Any) -> Tower:
    """Make a tower from what dataclasses.asdict made of one, also after a way through JSON.

    Raises:
        CheckpointError: these are not a tower's sizes.
    """
    try:
        sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()}
        tower = (ConvNextTower if sizes.get("kind") == "convnext" else VitTower)(**sizes)
        _check_sizes(tower, sizes)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"config.json: vision_tower_sizes has no meaning here ({error}).", "Remove it from config.json."
        ) from None
    return tower


def _check_sizes(tower: Tower, sizes: Mapping[str, Any]) -> None:
    """Check a tower's fields. Raises ValueError or TypeError for a field that no tower has."""
    # Every field but these is a size, or one size per stage.
    names = sizes.keys() - {"kind", "layer_norm_eps", "select_layer", "activation"}
    for size in chain.from_iterable(v if isinstance(v, tuple) else (v,) for v in (sizes[n] for n in names)):
        if type(size) is not int or not 1 <= size <= LARGEST:
            raise ValueError(f"a size of {shown(size)}")
    if not isinstance(tower.layer_norm_eps, float) or not 0 < tower.layer_norm_eps < 1:
        raise ValueError(f"layer_norm_eps {shown(tower.layer_norm_eps)}")
    if isinstance(tower, ConvNextTower):
        if not isinstance(tower.depths, tuple) or not isinstance(tower.widths, tuple):
            raise ValueError("depths and widths must be lists")
        if not 0 < len(tower.depths) == len(tower.widths):
            raise ValueError("depths and widths differ in number")
        if sum(tower.depths) > MAX_LAYERS:
            raise ValueError(f"{sum(tower.depths)} blocks")
        return
    if _ACTIVATIONS.get(tower.kind) != tower.activation:
        raise ValueError(f"kind {shown(tower.kind)} with activation {shown(tower.activation)}")
    if tower.num_layers > MAX_LAYERS or tower.width % tower.num_heads or tower.image_size < tower.patch:
        raise ValueError(f"{tower.num_layers} layers, {tower.num_heads} heads, {tower.image_size} pixels")
    _check_select(tower.select_layer, tower.num_layers, tower.kind)


def _check_select(select: Any, num_layers: int, kind: str) -> None:
    if type(select) is not int or not -num_layers - 1 <= select <= num_layers:
        raise CheckpointError(
            f"config.json: mm_vision_select_layer is {shown(select)}, and the {kind} tower has {num_layers} layers.",
            f"It must lie between {-num_layers - 1} and {num_layers}.",
        )


def _shape(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(
            f"The checkpoint has no tensor '{name}', which its vision tower needs.", "The download may be incomplete."
        )
    if len(shapes[name]) != rank or not all(shapes[name]):
        raise CheckpointError(
            f"Tensor '{name}' has shape {list(shapes[name])}; expected {rank} dimensions, none of them empty.",
            "The checkpoint may be damaged, or mm_vision_tower in config.json may name another tower.",
        )
    return shapes[name]


def _count(names: Iterable[str], pattern: str) -> int:
    """Count the indices that `pattern` (one group) finds.

    Raises:
        CheckpointError: they are not 0, 1, 2, ...: a number may be missing, or absurd.
    """
    found: dict[str, str] = {}
    for name in names:
        if match := re.match(pattern, name):
            found.setdefault(match.group(1), name)
    numbers = {str(i) for i in range(len(found))}
    if odd := sorted(found.keys() - numbers):
        missing = sorted(numbers - found.keys(), key=int)[0]
        name = shown(found[odd[0]])[1:-1]
        raise CheckpointError(
            f"The checkpoint has the tensor '{name}', but none of that kind with number {missing}.",
            "The download may be incomplete, or the tensor may belong to another model.",
        )
    return len(found)


def _read_convnext(shapes: Shapes) -> ConvNextTower:
    stem = _shape(shapes, TOWER_PREFIX + "stem.0.weight", 4)
    prefix = re.escape(TOWER_PREFIX)
    stages = _count(shapes, prefix + r"stages\.(\d+)\.")
    depths = [_count(shapes, prefix + rf"stages\.{s}\.blocks\.(\d+)\.") for s in range(stages)]
    if not stages or not all(depths):
        raise CheckpointError(
            f"The checkpoint's vision tower has blocks per stage {depths}: a stage has no '{TOWER_PREFIX}stages.*' "
            "tensors.",
            "The download may be incomplete, or mm_vision_tower in config.json may name another tower.",
        )
    block = TOWER_PREFIX + "stages.{}.blocks.0.conv_dw.weight"
    widths = [_shape(shapes, block.format(s), 4)[0] for s in range(stages)]
    kernel = _shape(shapes, block.format(0), 4)[-1]
    return ConvNextTower(tuple(depths), tuple(widths), stem[-1], kernel)


def _read_vit(kind: str, raw: Mapping[str, Any], shapes: Shapes) -> VitTower:
    embedding = _shape(shapes, VIT_PREFIX + "embeddings.patch_embedding.weight", 4)
    positions = _shape(shapes, VIT_PREFIX + "embeddings.position_embedding.weight", 2)[0]
    width, patch = embedding[0], embedding[-1]
    heads = raw.get("mm_vision_num_attention_heads")
    heads = VIT_HEADS.get(width) if heads is None else heads
    if heads is None:
        raise CheckpointError(
            f"The {kind} tower is {width} wide, which no published model is, so its head count is unknown.",
            "Add 'mm_vision_num_attention_heads' to config.json.",
        )
    if type(heads) is not int or heads < 1 or width % heads:
        raise CheckpointError(
            f"config.json: mm_vision_num_attention_heads is {shown(heads)}, which does not divide the {kind} tower's "
            f"width {width}.",
            "Take it from the tower's own config.json.",
        )
    feature = raw.get("mm_vision_select_feature")
    if feature not in (None, "patch"):
        raise CheckpointError(
            f"config.json: mm_vision_select_feature {shown(feature)} does not give a square grid to pool.",
            "Only 'patch' is supported.",
        )
    num_layers = _count(shapes, re.escape(VIT_PREFIX) + r"encoder\.layers\.(\d+)\.")
    select = raw.get("mm_vision_select_layer")
    select = -2 if select is None else select
    _check_select(select, num_layers, kind)
    merge = raw.get("mm_patch_merge_type")
    if merge not in (None, "flat"):
        raise CheckpointError(
            f"config.json: mm_patch_merge_type {shown(merge)} is not exported for a {kind} tower.",
            "Only 'flat' is supported.",
        )
    is_clip = kind == "clip"
    return VitTower(
        kind=kind,
        width=width,
        num_layers=num_layers,
        num_heads=heads,
        intermediate_size=_shape(shapes, VIT_PREFIX + "encoder.layers.0.mlp.fc1.weight", 2)[0],
        patch=patch,
        image_size=patch * math.isqrt(positions - int(is_clip)),
        select_layer=select,
        layer_norm_eps=1e-5 if is_clip else 1e-6,
        activation=_ACTIVATIONS[kind],
    )
