"""preprocessor_config.json: the pixels that transformers' processors make of it, or a refusal by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_says, document, refusal, set_fields, sfexport

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.image_processor import CLIP_MEAN, CLIP_STD, ImageProcessorConfig, ProcessorFields, image_notes
from sfexport.checkpoint.vision_tower import CONVNEXT_XXL, VitTower
from sfexport.demo.run import DemoPaths as Tree
from sfexport.errors import CheckpointError
from sfexport.testing.random_checkpoint import preprocessor_config
from sfexport.video.preprocessing import preprocess

CONFIG = {"mm_vision_tower": "convnext-576"}
SIGLIP = VitTower("siglip", 48, 3, 3, 64, 14, 56, -2, 1e-6, "gelu_tanh")
CLIP = preprocessor_config(48)
NO_CROP = {"do_center_crop": False, "size": {"height": 48, "width": 48}}
SIG = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}}

PROCESSORS: dict[str, dict[str, Any]] = {
    "clip": CLIP,
    "a smaller crop": CLIP | {"crop_size": {"height": 32, "width": 32}},
    "a larger crop": CLIP | {"crop_size": 56},
    "numbers as sizes": CLIP | {"size": 40, "crop_size": 40},
    "squeezed to a square": CLIP | {"size": {"height": 48, "width": 48}},
    "squeezed and not cropped": CLIP | NO_CROP,
    "not normalised": CLIP | {"do_normalize": False},
    "not rescaled": CLIP | {"do_rescale": False},
    "rescaled to -1 .. 1": CLIP | {"rescale_factor": 1 / 127.5},
    "neither": CLIP | {"do_rescale": False, "do_normalize": False},
    "other levels": CLIP | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
    "siglip": SIG,
    "siglip with CLIP's levels": SIG | {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)},
    "siglip, cropped": SIG | {"size": {"shortest_edge": 60}, "do_center_crop": True, "crop_size": 56},
    "nulls": CLIP | {"image_mean": None, "do_pad": None, "resample": None, "do_center_crop": None},
}


def reference(config: dict[str, Any], frame: np.ndarray) -> np.ndarray:
    """The pixels of transformers' processors that use Pillow."""
    transformers = pytest.importorskip("transformers")
    name = config["image_processor_type"]
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    if kind.__name__ == "SiglipImageProcessor" and "do_center_crop" in config:
        pytest.skip("SigLIP's processor crops since transformers has one for Pillow")
    present = {key: value for key, value in config.items() if value is not None and key != "image_processor_type"}
    return np.asarray(kind(**present)([frame], return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("size", [(30, 90), (97, 61), (48, 48)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_transformers(name: str, size: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    expected = reference(PROCESSORS[name], frame)
    found = preprocess([frame], ImageProcessorConfig.from_dict(CONFIG, CONVNEXT_XXL, PROCESSORS[name]))[0]
    np.testing.assert_allclose(found, expected, atol=1e-6 * max(1, np.abs(expected).max()))


def test_the_towers_own_levels_and_size_hold_where_the_file_says_nothing() -> None:
    clip = ImageProcessorConfig(576, 576, True, CLIP_MEAN, CLIP_STD)
    assert ImageProcessorConfig.from_dict(CONFIG, CONVNEXT_XXL, None) == clip
    assert ImageProcessorConfig.from_dict(CONFIG, CONVNEXT_XXL, {}) == clip
    assert ImageProcessorConfig.from_dict({"mm_vision_tower": "/a/convnext-64"}, CONVNEXT_XXL, {}).size == 64
    half = (0.5, 0.5, 0.5)
    assert ImageProcessorConfig.from_dict({}, SIGLIP, {"do_convert_rgb": True}) == ImageProcessorConfig(
        56, 56, False, half, half
    )


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"do_resize": False}, "do_resize"),
    ({"do_resize": "false"}, "do_resize"),
    ({"do_normalize": "false"}, "do_normalize"),
    ({"do_normalize": 0}, "do_normalize"),
    ({"resample": 2}, "resample"),
    ({"resample": "bicubic"}, "resample"),
    ({"do_center_crop": False}, "do_center_crop"),
    ({"do_pad": True}, "do_pad"),
    ({"use_square_size": True}, "use_square_size"),
    ({"data_format": "channels_last"}, "data_format"),
    ({"image_processor_type": "Qwen2VLImageProcessor"}, "image_processor_type"),
    ({"image_processor_type": 3}, "image_processor_type"),
    ({"image_processor_type": ""}, "image_processor_type"),
    ({"crop_size": {"height": 48, "width": 40}}, "crop_size"),
    ({"crop_size": {"height": 48}}, "crop_size"),
    ({"crop_size": 0}, "crop_size"),
    ({"crop_size": True}, "crop_size"),
    ({"size": {"height": 40, "width": 48}}, "size"),
    ({"size": {"shortest_edge": 48, "longest_edge": 64}}, "size"),
    ({"size": {"longest_edge": 64}}, "size"),
    ({"size": {"max_height": 64, "max_width": 64}}, "size"),
    ({"size": {"shortest_edge": 48.0}}, "size"),
    ({"size": {"shortest_edge": True}}, "size"),
    ({"size": {"shortest_edge": 10**9}}, "size"),
    ({"size": {"height": [1], "width": [1]}}, "size"),
    ({"size": {}}, "size"),
    ({"size": [48, 48]}, "size"),
    ({"size": 10**9}, "size"),
    ({"size": {"height": 40, "width": 40}}, "crop_size"),
    ({"rescale_factor": 0}, "rescale_factor"),
    ({"rescale_factor": -1}, "rescale_factor"),
    ({"rescale_factor": float("nan")}, "rescale_factor"),
    ({"image_std": [-1, 1, 1]}, "image_std"),
    ({"image_std": [0, 1, 1]}, "image_std"),
    ({"image_std": [float("nan"), 1, 1]}, "image_std"),
    ({"image_std": [1e-40, 1, 1]}, "image_std"),
    ({"image_std": [1, 1]}, "image_std"),
    ({"image_mean": [float("inf"), 0, 0]}, "image_mean"),
    ({"image_mean": [10**400, 0, 0]}, "image_mean"),
    ({"image_mean": ["0", 0, 0]}, "image_mean"),
    ({"image_mean": 0.5}, "image_mean"),
]


@pytest.mark.parametrize(("changes", "name"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_value_is_refused_by_name(changes: dict, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^preprocessor_config\.json: .*{name}"):
        ImageProcessorConfig.from_dict(CONFIG, CONVNEXT_XXL, CLIP | changes)


def test_every_field_of_transformers_processors_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("CLIPImageProcessor", "SiglipImageProcessor"):
        kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
        fields = kind().to_dict()
        known = {*ProcessorFields.__struct_fields__, *ProcessorFields.IRRELEVANT}
        assert {key for key, value in fields.items() if value is not None} <= known


def test_a_size_that_the_reference_does_not_read_is_in_a_note(tree: Tree, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    set_fields(folder / "config.json", mm_vision_tower="convnext-576")
    notes = " ".join(document(sfexport("inspect", folder, "--json"))["notes"])
    assert_says(notes, "128 x 128", "preprocessor_config.json", "576 x 576")
    assert image_notes(CONFIG, CONVNEXT_XXL, None) == []
    assert image_notes(CONFIG, CONVNEXT_XXL, preprocessor_config(576)) == []
    assert_says(" ".join(image_notes(CONFIG, CONVNEXT_XXL, CLIP | {"sharpen": 2})), "'sharpen'")


def test_a_vit_of_another_size_is_refused(tree: Tree, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    set_fields(folder / "preprocessor_config.json", do_center_crop=False)
    assert_says(refusal(tmp_path, "export", folder, "-o", tmp_path / "bundle"), "do_center_crop", "False")


def test_a_nested_processor_comes_first_as_in_transformers(tree: Tree, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": preprocessor_config(64)}))
    assert Checkpoint.open(folder).image.crop == 64
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    assert Checkpoint.open(folder).image.crop == 128
