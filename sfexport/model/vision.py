"""Vision towers in PyTorch: ConvNeXt in timm's names, CLIP and SigLIP in transformers'.

ConvNeXt-XXL has no final norm and no head, and every LayerNorm an eps of 1e-5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfexport.checkpoint.vision_tower import ConvNextTower, Tower, VitTower


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextMlp(nn.Module):
    """fc2(gelu(fc1(x))), four times as wide in between."""

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
    """An optional 2 x 2 downsampling, then blocks of one width."""

    def __init__(self, in_width: int | None, width: int, depth: int, tower: ConvNextTower) -> None:
        super().__init__()
        eps = tower.layer_norm_eps
        self.downsample: nn.Module = nn.Identity()
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


class VitEmbeddings(nn.Module):
    """Patches in rows, CLIP's class token before them, learned positions: [N, 3, S, S] -> [N, tokens, C]."""

    def __init__(self, tower: VitTower) -> None:
        super().__init__()
        is_clip, cells = tower.kind == "clip", tower.grid(tower.image_size) ** 2
        if is_clip:
            self.class_embedding = nn.Parameter(torch.zeros(tower.width))
        self.patch_embedding = nn.Conv2d(3, tower.width, tower.patch, tower.patch, bias=not is_clip)
        self.position_embedding = nn.Embedding(cells + is_clip, tower.width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        if hasattr(self, "class_embedding"):
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        return x + self.position_embedding.weight


class VitAttention(nn.Module):
    """Self-attention without a mask."""

    def __init__(self, tower: VitTower) -> None:
        super().__init__()
        self.heads = tower.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(tower.width, tower.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class VitMlp(nn.Module):
    """fc2(activation(fc1(x))): quick GELU or GELU's tanh approximation."""

    def __init__(self, tower: VitTower) -> None:
        super().__init__()
        self.activation = tower.activation
        self.fc1 = nn.Linear(tower.width, tower.intermediate_size)
        self.fc2 = nn.Linear(tower.intermediate_size, tower.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = x * torch.sigmoid(1.702 * x) if self.activation == "quick_gelu" else F.gelu(x, approximate="tanh")
        return self.fc2(x)


class VitLayer(nn.Module):
    """Norm and attention, norm and MLP, each added to its input."""

    def __init__(self, tower: VitTower) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(tower.width, eps=tower.layer_norm_eps)
        self.self_attn = VitAttention(tower)
        self.layer_norm2 = nn.LayerNorm(tower.width, eps=tower.layer_norm_eps)
        self.mlp = VitMlp(tower)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VitEncoder(nn.Module):
    """The layers up to the selected one: hidden_states[select_layer] needs no later layer and no final norm."""

    def __init__(self, tower: VitTower) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(VitLayer(tower) for _ in range(tower.num_layers_used)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class VitModel(nn.Module):
    """Embeddings, CLIP's first norm, and the layers up to the selected one."""

    def __init__(self, tower: VitTower) -> None:
        super().__init__()
        self.embeddings = VitEmbeddings(tower)
        is_clip = tower.kind == "clip"
        self.pre_layrnorm = nn.LayerNorm(tower.width, eps=tower.layer_norm_eps) if is_clip else nn.Identity()
        self.encoder = VitEncoder(tower)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))


class Vit(nn.Module):
    """CLIP's or SigLIP's transformer, cut at the selected layer: pixels [N, 3, S, S] -> features [N, n, C]."""

    def __init__(self, tower: VitTower) -> None:
        super().__init__()
        self.drop_class_token = tower.kind == "clip"
        self.vision_model = VitModel(tower)

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.vision_model(pixel_values)
        return features[:, 1:] if self.drop_class_token else features


class VisionTower(nn.Module):
    """The tower under the name that checkpoints use: `vision_tower.vision_tower`."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.vision_tower = ConvNext(tower) if isinstance(tower, ConvNextTower) else Vit(tower)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vision_tower(pixel_values)
