"""Over a hundred kinds of clips: the frames that ffmpeg gives, in order as in any order, or a refusal."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from clip_kinds import DAMAGES, WHOLE
from made_clips import read_number

from sfexport.errors import VideoError
from sfexport.video.decoding import Video

try:
    import imageio_ffmpeg
except ImportError:  # then the numbers drawn into the frames are the only witness
    imageio_ffmpeg = None


def ffmpeg_frames(path: Path, width: int, height: int) -> np.ndarray:
    """uint8 [frames, height, width, 3]: every frame that the ffmpeg program decodes."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-threads", "1"]
    command += ["-f", "mjpeg"] if path.name == "mjpeg_named.jpg" else []  # it goes by that name
    command += ["-i", str(path), "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    run = subprocess.run(command, capture_output=True, check=False)
    assert run.returncode >= 0, f"ffmpeg crashed (signal {-run.returncode})"
    data = run.stdout
    size = width * height * 3
    return np.frombuffer(data[: len(data) // size * size], np.uint8).reshape(-1, height, width, 3)


def check_against_ffmpeg(path: Path, frames: np.ndarray) -> None:
    if imageio_ffmpeg is not None:
        witness = ffmpeg_frames(path, frames.shape[2], frames.shape[1])
        assert len(witness) == len(frames)
        assert np.abs(witness.astype(int) - frames).mean() < 1


def any_order(count: int) -> list[int]:
    return np.random.default_rng(count).permutation(count)[:14].tolist()


@pytest.mark.parametrize("name", WHOLE)
def test_frames_are_right_in_any_order(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    numbers = WHOLE[name](path)
    with Video.open(path) as video:
        assert video.info.frame_count == len(numbers)
        assert not video.info.is_picture
        frames = np.stack(list(video.frames(range(len(numbers)))))
    assert [read_number(frame) for frame in frames] == numbers
    order = any_order(len(numbers))
    with Video.open(path) as video:
        for index, frame in zip(order, video.frames(order), strict=True):
            assert np.array_equal(frame, frames[index]), index
    check_against_ffmpeg(path, frames)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_or_leaves_whats_whole(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    DAMAGES[name](path)
    try:
        with Video.open(path) as video:
            frames = list(video.frames(range(video.info.frame_count)))
            order = any_order(len(frames))
            assert all(np.array_equal(frames[i], frame) for i, frame in zip(order, video.frames(order), strict=True))
    except VideoError as error:
        assert name in str(error) and error.hint
        return
    check_against_ffmpeg(path, np.stack(frames))
