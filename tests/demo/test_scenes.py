"""The demo's scenes: seeded, consistent, and the same after a way through a video file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfexport.checkpoint.config import FastPathConfig
from sfexport.checkpoint.fast_path import source_frames
from sfexport.checkpoint.image_processor import ImageProcessorConfig
from sfexport.demo.clip import write_frames
from sfexport.demo.scenes import (
    DETAIL,
    FPS,
    FRAMES,
    OVERVIEW,
    SIZE,
    UPSCALE,
    camera_matrix,
    is_sampled,
    make_scene,
    positions,
    render,
    video_frames,
)
from sfexport.video.decoding import Video
from sfexport.video.preprocessing import preprocess

seeds, indices = st.integers(0, 2**31), st.integers(0, 10_000)


@settings(max_examples=60, deadline=None)
@given(seeds, indices)
def test_a_scene_has_one_answer_to_every_question(seed: int, index: int) -> None:
    scene = make_scene(seed, index)
    assert scene == make_scene(seed, index)
    questions = scene.questions()
    answers = {q.text: q.answer for q in questions}
    assert len(answers) == len(questions), "no question is asked twice"
    assert {q.kind for q in questions} == {*OVERVIEW, *DETAIL}
    for q in questions:
        assert (q.kind in DETAIL) == (q.frame is not None)
        assert 1 <= len(q.answer.split()) <= 3
    assert len({f.frame for f in scene.flashes}) == len(scene.flashes)


@settings(max_examples=60, deadline=None)
@given(seeds, indices)
def test_shapes_move_as_the_answer_says_and_stay_inside(seed: int, index: int) -> None:
    for moving in make_scene(seed, index).shapes:
        centre = positions(moving)
        dx, dy = centre[-1] - centre[0]
        axis = {"left": -dx, "right": dx, "up": -dy, "down": dy}[moving.direction]
        assert axis >= 19
        assert min(abs(dx), abs(dy)) < 1e-3
        assert centre.min() >= 0
        assert centre.max() <= SIZE


def test_a_flash_lasts_exactly_one_frame() -> None:
    for index in range(20):
        scene = make_scene(3, index)
        frames = render(scene, 3, index).astype(int)
        flashing = {f.frame for f in scene.flashes}
        grey = [np.median(np.ptp(frame, axis=-1)) for frame in frames]
        assert {t for t, colourfulness in enumerate(grey) if colourfulness > 40} == flashing


def test_sampled_means_seen_by_the_fast_path() -> None:
    fast = FastPathConfig(sampling_stride=2, temporal_stride=4, spatial_stride=1, min_frames=2)
    seen = {frame for window in source_frames(FRAMES, fast) for frame in window}
    assert seen == {t for t in range(FRAMES) if is_sampled(t)}


def test_clips_survive_a_video_file(tmp_path: Path) -> None:
    """What training draws (the camera matrix) is what comes back from a compressed file."""
    image = ImageProcessorConfig(SIZE, SIZE, True, (0.0,) * 3, (1.0,) * 3)
    for index in range(3):
        write_frames(tmp_path / "c.mp4", video_frames(5, index), FPS, (SIZE * UPSCALE, SIZE * UPSCALE))
        with Video.open(tmp_path / "c.mp4") as video:
            assert (video.info.frame_count, video.info.width) == (FRAMES, SIZE * UPSCALE)
            decoded = preprocess(list(video.frames(range(FRAMES))), image).transpose(0, 2, 3, 1) * 255
        m, frames = camera_matrix(), render(make_scene(5, index), 5, index).astype(np.float32)
        expected = np.einsum("ij,tjkc,lk->tilc", m, frames, m).clip(0, 255)
        assert np.abs(decoded - expected).mean() < 2.5


@pytest.mark.parametrize("seed", [1_000_000, 1_000_099, -1])
def test_training_seeds_are_refused(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from shapes_accuracy import check_seed

    with pytest.raises(SystemExit, match=str(seed)):
        check_seed(seed)
    check_seed(999_999)
