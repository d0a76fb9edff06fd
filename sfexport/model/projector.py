"""The multimodal projector: tower features [..., C] -> decoder width [..., H], before any pooling."""

from __future__ import annotations

from torch import nn

from sfexport.facts import ProjectorFacts


def build_projector(facts: ProjectorFacts, hidden_size: int) -> nn.Module:
    """Linear, identity, or Linear (GELU Linear)* with the exact (erf) GELU of the reference."""
    if facts.kind == "identity":
        return nn.Identity()
    if facts.kind == "linear":
        return nn.Linear(facts.in_size, hidden_size)
    layers: list[nn.Module] = [nn.Linear(facts.in_size, hidden_size)]
    for _ in range(1, facts.depth):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)
