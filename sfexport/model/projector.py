"""The multimodal projector: tower features [..., C] -> decoder width [..., H], before any pooling."""

from __future__ import annotations

from torch import nn

from sfexport.checkpoint.config import ProjectorFacts
from sfexport.model.srelu import SReLU


def build_projector(facts: ProjectorFacts, hidden_size: int) -> nn.Module:
    """Linear, identity, or Linear (activation Linear)*: the exact (erf) GELU of the reference, or SReLU per channel."""
    if facts.kind == "identity":
        return nn.Identity()
    if facts.kind == "linear":
        return nn.Linear(facts.in_size, hidden_size)
    layers: list[nn.Module] = [nn.Linear(facts.in_size, hidden_size)]
    for _ in range(1, facts.depth):
        activation = SReLU(hidden_size) if facts.activation == "srelu" else nn.GELU()
        layers += [activation, nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)
