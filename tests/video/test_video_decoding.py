"""Decoding: frame i is frame i, in every container, however it is reached."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from sfexport.errors import VideoError
from sfexport.video.decoding import Video
from sfexport.video.sampling import linspace_indices

KINDS = {
    "h264.mp4": {},
    "h264_b.mp4": {"b_frames": 3},
    "h264_b.mkv": {"b_frames": 3},
    "h264_b.ts": {"b_frames": 3},
    "h264_b.flv": {"b_frames": 3},
    # No times that mean anything: AVI has decoding order only, a bare stream nothing at all.
    "h264_b.avi": {"b_frames": 3},
    "bare.h264": {"b_frames": 3},
    "open_gop.mp4": {"b_frames": 3, "options": {"x264-params": "open-gop=1:keyint=10"}},
    # No key frame after the first: seeking lands where the picture is still being refreshed.
    "refresh.mp4": {"b_frames": 3, "options": {"x264-params": "intra-refresh=1:keyint=10"}},
    "mpeg4_b.mp4": {"codec": "mpeg4", "b_frames": 2},
    "mpeg4_b.avi": {"codec": "mpeg4", "b_frames": 2},
    "mpeg2_b.mpg": {"codec": "mpeg2video", "b_frames": 2},
    "vp8.webm": {"codec": "libvpx"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "still.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


@pytest.fixture(scope="module", params=KINDS)
def clip(request: pytest.FixtureRequest, clips: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.write(tmp_path_factory.mktemp("clips") / request.param, **KINDS[request.param])


def numbers(video: Video, indices: list[int], clips: Any) -> list[int]:
    return [clips.read_number(frame) for frame in video.frames(indices)]


class TestEveryContainer:
    def test_info(self, clip: Path) -> None:
        with Video.open(clip) as video:
            info = video.info
        assert (info.path, info.frame_count, info.width, info.height, info.rotation) == (clip, 40, 64, 64, 0)
        assert info.fps == pytest.approx(25)
        assert info.duration_seconds == pytest.approx(1.6, abs=0.05)

    def test_frame_i_is_frame_i(self, clip: Path, clips: Any) -> None:
        with Video.open(clip) as video:
            for frame in video.frames([0, 39]):
                assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8 and frame.flags.c_contiguous
            assert numbers(video, list(range(40)), clips) == list(range(40))

    @pytest.mark.parametrize("count", [1, 3, 7, 16, 100])
    def test_sampled(self, clip: Path, clips: Any, count: int) -> None:
        indices = linspace_indices(40, count)
        with Video.open(clip) as video:
            assert numbers(video, indices, clips) == indices

    def test_any_order_and_interleaved_passes(self, clip: Path, clips: Any) -> None:
        order = np.random.default_rng(0).integers(0, 40, 25).tolist()
        with Video.open(clip) as video:
            assert numbers(video, order, clips) == order
            pairs = zip(video.frames([3, 20, 35]), video.frames([1, 28, 30]), strict=True)
            read = [(clips.read_number(a), clips.read_number(b)) for a, b in pairs]
        assert read == [(3, 1), (20, 28), (35, 30)]


class TestSeeking:
    @pytest.mark.parametrize("b_frames", [0, 3])
    @pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
    def test_skips_most_of_a_long_clip(self, clips: Any, tmp_path: Path, suffix: str, b_frames: int) -> None:
        path = clips.write(tmp_path / f"long{suffix}", frames=400, gop=12, b_frames=b_frames)
        indices = [0, 50, 51, 130, 200, 301, 399]
        with Video.open(path) as video:
            sought = list(video.frames(indices))
            assert video.frames_decoded < 120
        with Video.open(path) as video:
            every = list(video.frames(range(400)))
            assert video.frames_decoded == 400
        assert all(np.array_equal(frame, every[i]) for i, frame in zip(indices, sought, strict=True))

    def test_one_key_frame_means_one_pass(self, clips: Any, tmp_path: Path) -> None:
        path = clips.write(tmp_path / "one.mp4", frames=60, gop=1000, options={"x264-params": "scenecut=0"})
        with Video.open(path) as video:
            assert numbers(video, [0, 20, 40, 59], clips) == [0, 20, 40, 59]
            assert video.frames_decoded == 60

    def test_opening_decodes_little(self, clips: Any, tmp_path: Path) -> None:
        with Video.open(clips.write(tmp_path / "clip.mp4", frames=200)) as video:
            assert video.frames_decoded < 20


class TestTimes:
    def test_variable_rate_counts_frames_not_seconds(self, clips: Any, tmp_path: Path) -> None:
        times = [0, 1, 2, 30, 31, 33, 90, 91, 200, 201, 202, 250]
        path = clips.write(tmp_path / "variable.mkv", frames=12, times=times, gop=3)
        with Video.open(path) as video:
            assert video.info.frame_count == 12
            assert video.info.duration_seconds == pytest.approx(10.0, abs=0.1)
            assert numbers(video, [0, 3, 6, 8, 11], clips) == [0, 3, 6, 8, 11]

    def test_short_clip_repeats_frames(self, clips: Any, tmp_path: Path) -> None:
        with Video.open(clips.write(tmp_path / "short.mp4", frames=5)) as video:
            indices = linspace_indices(video.info.frame_count, 16)
            assert numbers(video, indices, clips) == indices
            assert video.frames_decoded == 5

    def test_one_frame(self, clips: Any, tmp_path: Path) -> None:
        with Video.open(clips.write(tmp_path / "one.mp4", frames=1)) as video:
            assert video.info.frame_count == 1
            assert video.info.fps > 0
            assert numbers(video, [0, 0, 0], clips) == [0, 0, 0]

    def test_edit_list_hides_the_beginning(self, clips: Any, tmp_path: Path) -> None:
        def shift(index: int, packet: av.Packet) -> av.Packet:
            packet.pts, packet.dts = packet.pts - 5, packet.dts - 5
            return packet

        options = {"avoid_negative_ts": "disabled"}
        path = clips.write(tmp_path / "cut.mp4", b_frames=2, change=shift, container_options=options)
        with Video.open(path) as video:
            assert video.info.frame_count == 35
            assert numbers(video, list(range(35)), clips) == list(range(5, 40))
            assert numbers(video, [30, 4], clips) == [35, 9]

    def test_recording_that_begins_between_key_frames(self, clips: Any, tmp_path: Path) -> None:
        path = clips.write(tmp_path / "cut.ts", b_frames=2, change=lambda i, packet: packet if i >= 4 else None)
        with Video.open(path) as video:
            count = video.info.frame_count
            read = numbers(video, list(range(count)), clips)
        assert count == len(read) == 30
        assert read == list(range(10, 40))

    def test_joined_recordings(self, clips: Any, tmp_path: Path) -> None:
        part = clips.write(tmp_path / "part.ts", frames=20).read_bytes()
        (tmp_path / "joined.ts").write_bytes(part + part)
        with Video.open(tmp_path / "joined.ts") as video:
            assert video.info.frame_count == 40
            assert numbers(video, list(range(40)), clips) == [*range(20), *range(20)]


class TestFramesThatNeverComeOut:
    """VP8 marks frames that are only referred to; clearing the mark in a finished clip hides those frames."""

    @pytest.fixture
    def hidden(self, clips: Any, tmp_path: Path) -> Path:
        def hide(index: int, packet: av.Packet) -> av.Packet:
            if index not in (5, 6, 25, 39):
                return packet
            data = bytes(packet)
            return clips.with_payload(packet, bytes([data[0] & ~0x10]) + data[1:])

        options = {"lag-in-frames": "0", "deadline": "realtime", "cpu-used": "8"}
        return clips.write(tmp_path / "hidden.webm", codec="libvpx", options=options, change=hide)

    def test_are_not_counted(self, hidden: Path, clips: Any) -> None:
        expected = [i for i in range(40) if i not in (5, 6, 25, 39)]
        with Video.open(hidden) as video:
            assert video.info.frame_count == 36
            assert numbers(video, list(range(36)), clips) == expected
            assert numbers(video, [35, 23, 5, 4], clips) == [38, 26, 7, 4]

    def test_are_not_decoded_again(self, hidden: Path, clips: Any) -> None:
        with Video.open(hidden) as video:
            assert numbers(video, [4, 5, 5, 6, 7], clips) == [4, 7, 7, 8, 9]
            assert video.frames_decoded < 20, "of 36; the first eight are decoded twice"

    def test_sought_directly(self, hidden: Path, clips: Any) -> None:
        for index, number in ((5, 7), (23, 26), (35, 38)):
            with Video.open(hidden) as video:
                assert numbers(video, [index, index], clips) == [number, number]


class TestFrames:
    def test_an_index_out_of_range_is_refused_at_once(self, clips: Any, tmp_path: Path) -> None:
        with Video.open(clips.write(tmp_path / "clip.mp4", frames=5)) as video:
            for index in (5, -1):
                with pytest.raises(VideoError, match=f"clip.mp4.* frame {index}"):
                    video.frames([0, index])

    def test_numpy_indices(self, clips: Any, tmp_path: Path) -> None:
        with Video.open(clips.write(tmp_path / "clip.mp4", frames=5)) as video:
            assert numbers(video, np.array([1, 3]), clips) == [1, 3]

    def test_a_closed_video_says_so(self, clips: Any, tmp_path: Path) -> None:
        with Video.open(clips.write(tmp_path / "clip.mp4", frames=5)) as video:
            frames = video.frames([0, 1])
        with pytest.raises(VideoError, match="closed"):
            next(frames)
        video.close()

    def test_names_that_look_like_protocols_or_patterns(self, clips: Any, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        clips.write(tmp_path / "plain.mp4", frames=3)
        for name in ("http:clip.mp4", "100%d.mp4", "-i.mp4", "ä ö.mp4"):
            (tmp_path / name).write_bytes((tmp_path / "plain.mp4").read_bytes())
            with Video.open(name) as video:
                assert video.info.frame_count == 3


def corners() -> np.ndarray:
    """uint8 [48, 96, 3]: wider than high, its four corners all different."""
    picture = np.full((48, 96, 3), 128, np.uint8)
    picture[:24, :48], picture[:24, 48:], picture[24:, :48] = (230, 20, 20), (20, 200, 20), (20, 20, 230)
    return picture


def set_track_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Write a, b, c, d into the track header (16.16 numbers; the third column is 2.30)."""

    def packed(a: int, b: int, c: int, d: int) -> bytes:
        return struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)

    data = path.read_bytes()
    at = data.index(packed(1, 0, 0, 1), data.index(b"tkhd"))
    path.write_bytes(data[:at] + packed(*matrix) + data[at + 36 :])


class TestRotation:
    # How the upright picture was turned to be stored, the matrix that undoes it, and the clockwise degrees of that.
    CASES = {
        "upright": (lambda p: p, (1, 0, 0, 1), 0),
        "quarter": (lambda p: np.rot90(p, 1), (0, 1, -1, 0), 90),
        "half": (lambda p: np.rot90(p, 2), (-1, 0, 0, -1), 180),
        "three quarters": (lambda p: np.rot90(p, 3), (0, -1, 1, 0), 270),
        "mirrored": (lambda p: p[:, ::-1], (-1, 0, 0, 1), 180),
        "upside down": (lambda p: p[::-1], (1, 0, 0, -1), 0),
        "transposed": (lambda p: p.transpose(1, 0, 2), (0, 1, 1, 0), 90),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_frames_come_out_upright(self, clips: Any, tmp_path: Path, case: str) -> None:
        store, matrix, degrees = self.CASES[case]
        upright = corners()
        path = clips.write(tmp_path / "turned.mp4", frames=[np.ascontiguousarray(store(upright))] * 3)
        set_track_matrix(path, matrix)
        with Video.open(path) as video:
            assert (video.info.width, video.info.height, video.info.rotation) == (96, 48, degrees)
            for frame in video.frames([0, 2]):
                assert frame.shape == upright.shape and frame.flags.c_contiguous
                assert np.abs(frame.astype(int) - upright).mean() < 12
