"""Tell which vision tower `mm_vision_tower` names: by a tower's own name, a hub name or a path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sfexport.checkpoint.config import TOWER_PREFIX, Shapes
from sfexport.errors import CheckpointError
from sfexport.fields import shown

VIT_PREFIX = TOWER_PREFIX + "vision_model."
_KNOWN = "Known: convnext-576, openai/clip-*, google/siglip-*."


def tower_kind(raw: Mapping[str, Any], shapes: Shapes | None = None) -> str:
    """Return 'convnext', 'clip' or 'siglip', by the reference's rules for `mm_vision_tower`.

    The last component of a path or hub name decides; one that says nothing (a revision, 'vision') leaves it to the
    tensors, and without them to the components before it.
    """
    name = raw.get("mm_vision_tower")
    if not isinstance(name, str):
        raise CheckpointError(
            f"config.json: 'mm_vision_tower' must be a tower's name, not {shown(name)}.",
            _KNOWN,
        )
    parts = _components(name)
    found = [kind for kind in map(_kind_in, reversed(parts)) if kind]
    if parts and _kind_in(parts[-1]):
        return found[0]
    stored = _stored_kind(shapes or {})
    if found and stored in (None, *found):
        return stored or found[0]
    raise CheckpointError(
        f"config.json: unknown mm_vision_tower {shown(name)}.",
        _KNOWN + (f" The tensors are those of a {stored} tower." if stored else ""),
    )


def named_size(raw: Mapping[str, Any]) -> int | None:
    """Read the pixels at the end of a tower's name: 576 of 'convnext-576'."""
    parts = _components(str(raw.get("mm_vision_tower")))
    match = re.search(r"-(\d+)$", parts[-1]) if parts else None
    return int(match.group(1)[:12]) or None if match else None


def _components(name: str) -> list[str]:
    return [part for part in re.split(r"[/\\]+", name) if part]


def _kind_in(component: str) -> str | None:
    return next((kind for kind in ("convnext", "siglip", "clip") if kind in component.lower()), None)


def _stored_kind(shapes: Shapes) -> str | None:
    if TOWER_PREFIX + "stem.0.weight" in shapes:
        return "convnext"
    if VIT_PREFIX + "embeddings.class_embedding" in shapes:
        return "clip"
    return "siglip" if VIT_PREFIX + "embeddings.patch_embedding.bias" in shapes else None
