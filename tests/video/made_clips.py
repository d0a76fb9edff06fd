"""Clips made on the spot, in which every frame carries its number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

SIDE, BLOCK = 64, 16
RATE = 25


def numbered_picture(number: int) -> np.ndarray:
    """uint8 [64, 64, 3]: 16 blocks, black or white, are the bits of the number."""
    bits = np.array([number >> bit & 1 for bit in range(16)], np.uint8).reshape(4, 4)
    return np.repeat((bits * 200 + 25).repeat(BLOCK, 0).repeat(BLOCK, 1)[:, :, None], 3, axis=2)


def read_number(frame: np.ndarray) -> int:
    """The number that `numbered_picture` put there."""
    middles = frame[BLOCK // 2 :: BLOCK, BLOCK // 2 :: BLOCK, 1].reshape(-1)
    return sum(1 << bit for bit, value in enumerate(middles.tolist()) if value > 127)


def write_clip(
    path: Path,
    frames: int | Sequence[np.ndarray] = 40,
    codec: str = "libx264",
    gop: int = 10,
    b_frames: int = 0,
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    change: Callable[[int, av.Packet], av.Packet | None] = lambda index, packet: packet,
    container_options: dict[str, str] | None = None,
    form: str | None = None,
    rate: Fraction | int = RATE,
    tags: dict[str, int] | None = None,
) -> Path:
    """Encode numbered pictures (or the given ones) at 25 per second, or at `times` in 1/25 seconds.

    `change` sees each packet, with its position in decoding order, before it is written; None drops it. `form`:
    the container's name, where the file's does not tell; `tags`: further attributes of the encoder.
    """
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    pictures = [numbered_picture(i) for i in range(frames)] if isinstance(frames, int) else frames
    with av.open(str(path), "w", format=form, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.time_base = 1 / Fraction(rate)
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for index, packet in enumerate(_encoded(stream, pictures, times, 1 / Fraction(rate))):
            changed = change(index, packet)
            if changed is not None:
                container.mux(changed)
    return path


def _encoded(
    stream: av.VideoStream, pictures: Sequence[np.ndarray], times: Sequence[int] | None, time_base: Fraction
) -> Iterator[av.Packet]:
    for i, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = (times[i] if times else i), time_base
        yield from stream.encode(frame)
    yield from stream.encode(None)


def with_payload(packet: av.Packet, payload: bytes) -> av.Packet:
    """The same packet with other contents."""
    other = av.Packet(payload)
    other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
    other.stream, other.is_keyframe = packet.stream, packet.is_keyframe
    return other


def set_disposition(stream: av.VideoStream, disposition: int) -> None:
    try:
        stream.disposition = av.stream.Disposition(disposition)
    except TypeError:
        pytest.skip("this PyAV cannot set a disposition")


def write_sound(path: Path, cover: bool = False) -> Path:
    """A moment of silence, with a cover picture if wanted."""
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=44100)
        if cover:
            art = container.add_stream("png", rate=1)
            art.width = art.height = SIDE
            art.pix_fmt = "rgb24"
            set_disposition(art, int(av.stream.Disposition.attached_pic.value))
            picture = av.VideoFrame.from_ndarray(numbered_picture(1), format="rgb24")
            picture.pts = 0
            container.mux([*art.encode(picture), *art.encode(None)])
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        silence.sample_rate, silence.pts = 44100, 0
        container.mux([*sound.encode(silence), *sound.encode(None)])
    return path
