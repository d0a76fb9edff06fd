"""Vision towers in PyTorch: ConvNeXt in timm's names, CLIP and SigLIP from transformers.

Source: REFERENCE section 3 (ConvNeXt-XXL without final norm or head; every LayerNorm eps 1e-5).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from sfexport.towers import ConvNextTower, Tower, VitTower


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ConvNextBlock(nn.Module):
    """x + weight * mlp(norm(depthwise(x))); `weight` is the layer scale (timm: gamma)."""

    def __init__(self, width: int, kernel: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1e-6))
        self.conv_dw = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = ConvNextMlp(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_dw(x).permute(0, 2, 3, 1)
        y = self.weight * self.mlp(self.norm(y))
        return x + y.permute(0, 3, 1, 2)


class ConvNextStage(nn.Module):
    def __init__(self, in_width: int | None, width: int, depth: int, tower: ConvNextTower) -> None:
        super().__init__()
        eps = tower.layer_norm_eps
        self.downsample = nn.Identity()
        if in_width is not None:
            self.downsample = nn.Sequential(LayerNorm2d(in_width, eps=eps), nn.Conv2d(in_width, width, 2, 2))
        self.blocks = nn.Sequential(*(ConvNextBlock(width, tower.kernel, eps) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class ConvNext(nn.Module):
    """Pixels [N, 3, S, S] -> features [N, n, C], row-major over the grid."""

    def __init__(self, tower: ConvNextTower) -> None:
        super().__init__()
        patch, widths = tower.stem_patch, tower.widths
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], patch, patch), LayerNorm2d(widths[0], eps=tower.layer_norm_eps)
        )
        self.stages = nn.Sequential(
            *(
                ConvNextStage(widths[s - 1] if s else None, width, depth, tower)
                for s, (width, depth) in enumerate(zip(widths, tower.depths, strict=True))
            )
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.stages(self.stem(pixel_values)).flatten(2).transpose(1, 2)


class Vit(nn.Module):
    """CLIP's or SigLIP's transformer, cut at the selected layer: pixels [N, 3, S, S] -> features [N, n, C]."""

    def __init__(self, tower: VitTower) -> None:
        super().__init__()
        self.drop_class_token = tower.kind == "clip"
        self.vision_model = _clip(tower) if tower.kind == "clip" else _siglip(tower)
        # hidden_states[select_layer] needs no later layer and no final norm: the rest is not built.
        self.vision_model.post_layernorm = nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.vision_model(pixel_values).last_hidden_state
        return features[:, 1:] if self.drop_class_token else features


def _vit_sizes(tower: VitTower) -> dict:
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.num_layers_used,
        "num_attention_heads": tower.num_heads,
        "intermediate_size": tower.intermediate_size,
        "patch_size": tower.patch,
        "image_size": tower.image_size,
        "layer_norm_eps": tower.layer_norm_eps,
    }


def _clip(tower: VitTower) -> nn.Module:
    return CLIPVisionModel(CLIPVisionConfig(hidden_act="quick_gelu", **_vit_sizes(tower)))


def _siglip(tower: VitTower) -> nn.Module:
    config = SiglipVisionConfig(hidden_act="gelu_pytorch_tanh", vision_use_head=False, **_vit_sizes(tower))
    return SiglipVisionModel(config)


class VisionTower(nn.Module):
    """Holds the tower under the name the checkpoints use: `vision_tower.vision_tower`."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.vision_tower = ConvNext(tower) if isinstance(tower, ConvNextTower) else Vit(tower)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vision_tower(pixel_values)
