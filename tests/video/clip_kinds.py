"""Kinds of clips, each with the numbers of the frames that are right: containers, codecs, layouts, times, damages.

A maker writes a clip to a path and returns the numbers in order. None stands for "a refusal is right as well".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from made_clips import SIDE, numbered_picture, set_disposition, write_clip

Maker = Callable[[Path], list[int]]
X264_OPEN = {"x264-params": "open-gop=1:keyint=10:bframes=3:scenecut=0"}
X265_QUIET = {"x265-params": "log-level=none:keyint=10:bframes=3"}
X265_OPEN = {"x265-params": "log-level=none:keyint=10:bframes=3:open-gop=1"}


def whole(path: Path, frames: int = 40, **how: Any) -> list[int]:
    write_clip(path, frames=frames, **how)
    return list(range(frames))


# One video stream, nothing special but the codec and the container.
PLAIN: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "h264_b.mp4": {"b_frames": 3},
    "h264_b.mov": {"b_frames": 3},
    "h264_b.mkv": {"b_frames": 3},
    "h264_b.ts": {"b_frames": 3},
    "h264_b.flv": {"b_frames": 3},
    "h264_b.avi": {"b_frames": 3},
    "h264_b.nut": {"b_frames": 3},
    "h264_b.asf": {"b_frames": 3},
    "h264_b.3gp": {"b_frames": 3},
    "h264_b.mpg": {"b_frames": 3},
    "bare.h264": {"b_frames": 3},
    "hevc_b.mp4": {"codec": "libx265", "options": X265_QUIET},
    "hevc_b.ts": {"codec": "libx265", "options": X265_QUIET},
    "bare.hevc": {"codec": "libx265", "options": X265_QUIET},
    "vp8.webm": {"codec": "libvpx"},
    "vp8_alt_ref.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "vp9_alt_ref.webm": {"codec": "libvpx-vp9", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "vp9.ivf": {"codec": "libvpx-vp9"},
    "av1.mkv": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "keyint=10"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "keyint=10"}},
    "av1.obu": {"codec": "libsvtav1", "options": {"preset": "12"}},
    "mpeg4_b.mp4": {"codec": "mpeg4", "b_frames": 2},
    "mpeg4_b.avi": {"codec": "mpeg4", "b_frames": 2},
    "mpeg4.m4v": {"codec": "mpeg4"},
    "msmpeg4.avi": {"codec": "msmpeg4"},
    "wmv2.wmv": {"codec": "wmv2"},
    "flv1.flv": {"codec": "flv"},
    "flv1.swf": {"codec": "flv"},
    "mpeg1_b.mpg": {"codec": "mpeg1video", "b_frames": 2},
    "mpeg2_b.mpg": {"codec": "mpeg2video", "b_frames": 2},
    "mpeg2_b.vob": {"codec": "mpeg2video", "b_frames": 2},
    "mpeg2_b.ts": {"codec": "mpeg2video", "b_frames": 2},
    "mpeg2_b.m2v": {"codec": "mpeg2video", "b_frames": 2},
    "mpeg2.mxf": {"codec": "mpeg2video"},
    "ffv1.mkv": {"codec": "ffv1"},
    "huffyuv.avi": {"codec": "huffyuv", "pix_fmt": "yuv422p"},
    "utvideo.avi": {"codec": "utvideo"},
    "raw.avi": {"codec": "rawvideo"},
    "raw.nut": {"codec": "rawvideo"},
    "raw.y4m": {"codec": "wrapped_avframe"},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "qtrle.mov": {"codec": "qtrle", "pix_fmt": "rgb24"},
    "png.mov": {"codec": "png", "pix_fmt": "rgb24"},
    "zmbv.avi": {"codec": "zmbv", "pix_fmt": "bgr0"},
    "flashsv.flv": {"codec": "flashsv", "pix_fmt": "bgr24"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mjpeg.mkv": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mjpeg.mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mjpeg_named.jpg": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "form": "mjpeg"},
    "animated.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "animated.apng": {"codec": "apng", "pix_fmt": "rgb24"},
    "animated_named.png": {"codec": "apng", "pix_fmt": "rgb24", "form": "apng"},
    "pngs.png": {"codec": "png", "pix_fmt": "rgb24", "form": "image2pipe"},
    "bmps.bmp": {"codec": "bmp", "pix_fmt": "bgr24", "form": "image2pipe"},
    "ppms.ppm": {"codec": "ppm", "pix_fmt": "rgb24", "form": "image2pipe"},
    "pgms.pgm": {"codec": "pgm", "pix_fmt": "gray", "form": "image2pipe"},
    # Pixels.
    "ten_bits.mkv": {"pix_fmt": "yuv420p10le"},
    "hdr.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": X265_QUIET, "tags": {"colorspace": 9}},
    "bt709.mp4": {"tags": {"colorspace": 1, "color_range": 1}},
    "full_range.mp4": {"pix_fmt": "yuvj420p", "tags": {"color_range": 2}},
    "chroma444.mp4": {"pix_fmt": "yuv444p"},
    "chroma410.mkv": {"codec": "ffv1", "pix_fmt": "yuv410p"},
    "grey16.mkv": {"codec": "ffv1", "pix_fmt": "gray16le"},
    "rgb.mkv": {"codec": "libx264rgb", "pix_fmt": "rgb24"},
    "anamorphic.mp4": {"tags": {"sample_aspect_ratio": Fraction(4, 3)}},
    # Where decoding can start.
    "open_gop.mp4": {"b_frames": 3, "options": X264_OPEN},
    "open_gop.mkv": {"b_frames": 3, "options": X264_OPEN},
    "open_gop.ts": {"b_frames": 3, "options": X264_OPEN},
    "open_gop_hevc.mkv": {"codec": "libx265", "options": X265_OPEN},
    "open_gop_mpeg2.ts": {"codec": "mpeg2video", "b_frames": 2, "options": {"sc_threshold": "1000000000"}},
    "refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=10"}},
    "refresh.ts": {"options": {"x264-params": "intra-refresh=1:keyint=10"}},
    "pyramid.mp4": {"b_frames": 8, "options": {"x264-params": "b-pyramid=normal:b-adapt=0:keyint=20"}},
    "one_key.mp4": {"gop": 1000, "options": {"x264-params": "scenecut=0"}},
    "all_keys.mp4": {"gop": 1},
    "interlaced.ts": {"options": {"x264-params": "interlaced=1:keyint=10"}},
    "interlaced_b.mkv": {"b_frames": 2, "options": {"x264-params": "tff=1:keyint=10"}},
    # Containers' own ways.
    "fragmented.mp4": {"b_frames": 2, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "faststart.mp4": {"b_frames": 2, "container_options": {"movflags": "faststart"}},
    "negative_offsets.mp4": {"b_frames": 3, "container_options": {"movflags": "negative_cts_offsets"}},
    "live.mkv": {"b_frames": 2, "container_options": {"live": "1"}},
    "clusters.mkv": {"b_frames": 2, "container_options": {"cluster_time_limit": "100"}},
    "m2ts.m2ts": {"b_frames": 2, "form": "mpegts", "container_options": {"mpegts_m2ts_mode": "1"}},
    "ntsc.mp4": {"rate": Fraction(30000, 1001), "b_frames": 2},
    "ntsc.ts": {"rate": Fraction(30000, 1001), "b_frames": 2},
    "fast.mkv": {"rate": 240},
    "named.txt.mp4": {"b_frames": 1},
    "no_suffix": {"form": "mp4"},
    "named_wrongly.avi": {"form": "matroska"},
}


# Times.


def shifted(path: Path, by: int, **how: Any) -> list[int]:
    def shift(index: int, packet: av.Packet) -> av.Packet:
        packet.pts, packet.dts = packet.pts + by, packet.dts + by
        return packet

    write_clip(path, b_frames=2, change=shift, **how)
    return list(range(40))


def edited(path: Path) -> list[int]:
    shifted(path, -5, container_options={"avoid_negative_ts": "disabled"})
    return list(range(5, 40))


def uneven(path: Path, b_frames: int = 2) -> list[int]:
    times = np.cumsum(np.random.default_rng(0).integers(1, 30, 40)).tolist()
    write_clip(path, times=times, b_frames=b_frames)
    return list(range(40))


def still_scene(path: Path, codec: str = "mjpeg", pix_fmt: str = "yuvj420p") -> list[int]:
    """Ten times four equal frames: key packets that look alike."""
    numbers = [i // 4 % 3 for i in range(40)]
    write_clip(path, frames=[numbered_picture(n) for n in numbers], codec=codec, pix_fmt=pix_fmt)
    return numbers


def cut(path: Path, first: int, expected: Sequence[int], **how: Any) -> list[int]:
    """Without its first packets."""
    write_clip(path, change=lambda i, packet: packet if i >= first else None, **how)
    return list(expected)


def joined(path: Path, **how: Any) -> list[int]:
    write_clip(path, frames=20, **how)
    path.write_bytes(path.read_bytes() * 2)
    return [*range(20), *range(20)]


def short(path: Path, frames: int, **how: Any) -> list[int]:
    return whole(path, frames, **how)


TIMES: dict[str, Maker] = {
    "late.mp4": partial(shifted, by=10_000),
    "late.mkv": partial(shifted, by=10_000),
    # 2^33 ticks of 1/90000 s: the clock of MPEG streams starts anew in the middle. Two seconds in advance are muxed.
    "wrap.ts": partial(shifted, by=2**33 * 25 // 90_000 - 20),
    "wrap.mpg": partial(shifted, by=2**33 * 25 // 90_000 - 20, codec="mpeg2video"),
    "edited.mp4": edited,
    "edited.mov": edited,
    "uneven.mkv": uneven,
    "uneven.mp4": uneven,
    "uneven.webm": partial(whole, codec="libvpx", times=np.cumsum(np.arange(1, 41)).tolist()),
    "still_scene.avi": still_scene,
    "still_scene.mkv": still_scene,
    "still_scene.mpg": partial(still_scene, codec="mpeg2video", pix_fmt="yuv420p"),
    "still_scene.ts": partial(still_scene, codec="mpeg2video", pix_fmt="yuv420p"),
    "cut.ts": partial(cut, first=4, expected=range(10, 40), b_frames=2),
    "cut_mpeg2.ts": partial(cut, first=4, expected=range(12, 40), codec="mpeg2video", b_frames=2),
    "cut_open.ts": partial(cut, first=14, expected=range(20, 40), b_frames=3, options=X264_OPEN),
    "cut_open_hevc.mkv": partial(cut, first=14, expected=range(20, 40), codec="libx265", options=X265_OPEN),
    "joined.ts": joined,
    "joined_b.ts": partial(joined, b_frames=2),
    "joined.h264": partial(joined, b_frames=2),
    "joined.mpg": partial(joined, codec="mpeg2video"),
    "one_frame.mp4": partial(short, frames=1),
    "two_frames.mkv": partial(short, frames=2),
    "nine_frames.avi": partial(short, frames=9, codec="mpeg4", b_frames=2),
}


# Layouts.


def several(
    path: Path, streams: Sequence[tuple[str, Sequence[int], int, int]], main: Sequence[int] = range(40)
) -> list[int]:
    """Streams of (codec, numbers, side, disposition) in this order."""
    with av.open(str(path), "w") as container:
        made = []
        for codec, _, side, disposition in streams:
            stream = container.add_stream(codec, rate=25)
            stream.width = stream.height = side
            stream.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24"}.get(codec, "yuv420p")
            stream.gop_size = 10
            set_disposition(stream, disposition)
            made.append(stream)
        container.start_encoding()
        for stream, (_, numbers, side, _) in zip(made, streams, strict=True):
            for i, number in enumerate(numbers):
                picture = np.ascontiguousarray(numbered_picture(number)[:: SIDE // side, :: SIDE // side])
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 25)
                container.mux(stream.encode(frame))
        for stream in made:
            container.mux(stream.encode(None))
    return list(main)


DEFAULT, COVER, OTHER = 1, 0x400, range(1000, 1040)
REAL, PLAIN_REAL = ("libx264", range(40), 64, DEFAULT), ("libx264", range(40), 64, 0)
LAYOUTS: dict[str, Maker] = {
    "thumbnail_first.mkv": partial(several, streams=[("mjpeg", [777], 32, 0), REAL]),
    "preview_first.mkv": partial(several, streams=[("libx264", OTHER, 32, 0), REAL]),
    "default_second.mp4": partial(several, streams=[("libx264", OTHER, 64, 0), REAL]),
    "default_first.mp4": partial(several, streams=[REAL, ("libx264", OTHER, 64, 0)]),
    "empty_first.mkv": partial(several, streams=[("libx264", [], 64, 0), PLAIN_REAL]),
    "empty_default_first.mkv": partial(several, streams=[("libx264", [], 64, DEFAULT), PLAIN_REAL]),
    "cover_first.mp4": partial(several, streams=[("png", [777], 64, COVER), REAL]),
    "one_frame_first.ts": partial(several, streams=[("libx264", [5], 32, 0), PLAIN_REAL]),
}


# Damages: the frames that are whole, or a refusal.


def truncated(path: Path, part: float, **how: Any) -> None:
    write_clip(path, **how)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])


def dirtied(path: Path, at: float, size: int, **how: Any) -> None:
    write_clip(path, **how)
    data = bytearray(path.read_bytes())
    start = int(at * len(data))
    data[start : start + size] = random.Random(0).randbytes(size)
    path.write_bytes(data)


def lost(path: Path, **how: Any) -> None:
    """Transport packets lost in the middle."""
    write_clip(path, **how)
    data = path.read_bytes()
    middle = len(data) // 376 * 188
    path.write_bytes(data[:middle] + data[middle + 188 * 3 :])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated.mp4": partial(truncated, part=0.6),
    "truncated_fast.mp4": partial(truncated, part=0.6, container_options={"movflags": "faststart"}),
    "truncated.mkv": partial(truncated, part=0.6, b_frames=2),
    "truncated.ts": partial(truncated, part=0.61, b_frames=2),
    "truncated.mpg": partial(truncated, part=0.6, codec="mpeg2video", b_frames=2),
    "truncated.flv": partial(truncated, part=0.6),
    "truncated_mjpeg.avi": partial(truncated, part=0.6, codec="mjpeg", pix_fmt="yuvj420p"),
    "truncated.gif": partial(truncated, part=0.6, codec="gif", pix_fmt="rgb8"),
    "truncated.apng": partial(truncated, part=0.6, codec="apng", pix_fmt="rgb24"),
    "truncated.h264": partial(truncated, part=0.6),
    "dirty.mp4": partial(dirtied, at=0.5, size=200),
    "dirty.mkv": partial(dirtied, at=0.5, size=200, b_frames=2),
    "dirty.ts": partial(dirtied, at=0.5, size=200),
    "dirty.mpg": partial(dirtied, at=0.5, size=200, codec="mpeg2video"),
    "dirty_mpeg4.avi": partial(dirtied, at=0.5, size=200, codec="mpeg4"),
    "dirty_mjpeg.avi": partial(dirtied, at=0.5, size=200, codec="mjpeg", pix_fmt="yuvj420p"),
    "dirty_ffv1.mkv": partial(dirtied, at=0.5, size=200, codec="ffv1"),
    "dirty.mjpeg": partial(dirtied, at=0.1, size=200, codec="mjpeg", pix_fmt="yuvj420p"),
    "dirty_vp9.webm": partial(dirtied, at=0.5, size=50, codec="libvpx-vp9"),
    "lost.ts": lost,
    "lost_mpeg2.ts": partial(lost, codec="mpeg2video", b_frames=2),
}

WHOLE: dict[str, Maker] = {name: partial(whole, **how) for name, how in PLAIN.items()} | TIMES | LAYOUTS
