"""Kinds of damaged clips. The independent reading is FFmpeg's decoder through PyAV, from the beginning."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import av
import numpy as np

from fuzz.kinds import Case, Expect, Kind, Wrong, call
from sfexport.video.decoding import Video

REFUSED, ANSWERED, EITHER = Expect.REFUSED, Expect.ANSWERED, Expect.EITHER


COUNT, WIDTH, HEIGHT = 24, 64, 48
# Container -> codecs tried in turn; PyAV's wheels have them all.
CONTAINERS = {
    "mp4": "libx264",
    "mov": "mpeg4",
    "mkv": "libx264",
    "webm": "libvpx",
    "avi": "mpeg4",
    "ts": "libx264",
    "mpg": "mpeg2video",
    "flv": "flv",
    "3gp": "mpeg4",
    "wmv": "msmpeg4",
    "nut": "ffv1",
    "gif": "gif",
    "mjpeg": "mjpeg",
    "y4m": "wrapped_avframe",
    "m4v": "mpeg4",
    "h264": "libx264",
    "m2v": "mpeg2video",
    "asf": "wmv2",
    "apng": "apng",
}
PIXELS = {"gif": "rgb8", "mjpeg": "yuvj420p", "apng": "rgb24"}


def numbered_clip(path: Path, codec: str, count: int = COUNT) -> None:
    """A clip whose frames differ: a bright bar and the frame's number in bits, on noise that moves."""
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        stream.codec_context.gop_size = 8
        stream.codec_context.thread_count = 1
        for number in range(count):
            picture = np.roll(noise, number, axis=1)
            picture[:, 2 * number : 2 * number + 4] = 230
            for bit in range(5):
                picture[40:48, 8 * bit : 8 * bit + 8] = 220 if number >> bit & 1 else 20
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def in_order(path: Path, threads: str = "NONE") -> list[np.ndarray]:
    """All frames that FFmpeg's decoder gives from the beginning; damaged packets are skipped, as ffmpeg does."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_type = threads
        for packet in container.demux(stream):
            try:
                frames += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
            except av.error.FFmpegError:
                continue
    return frames


def check_clip(case: Case, path: Path, is_whole: bool = False, original: Path | None = None) -> None:
    """Frames at random equal frames in order, and FFmpeg gives them too; or a refusal.

    Args:
        original: the same bytes under the name that FFmpeg expects.
        is_whole: each of FFmpeg's is there, at its place. In a damaged clip a place may be taken by its neighbour.
    """
    with call(Video.open, path) as video:
        count = video.info.frame_count
        if not 0 < count < 100_000:
            raise Wrong(f"{count} frames")
        indices = list(range(min(count, 60)))
        ordered = [frame.copy() for frame in call(lambda: list(video.frames(indices)))]
    shuffled = case.rng.sample(indices, len(indices))
    with call(Video.open, path) as video:
        for index, frame in zip(shuffled, call(lambda: list(map(np.copy, video.frames(shuffled)))), strict=True):
            if not np.array_equal(frame, ordered[index]):
                raise Wrong(f"frame {index} differs when asked for at random ({count} frames)")
    try:
        theirs = in_order(original or path)
    except (av.error.FFmpegError, AttributeError, ValueError):
        if is_whole:
            raise
        return
    if is_whole and len(theirs) != count:
        raise Wrong(f"{count} frames, where FFmpeg reads {len(theirs)}")
    known = {frame.tobytes() for frame in theirs}
    if not is_whole:  # with threads FFmpeg covers damage up in another way
        known |= {frame.tobytes() for frame in in_order(original or path, "AUTO")}
    for index, ours in enumerate(ordered):
        if ours.tobytes() not in known or (is_whole and not np.array_equal(ours, theirs[index])):
            raise Wrong(f"frame {index} of {count} is not FFmpeg's")


def _truncate(raw: bytearray, rng) -> bytearray:
    return raw[: rng.randrange(1, len(raw))]


def _zero_block(raw: bytearray, rng) -> bytearray:
    start = rng.randrange(len(raw))
    raw[start : start + 256] = bytes(len(raw[start : start + 256]))
    return raw


def _flip_bits(raw: bytearray, rng) -> bytearray:
    for _ in range(8):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return raw


def _swap_blocks(raw: bytearray, rng) -> bytearray:
    size = max(1, len(raw) // 10)
    a, b = (rng.randrange(len(raw) - size + 1) for _ in range(2))
    raw[a : a + size], raw[b : b + size] = raw[b : b + size], raw[a : a + size]
    return raw[: len(raw)]


def _remove_block(raw: bytearray, rng) -> bytearray:
    start = rng.randrange(len(raw))
    del raw[start : start + 200]
    return raw or bytearray(b"\0")


def _repeat(raw: bytearray, rng) -> bytearray:
    return raw + raw[rng.randrange(len(raw)) :]


def _garbage_before(raw: bytearray, rng) -> bytearray:
    return bytearray(rng.randbytes(300)) + raw


def _garbage_after(raw: bytearray, rng) -> bytearray:
    return raw + rng.randbytes(300)


def _head_only(raw: bytearray, rng) -> bytearray:
    return raw[:64]


def _ones_in_the_header(raw: bytearray, rng) -> bytearray:
    start = rng.randrange(min(400, len(raw)))
    raw[start : start + 4] = b"\xff" * len(raw[start : start + 4])
    return raw


DAMAGE = {
    "truncated": _truncate,
    "a block zeroed": _zero_block,
    "bits flipped": _flip_bits,
    "blocks swapped": _swap_blocks,
    "a block removed": _remove_block,
    "its end repeated": _repeat,
    "garbage before": _garbage_before,
    "garbage after": _garbage_after,
    "its first 64 bytes": _head_only,
    "0xffffffff in its header": _ones_in_the_header,
}


def _clip_kinds() -> Iterator[Kind]:
    for container, codec in CONTAINERS.items():
        yield Kind(f"{container} as it is", "media", partial(_whole, container=container, codec=codec), ANSWERED)
        for name, damage in DAMAGE.items():
            act = partial(_damaged, container=container, codec=codec, damage=damage)
            yield Kind(f"{container}, {name}", "media", act, drawn=True)
        act = partial(_renamed, container=container, codec=codec)
        yield Kind(f"{container} with the name of another container", "media", act, drawn=True)


def _make(case: Case, container: str, codec: str) -> Path:
    """The clip, made once in the base and copied."""
    made = case.base / f"made.{container}"
    if not made.exists():
        draft = case.base / f".{os.getpid()}.{container}"
        numbered_clip(draft, codec)
        draft.rename(made)
    path = case.room / f"clip.{container}"
    path.write_bytes(made.read_bytes())
    return path


def _whole(case: Case, container: str, codec: str) -> None:
    check_clip(case, _make(case, container, codec), is_whole=True)


def _damaged(case: Case, container: str, codec: str, damage: Callable[..., bytearray]) -> None:
    path = _make(case, container, codec)
    path.write_bytes(damage(bytearray(path.read_bytes()), case.rng))
    check_clip(case, path)


def _renamed(case: Case, container: str, codec: str) -> None:
    path = _make(case, container, codec)
    suffix = case.rng.choice([".mp4", ".png", ".txt", ".m3u8", ".avi", ".wav", "", ".jpg", ".webp"])
    other = path.with_suffix(suffix)
    if other != path:
        other.write_bytes(path.read_bytes())
    check_clip(case, other, is_whole=True, original=path)


KINDS = [*_clip_kinds()]
