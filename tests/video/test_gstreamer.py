"""Decoding with GStreamer: the same frames as PyAV's at the same times, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_kinds import WHOLE
from made_clips import numbered_picture
from PIL import Image

from sfexport.errors import InputError, MissingDependency, VideoError
from sfexport.qa.pipeline import open_video
from sfexport.video.decoding import Video
from sfexport.video.gstreamer import load_gstreamer
from sfexport.video.sampling import linspace_indices

try:
    load_gstreamer()
    REASON = ""
except MissingDependency as error:
    REASON = str(error)
gstreamer = pytest.mark.skipif(bool(REASON), reason=REASON)

KINDS: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "h264_b.mp4": {"b_frames": 3},
    "h264_b.mkv": {"b_frames": 3},
    "h264_b.ts": {"b_frames": 3},
    "h264_b.mov": {"b_frames": 3},
    "h264_b.flv": {"b_frames": 3},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "mpeg4_b.mp4": {"codec": "mpeg4", "b_frames": 2},
    "mjpeg.mkv": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "full_range.mp4": {"pix_fmt": "yuvj420p", "tags": {"color_range": 2}},
    "bt709.mp4": {"tags": {"colorspace": 1, "color_range": 1}},
    "chroma444.mp4": {"pix_fmt": "yuv444p"},
}


@gstreamer
@pytest.mark.parametrize("name", KINDS)
def test_frames_and_times_are_those_of_pyav(name: str, clips: Any, tmp_path: Path) -> None:
    path = clips.write(tmp_path / name, **KINDS[name])
    indices = [*linspace_indices(40, 11), 39, 3, 4]
    with Video.open(path) as video, Video.open(path, decoder="gstreamer") as other:
        assert other.info == video.info
        assert other.times(range(40)) == video.times(range(40))
        for index, ours, theirs in zip(indices, video.frames(indices), other.frames(indices), strict=True):
            assert clips.read_number(theirs) == index
            assert np.abs(ours.astype(int) - theirs).max() == 0, index


@gstreamer
@pytest.mark.parametrize("size", [(50, 70), (33, 47), (48, 66)])
def test_sizes_that_rows_are_padded_for(size: tuple[int, int], clips: Any, tmp_path: Path) -> None:
    pictures = [np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8) for i in range(4)]
    path = clips.write(tmp_path / "odd.mkv", frames=pictures, codec="libvpx")
    with Video.open(path) as video, Video.open(path, decoder="gstreamer") as other:
        for ours, theirs in zip(video.frames(range(4)), other.frames(range(4)), strict=True):
            assert np.array_equal(ours, theirs)


@gstreamer
@pytest.mark.parametrize(
    "name", ["a ! fakesink name=b.mp4", 'x.mp4" ! filesink location="y.mp4', "-i %d?*.mp4", "ä.mp4"]
)
def test_a_name_is_a_name(name: str, clips: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    clips.write(tmp_path / "plain.mp4", frames=3).rename(path)
    with Video.open(path, decoder="gstreamer") as video:
        assert [clips.read_number(frame) for frame in video.frames(range(3))] == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


@gstreamer
@pytest.mark.parametrize("name", WHOLE)
def test_every_kind_of_clip_is_read_alike_or_refused(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("sfexport.video.gstreamer.WAIT_SECONDS", 3)
    count = len(WHOLE[name](tmp_path / name))
    indices = range(0, count, 3)
    with Video.open(tmp_path / name) as video:
        frames = list(video.frames(indices))
    try:
        with Video.open(tmp_path / name, decoder="gstreamer") as video:
            others = list(video.frames(indices))
    except VideoError as error:
        assert name in str(error) and "--decoder pyav" in str(error.hint)
        return
    # Measured: 0 for 8 bits in 4:2:0, 4:2:2 and 4:4:4; 1 for 10 bits; 2 for 4:1:0.
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(frames, others, strict=True)) <= 2


@gstreamer
def test_a_codec_that_gstreamer_lacks_is_told_at_once(clips: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = clips.write(tmp_path / "clip.mp4", frames=3)
    skip_decoders = lambda _, pad, caps, factory: 2 if "Decoder" in factory.get_metadata("klass") else 0  # noqa: E731
    monkeypatch.setattr("sfexport.video.gstreamer._select", skip_decoders)
    with (
        Video.open(path, decoder="gstreamer") as video,
        pytest.raises(VideoError, match=r"GStreamer cannot decode .*clip\.mp4"),
    ):
        next(video.frames([0]))


@gstreamer
def test_what_it_does_not_do_is_refused(clips: Any, tmp_path: Path) -> None:
    path = clips.write(tmp_path / "clip.mp4")
    with (
        Video.open(path, decoder="gstreamer") as video,
        pytest.raises(InputError, match="--seek keyframe is not for --decoder gstreamer"),
    ):
        video.frames([0], seek="keyframe")
    with pytest.raises(VideoError, match="without usable times"):
        Video.open(clips.write(tmp_path / "bare.h264", b_frames=3), decoder="gstreamer")


@gstreamer
def test_a_file_that_ends_early_is_refused(clips: Any, tmp_path: Path) -> None:
    path = clips.write(tmp_path / "clip.mp4", container_options={"movflags": "faststart"})
    with Video.open(path, decoder="gstreamer") as video:
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        with pytest.raises(VideoError, match=r"clip\.mp4"):
            list(video.frames([0, 39]))


def test_pictures_and_frames_in_memory_are_refused(tmp_path: Path) -> None:
    Image.fromarray(numbered_picture(1)).save(tmp_path / "one.png")
    for video in (tmp_path / "one.png", tmp_path, np.stack([numbered_picture(1)])):
        with pytest.raises(InputError, match="--decoder gstreamer"):
            open_video(video, decoder="gstreamer")
    with pytest.raises(InputError, match="no decoder 'vlc'"):
        open_video(tmp_path, decoder="vlc")


def test_without_the_bindings_the_packages_are_named(clips: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gi", None)
    path = clips.write(tmp_path / "clip.mp4", frames=3)
    with pytest.raises(MissingDependency, match="'gi', which is not installed") as caught:
        Video.open(path, decoder="gstreamer")
    assert "python3-gi" in str(caught.value.hint) and "--system-site-packages" in str(caught.value.hint)
