"""How a frame becomes pixels for the vision tower, as the checkpoint's preprocessor_config.json says.

Pure Python, same floor as facts.py; the pixels themselves are made in sfexport/video/preprocessing.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfexport.errors import CheckpointError
from sfexport.towers import Tower, VitTower

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageFacts:
    """How a frame becomes pixels for the tower (fields of a transformers image processor).

    Attributes:
        size: 'shortest edge' resizing target in pixels, followed by a centre crop to `crop`; with
            `keep_aspect` False (SigLIP) the frame is resized to crop x crop at once.
        mean, std: per RGB channel, on values scaled to 0..1.
    """

    size: int
    crop: int
    keep_aspect: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tower: Tower, processor: Mapping[str, Any] | None) -> ImageFacts:
        """`processor` is preprocessor_config.json's content, where the checkpoint has one.

        Without it: CLIP's mean and deviation at 576 pixels for ConvNeXt (the reference hard-codes both), the
        tower's own size otherwise.
        """
        processor = processor or {}
        is_siglip = tower.kind == "siglip"
        if isinstance(tower, VitTower):
            default = tower.image_size
        else:
            match = re.search(r"-(\d+)$", config["mm_vision_tower"])
            default = int(match.group(1)) if match else 576
        size = _edge(processor.get("size"), default)
        std = _triple(processor.get("image_std"), (0.5,) * 3 if is_siglip else CLIP_STD)
        if not all(std):
            raise CheckpointError(
                f"preprocessor_config.json: image_std is {list(std)}, and pixels cannot be divided by 0.",
                "Take the file from the model's own download.",
            )
        crop = size if is_siglip else _edge(processor.get("crop_size"), size)
        return cls(
            size=size,
            crop=crop,
            keep_aspect=not is_siglip,
            mean=_triple(processor.get("image_mean"), (0.5,) * 3 if is_siglip else CLIP_MEAN),
            std=std,
        )


def _edge(value: Any, default: int) -> int:
    if isinstance(value, Mapping):
        value = value.get("shortest_edge") or value.get("height")
    if value is None:
        return default
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"preprocessor_config.json: an image size of {value!r} has no meaning here.",
            "It must be a positive whole number of pixels.",
        )
    return value


def _triple(value: Any, default: tuple[float, ...]) -> tuple[float, float, float]:
    try:
        values = tuple(float(v) for v in (value or default))
    except (TypeError, ValueError):
        values = ()
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise CheckpointError(
            f"preprocessor_config.json: expected three numbers, one per channel, found {value!r}.",
            "Take the file from the model's own download.",
        )
    return values
