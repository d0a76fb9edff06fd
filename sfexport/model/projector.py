"""Build the multimodal projector: tower features [..., C] -> decoder width [..., H], before any pooling."""

from __future__ import annotations

from torch import nn

from sfexport.checkpoint.config import ProjectorConfig
from sfexport.model.srelu import SReLU


def build_projector(config: ProjectorConfig, hidden_size: int) -> nn.Module:
    """Build an identity, a Linear, or an MLP with the reference's exact (erf) GELU or with SReLU per channel."""
    if config.kind == "identity":
        return nn.Identity()
    if config.kind == "linear":
        return nn.Linear(config.in_size, hidden_size)
    layers: list[nn.Module] = [nn.Linear(config.in_size, hidden_size)]
    for _ in range(1, config.depth):
        activation = SReLU(hidden_size) if config.activation == "srelu" else nn.GELU()
        layers += [activation, nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)
