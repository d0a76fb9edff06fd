"""Reading keyframes only: which are taken, that nothing else is decoded, and where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clip_kinds import DAMAGES, WHOLE
from made_clips import numbered_picture
from PIL import Image

from sfexport.errors import InputError, VideoError
from sfexport.video.arrays import MemoryFrames
from sfexport.video.decoding import Video
from sfexport.video.sampling import linspace_indices, nearest_keyframes

SUFFIXES = ("mp4", "mkv", "ts", "mov", "flv")
IRREGULAR = [0, 1, 2, 30, 31, 33, 90, 91, 200, 201, 202, 250, 251, 252, 253, 400]
ALL_KEYFRAMES = ("mjpeg.avi", "mjpeg.mkv", "prores.mov", "huffyuv.avi")


def packet_times(path: Path) -> tuple[list[float], list[float]]:
    """Times of all packets, ascending, and of the keyframes, in seconds, as PyAV's demuxer has them."""
    with av.open(str(path)) as container:
        found = [(float(p.pts * p.time_base), p.is_keyframe) for p in container.demux(video=0) if p.size]
    return sorted(time for time, _ in found), sorted(time for time, is_key in found if is_key)


def nearest_by_search(wanted: list[float], keyframes: list[float]) -> list[float]:
    return [min(keyframes, key=lambda key: (round(abs(key - time), 6), key)) for time in wanted]


@pytest.mark.parametrize("seed", range(12))
def test_the_keyframes_nearest_by_the_packets_are_taken_and_nothing_else_is_decoded(
    seed: int, clips: Any, tmp_path: Path
) -> None:
    random = np.random.default_rng(seed)
    frames, gop, b_frames = int(random.integers(20, 160)), int(random.integers(2, 40)), int(random.integers(0, 4))
    path = tmp_path / f"clip.{SUFFIXES[seed % len(SUFFIXES)]}"
    clips.write(path, frames=frames, gop=gop, b_frames=b_frames, options={"x264-params": "scenecut=0"})
    times, keyframes = packet_times(path)
    indices = linspace_indices(frames, int(random.integers(1, 70)))
    expected = nearest_by_search([times[index] for index in indices], keyframes)
    with Video.open(path) as video:
        chosen = video.nearest_keyframes(indices)
        opened = video.frames_decoded
        read = [clips.read_number(frame) for frame in video.frames(indices, seek="keyframe")]
        decoded = video.frames_decoded - opened
        assert video.times(chosen) == pytest.approx([time - times[0] for time in expected], abs=1e-6)
    assert len(read) == len(indices)
    assert read == chosen == sorted(chosen)
    # Opening has decoded the first frame.
    assert decoded == len(set(chosen) - {0})


def test_irregular_times_count_not_frame_numbers(clips: Any, tmp_path: Path) -> None:
    path = clips.write(tmp_path / "irregular.mkv", frames=16, times=IRREGULAR, gop=3)
    times, keyframes = packet_times(path)
    with Video.open(path) as video:
        chosen = video.nearest_keyframes(range(16))
        assert video.times(chosen) == pytest.approx(nearest_by_search(times, keyframes), abs=1e-6)
        assert chosen[4] == 3 != chosen[8], "6 is as many frames away from 8 as from 4, and far earlier"


@pytest.mark.parametrize("name", WHOLE)
def test_every_kind_of_clip_gives_its_keyframes_as_exact_reading_does(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    count = len(WHOLE[name](path))
    indices = linspace_indices(count, 9)
    with Video.open(path) as video:
        try:
            chosen = video.nearest_keyframes(indices)
        except VideoError as error:
            assert "keyframes" in str(error) and "--seek exact" in str(error.hint)
            return
        keyframes = list(video.frames(indices, seek="keyframe"))
        # Both ways alternate, and disturb each other in nothing.
        for index, frame in zip(chosen, keyframes, strict=True):
            assert np.array_equal(frame, next(video.frames([index]))), index
            assert np.array_equal(frame, next(video.frames([index], seek="keyframe"))), index


@pytest.mark.parametrize("name", DAMAGES)
def test_keyframes_of_a_damaged_clip_are_whole_or_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    DAMAGES[name](path)
    try:
        with Video.open(path) as video:
            indices = range(video.info.frame_count)
            chosen, frames = video.nearest_keyframes(indices), list(video.frames(indices, seek="keyframe"))
            assert all(np.array_equal(f, g) for f, g in zip(frames, video.frames(chosen), strict=True))
    except VideoError as error:
        assert name in str(error) and error.hint


@pytest.mark.parametrize("name", ALL_KEYFRAMES)
def test_a_clip_of_keyframes_gives_the_same_as_exact(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    count = len(WHOLE[name](path))
    indices = linspace_indices(count, 13)
    with Video.open(path) as video:
        assert video.nearest_keyframes(indices) == indices
        both = zip(video.frames(indices), list(video.frames(indices, seek="keyframe")), strict=True)
        assert all(np.array_equal(exact, keyframe) for exact, keyframe in both)


def test_one_keyframe_repeats(clips: Any, tmp_path: Path) -> None:
    path = clips.write(tmp_path / "one.mp4", frames=60, gop=1000, options={"x264-params": "scenecut=0"})
    with Video.open(path) as video:
        assert video.nearest_keyframes([0, 20, 59]) == [0, 0, 0]
        assert [clips.read_number(frame) for frame in video.frames([0, 20, 59], seek="keyframe")] == [0, 0, 0]


def test_of_two_as_near_keyframes_the_earlier_is_taken() -> None:
    stamps = np.arange(0, 100, 10)
    assert nearest_keyframes(range(10), np.array([0, 4, 9]), stamps) == [0, 0, 0, 4, 4, 4, 4, 9, 9, 9]
    assert nearest_keyframes([0, 9], np.array([4]), stamps) == [4, 4]
    assert nearest_keyframes([0, 1], np.array([2, 4]), stamps) == [2, 2]


def no_video(kind: str, path: Path) -> Video:
    picture = Image.fromarray(numbered_picture(3))
    if kind == "array":
        return Video(MemoryFrames(np.stack([numbered_picture(i) for i in range(4)]), 25))
    if kind == "folder":
        path.mkdir()
        picture.save(path / "1.png")
        return Video.open(path, fps=5)
    file = path.with_suffix(".webp" if kind == "animation" else f".{kind}")
    more = {"save_all": True, "append_images": [Image.fromarray(numbered_picture(5))]} if kind == "animation" else {}
    picture.save(file, **more)
    return Video.open(file)


@pytest.mark.parametrize("kind", ["png", "jpg", "folder", "array", "animation"])
def test_what_is_no_video_file_is_refused(kind: str, tmp_path: Path) -> None:
    with no_video(kind, tmp_path / "frames") as video:
        with pytest.raises(InputError, match="keyframes") as caught:
            video.frames([0], seek="keyframe")
        assert "--seek keyframe" in str(caught.value.hint)
        assert video.times([0]) == (None if kind == "animation" else [0.0])


def test_an_unknown_way_is_refused(clips: Any, tmp_path: Path) -> None:
    path = clips.write(tmp_path / "clip.mp4", frames=3)
    with Video.open(path) as video, pytest.raises(InputError, match="'fast'"):
        video.frames([0], seek="fast")


def test_a_closed_video_says_so(clips: Any, tmp_path: Path) -> None:
    with Video.open(clips.write(tmp_path / "clip.mp4", frames=30)) as video:
        frames = video.frames([0, 10, 20], seek="keyframe")
        next(frames), next(frames)
    with pytest.raises(VideoError, match="closed"):
        next(frames)
