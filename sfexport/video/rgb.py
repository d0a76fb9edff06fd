"""Convert decoded frames to RGB pixels as the ffmpeg program does, and find out how they are turned."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from sfexport.errors import VideoError
from sfexport.video.pictures import Orientation


class RgbConverter:
    """Converts frames through FFmpeg's filter graph, with the ffmpeg program's rounding, chroma and colour matrix.

    `VideoFrame.to_ndarray` differs from it if the chroma is interpolated (10 bits, 4:1:0).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._layout: tuple[object, ...] = ()

    def convert(self, frame: av.VideoFrame) -> np.ndarray:
        """Convert a frame to uint8 RGB [height, width, 3], as stored (not turned upright).

        Raises:
            VideoError: the frame's values are floating-point numbers, whose range is not defined.
        """
        name = frame.format.name
        if "f32" in name or "f16" in name:
            raise VideoError(
                f"'{self._path}' has floating-point pixels ({name}), whose range for display is not defined.",
                "Convert it to 8 bits per channel first.",
            )
        layout = (name, frame.width, frame.height, int(frame.colorspace), int(frame.color_range))
        if layout != self._layout:
            self._build(frame)
            self._layout = layout
        self._input.push(frame)
        pulled: Any = self._output.pull()
        pixels: np.ndarray = pulled.to_ndarray()
        return pixels

    def _build(self, frame: av.VideoFrame) -> None:
        graph: Any = av.filter.Graph()  # PyAV's annotations lack that a format may be given by its name
        any_base = Fraction(1, 1000)  # the filters do not use times
        self._input = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format.name, time_base=any_base
        )
        to_rgb, self._output = graph.add("format", "rgb24"), graph.add("buffersink")
        self._input.link_to(to_rgb)
        to_rgb.link_to(self._output)
        graph.configure()
        self._graph = graph


def stored_orientation(frame: av.VideoFrame, payload: bytes) -> Orientation:
    """Return how a frame's display matrix, or the EXIF tag in its packet's `payload`, turns it, as ffmpeg does."""
    try:
        side_data: Any = frame.side_data
        matrix = side_data.get("DISPLAYMATRIX")
        return Orientation.from_display_matrix(bytes(matrix) if matrix else b"")
    except ValueError:
        # PyAV cannot read any side data if it does not know one kind, such as EXIF.
        pass
    try:
        with Image.open(io.BytesIO(payload), formats=("JPEG", "PNG", "WEBP", "TIFF")) as image:
            return Orientation.from_exif(image.getexif().get(0x0112, 1))
    except (OSError, ValueError, SyntaxError):
        return Orientation.from_turn(-frame.rotation)
