"""Read from preprocessor_config.json how a frame becomes pixels for the vision tower.

Pure Python, as config.py is; the pixels themselves are made in sfexport/video/preprocessing.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import msgspec

from sfexport.checkpoint.tower_names import named_size
from sfexport.checkpoint.vision_tower import Tower, VitTower
from sfexport.errors import CheckpointError
from sfexport.fields import Fields, read_fields, shown, unknown_fields

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
FILE = "preprocessor_config.json"
HINT = "Take the file from the model's own download."
MAX_SIDE = 4096  # pixels
BICUBIC = 3
_SHADE = 1 / 255
# transformers' processors whose steps are the same, -Fast and Pil variants included.
_PROCESSORS = {
    **dict.fromkeys(("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"), "clip"),
    **dict.fromkeys(("CLIPFeatureExtractor", "BitImageProcessor", "BitImageProcessorFast"), "clip"),
    **dict.fromkeys(("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil"), "siglip"),
}
_Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]


class ProcessorFields(Fields, frozen=True, kw_only=True):
    """The fields of preprocessor_config.json; None: absent or null, and then as the tower has it."""

    # Frames are RGB already, and one at a time.
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(
        {"processor_class", "do_convert_rgb", "input_data_format", "device", "return_tensors", "disable_grouping"}
        | {"image_seq_length", "auto_map", "_valid_processor_keys", "_processor_class", "use_fast", "backend"}
    )

    image_processor_type: str | None = None
    feature_extractor_type: str | None = None
    do_resize: bool = True
    size: _Side | dict[str, Any] | None = None
    default_to_square: bool = False
    use_square_size: bool = False
    resample: int = BICUBIC
    do_center_crop: bool | None = None
    crop_size: _Side | dict[str, Any] | None = None
    do_rescale: bool = True
    rescale_factor: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = _SHADE
    do_normalize: bool = True
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    do_pad: bool = False
    data_format: str = "channels_first"


@dataclass(frozen=True)
class ImageProcessorConfig:
    """How a frame becomes pixels for the tower (fields of a transformers image processor).

    Attributes:
        size: 'shortest edge' resizing target in pixels, followed by a centre crop to `crop`; with
            `keep_aspect` False (SigLIP) the frame is resized to crop x crop at once.
        mean: per RGB channel, on values scaled to 0..1.
        std: likewise.
    """

    size: int
    crop: int
    keep_aspect: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], tower: Tower, processor: Mapping[str, Any] | None
    ) -> ImageProcessorConfig:
        """Read the settings from `processor`, preprocessor_config.json's content, where the checkpoint has one.

        Without it: CLIP's mean and deviation at 576 pixels for ConvNeXt (the reference hard-codes both), the
        tower's own size otherwise.

        Raises:
            CheckpointError: a field of preprocessor_config.json asks for pixels that sfexport does not make.
        """
        fields = read_fields(ProcessorFields, processor or {}, FILE, hint=HINT)
        kind = _kind(fields, tower)
        keep_aspect, size, crop = _sides(fields, kind, _own_size(raw, tower))
        mean, std = _levels(fields, kind)
        return cls(size, crop, keep_aspect, mean, std)


def image_notes(raw: Mapping[str, Any], tower: Tower, processor: Mapping[str, Any] | None) -> list[str]:
    """List the fields of preprocessor_config.json that are not used, or that the reference does not read there."""
    if processor is None:
        return []
    unknown = unknown_fields(ProcessorFields, processor)
    notes = [f"{FILE}: not known and not used: {', '.join(map(shown, unknown[:6]))}"] if unknown else []
    found = ImageProcessorConfig.from_dict(raw, tower, processor)
    own = ImageProcessorConfig.from_dict(raw, tower, None)
    if not isinstance(tower, VitTower) and found != own:
        notes.append(
            f"frames become {found.crop} x {found.crop} pixels as {FILE} says; the reference reads no such file for "
            f"ConvNeXt and takes {own.crop} x {own.crop} with CLIP's mean and deviation"
        )
    return notes


def _kind(fields: ProcessorFields, tower: Tower) -> str:
    """Return 'clip' or 'siglip': whose defaults hold."""
    name = fields.image_processor_type
    name = fields.feature_extractor_type if name is None else name
    if name is None:
        return "siglip" if tower.kind == "siglip" else "clip"
    if name not in _PROCESSORS:
        known = "CLIPImageProcessor and SiglipImageProcessor"
        raise CheckpointError(f"{FILE}: image_processor_type is {shown(name)}; sfexport knows {known}.", HINT)
    return _PROCESSORS[name]


def _own_size(raw: Mapping[str, Any], tower: Tower) -> int:
    size = tower.image_size if isinstance(tower, VitTower) else named_size(raw) or 576
    if size > MAX_SIDE:
        raise CheckpointError(f"config.json: the vision tower's frames of {size} pixels are too large.")
    return size


def _sides(fields: ProcessorFields, kind: str, own: int) -> tuple[bool, int, int]:
    """Return whether the aspect is kept, the size a frame is resized to, and the side of the square that is kept."""
    for name, wanted in (("do_resize", True), ("use_square_size", False), ("do_pad", False)):
        _demand(name, getattr(fields, name), wanted)
    _demand("resample", fields.resample, BICUBIC)
    _demand("data_format", fields.data_format, "channels_first")
    crops = kind == "clip" if fields.do_center_crop is None else fields.do_center_crop
    if fields.size is None:
        keep_aspect, size = crops, own
    elif isinstance(fields.size, int):
        keep_aspect, size = crops and not fields.default_to_square, fields.size
    elif "shortest_edge" in _keys(fields.size):
        keep_aspect, size = True, _side("size", fields.size, {"shortest_edge"})
    else:
        keep_aspect, size = False, _side("size", fields.size, {"height", "width"})
    crop = size
    if crops and isinstance(fields.crop_size, int):
        crop = fields.crop_size
    elif crops and isinstance(fields.crop_size, dict):
        crop = _side("crop_size", fields.crop_size, {"height", "width"})
    if keep_aspect and not crops:
        raise _unusable("do_center_crop", False, "true where size has a shortest_edge: the tower takes squares")
    if not keep_aspect and crop != size:
        raise _unusable("crop_size", fields.crop_size, f"{size} x {size}, the size that frames are squeezed to")
    return keep_aspect, size, crop


def _keys(size: Mapping[str, Any]) -> set[str]:
    return {name for name, value in size.items() if value is not None}


def _side(name: str, size: Mapping[str, Any], names: set[str]) -> int:
    """Return the side of a square given by one or two equal numbers."""
    if _keys(size) != names or len({size[n] for n in names if type(size[n]) is int}) != 1:
        raise _unusable(name, dict(size), "a positive whole number of pixels, or a square's height and width")
    value: int = size[next(iter(names))]
    if not all(type(size[n]) is int for n in names) or not 1 <= value <= MAX_SIDE:
        raise _unusable(name, dict(size), f"between 1 and {MAX_SIDE} pixels")
    return value


def _levels(fields: ProcessorFields, kind: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and deviation on values scaled to 0..1, whatever the file scales them to.

    (v f - m) / s = (v / 255 - m / k) / (s / k) with k = 255 f.
    """
    mean = _triple("image_mean", fields.image_mean, HALF if kind == "siglip" else CLIP_MEAN)
    std = _triple("image_std", fields.image_std, HALF if kind == "siglip" else CLIP_STD)
    if not all(1e-6 < value < 1e6 for value in std):
        raise _unusable("image_std", list(std), "of positive numbers, which pixels can be divided by")
    if not all(abs(value) < 1e6 for value in mean):
        raise _unusable("image_mean", list(mean), "of small numbers")
    if not fields.do_normalize:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = fields.rescale_factor if fields.do_rescale else 1.0
    if math.isclose(factor, _SHADE, rel_tol=1e-6):
        return mean, std
    scale = 255 * factor
    red, green, blue = mean
    dev_red, dev_green, dev_blue = std
    return (red / scale, green / scale, blue / scale), (dev_red / scale, dev_green / scale, dev_blue / scale)


def _triple(name: str, value: list[float] | None, default: tuple[float, ...]) -> tuple[float, float, float]:
    values = default if value is None else tuple(value)
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise _unusable(name, value, "three numbers, one per channel")
    first, second, third = values
    return first, second, third


def _demand(name: str, value: Any, wanted: Any) -> None:
    if value != wanted:
        raise _unusable(name, value, shown(wanted))


def _unusable(name: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(f"{FILE}: '{name}' is {shown(value)}; it must be {wanted}.", HINT)
