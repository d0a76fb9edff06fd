"""Write pictures as a video file, the same bytes every time."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from sfexport.artifacts.atomic import new_file
from sfexport.errors import InputError


def write_frames(path: Path, frames: Iterator[np.ndarray], fps: int, size: tuple[int, int]) -> None:
    """Encode pictures, uint8 RGB [height, width, 3], as a video file; the file appears once it is complete.

    H.264 where the installed PyAV can encode it, MPEG-4 part 2 otherwise; yuv420p, a key frame every second. The
    container follows the file name (.mp4, .mkv, ...).

    Raises:
        InputError: the file type is unknown, or the path cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as draft:
            _encode(draft, fps, size, frames)
    except (OSError, ValueError, av.FFmpegError) as error:  # ValueError: no known container or not for this codec
        raise InputError(
            f"The demo clip cannot be written to {path}: {error}.", "Choose a writable path that ends in .mp4."
        ) from error


def _encoder() -> tuple[str, dict[str, str]]:
    try:
        av.Codec("libx264", "w")
    except ValueError:  # PyAV's UnknownCodecError: this build has no x264
        return "mpeg4", {"b": "2000000"}
    # Without lookahead and B-frames: x264's lookahead was seen to choose differently from run to run on small pictures.
    return "libx264", {"crf": "20", "preset": "medium", "sc_threshold": "0", "rc-lookahead": "0", "bf": "0"}


def _encode(file: Path, fps: int, size: tuple[int, int], frames: Iterator[np.ndarray]) -> None:
    codec, options = _encoder()
    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps, options={**options, "g": str(fps)})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # several threads split the work differently from machine to machine
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
