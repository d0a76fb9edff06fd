"""Every kind of checkpoint, exported and run in ONNX Runtime, against the PyTorch model: graphs and answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.config import GATING_TYPES
from sfexport.checkpoint.vision_tower import ConvNextTower, Tower, VitTower
from sfexport.comparing.compare import Tolerance
from sfexport.comparing.parity_report import ParityReport
from sfexport.comparing.run import run_parity
from sfexport.engines.build import build
from sfexport.exporting.export import ExportOptions, export
from sfexport.qa.pipeline import Pipeline
from sfexport.testing.random_checkpoint import TOWER, write_random_checkpoint

pytest.importorskip("torch")

ATTENTION = ("text-only-vanilla-flashattn", "text-only-vanilla-masksystem-flashattn", "vanilla-flashattn")
CLIP = VitTower("clip", 64, 3, 2, 96, 14, 56, -2, 1e-5, "quick_gelu")
SIGLIP = VitTower("siglip", 48, 3, 3, 64, 14, 70, -2, 1e-6, "gelu_tanh")
TWO_STAGES = ConvNextTower(depths=(1, 2), widths=(16, 32), stem_patch=8, kernel=5)


def check(folder: Path, tower: Tower = TOWER, frames: int = 8, **changes: object) -> ParityReport:
    write_random_checkpoint(folder / "checkpoint", tower=tower, changes=changes)
    bundle = export(Checkpoint.open(folder / "checkpoint"), folder / "bundle", ExportOptions())
    build(bundle, folder / "engines")
    pipeline = Pipeline.load(folder / "engines")
    return run_parity(pipeline, None, frames=frames, max_new_tokens=6, tolerance=Tolerance(1e-4, 0))


def assert_passed(report: ParityReport) -> None:
    assert report.passed, [c for c in report.comparisons if not c.passed] + report.answers


@pytest.mark.parametrize("gating", GATING_TYPES)
@pytest.mark.parametrize("attention", ATTENTION)
def test_gating_and_attention_types(gating: str, attention: str, tmp_path: Path) -> None:
    assert_passed(check(tmp_path, cross_attn_gating_type=gating, cross_attn_implementation=attention))


FAST_PATHS = {
    "sampled": {"fast_token_temporal_sampling_stride": 2, "min_fast_frames": 2},
    "pooled in space": {"fast_token_spatial_stride": 2, "mm_video_pooling_stride": 1},
    "overlapping windows": {"fast_token_temporal_stride": 3, "min_fast_frames": 3},
    "no pooling": {"fast_token_temporal_stride": 1, "mm_video_pooling_stride": 1},
    "all at once": {
        "fast_token_temporal_sampling_stride": 2,
        "fast_token_spatial_stride": 2,
        "min_fast_frames": 1,
        "fast_token_temporal_stride": 2,
    },
}


@pytest.mark.parametrize("frames", [1, 2, 7, 12])
@pytest.mark.parametrize("case", FAST_PATHS)
def test_fast_paths_of_images_and_clips(case: str, frames: int, tmp_path: Path) -> None:
    assert_passed(check(tmp_path, frames=frames, **FAST_PATHS[case]))


OTHERS = {
    "every layer is hybrid": {"cross_attn_every_n_layers": 1},
    "hybrid from the second layer on": {"cross_attn_min_layer_depth": 1, "cross_attn_every_n_layers": 2},
    "no slow branch": {"cross_attn_every_n_layers": None},
    "tied embeddings": {"tie_word_embeddings": True},
    "as many kv heads as heads": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "linear projector": {"mm_projector_type": "linear"},
    "three linear layers": {"mm_projector_type": "mlp3x_gelu"},
    "srelu projector": {"mm_projector_type": "mlp2x_srelu"},
    "three linear layers with srelu": {"mm_projector_type": "mlp3x_srelu"},
    "identity projector": {"mm_projector_type": "identity", "hidden_size": 48},
    "trained mode by configuration": {"decode_mode": "trained"},
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_configurations(case: str, tmp_path: Path) -> None:
    assert_passed(check(tmp_path, **OTHERS[case]))


TOWERS = {
    "clip": (CLIP, {"mm_vision_tower": "openai/clip-vit-x"}),
    "siglip": (SIGLIP, {"mm_vision_tower": "google/siglip-x"}),
    "siglip, layer counted from the front": (SIGLIP, {"mm_vision_tower": "siglip-x", "mm_vision_select_layer": 1}),
    "convnext of two stages": (TWO_STAGES, {}),
}


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("case", TOWERS)
def test_vision_towers(case: str, frames: int, tmp_path: Path) -> None:
    tower, changes = TOWERS[case]
    heads = {"mm_vision_num_attention_heads": tower.num_heads} if isinstance(tower, VitTower) else {}
    assert_passed(check(tmp_path, tower=tower, frames=frames, **changes, **heads))
