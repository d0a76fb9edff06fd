"""Still pictures, and turning decoded frames upright.

Imports numpy, PIL, sfexport.errors and its neighbour files.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sfexport.errors import VideoError
from sfexport.video.files import VideoInfo

STILL_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


class Still:
    """A picture as a clip of one frame."""

    def __init__(self, path: Path, picture: np.ndarray) -> None:
        height, width = picture.shape[:2]
        self.info = VideoInfo(path, 1, 1.0, width, height, 0.0, 0, is_picture=True)
        self.frames_decoded = 1
        self._picture = picture

    def frame(self, index: int) -> np.ndarray:
        return self._picture

    def close(self) -> None:
        pass


def read_still(path: Path) -> np.ndarray | None:
    """The picture as uint8 RGB [H, W, 3], turned upright by its EXIF tag; None where the file is no still picture.

    Raises:
        VideoError: it is a picture, but a damaged or unreasonably large one.
    """
    try:
        image = Image.open(path, formats=STILL_FORMATS)
    except Image.DecompressionBombError as error:
        raise VideoError(f"'{path}' is too large a picture to open.", "Scale it down first.") from error
    except (OSError, ValueError, SyntaxError):
        return None
    with image:
        # MPO, which phones write as .jpg, is one picture and its smaller copies; PIL calls that animated too.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            return None
        try:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, ValueError, SyntaxError, struct.error) as error:
            raise VideoError(f"'{path}' is a damaged picture.", "Save or copy it again.") from error


@dataclass(frozen=True)
class Orientation:
    """What brings a stored frame upright: a transposition, then mirrorings, all without a change of pixels.

    Attributes:
        transpose: rows become columns.
        flip_x, flip_y: mirror left-right, top-bottom (after the transposition).
        degrees: the same as clockwise quarter turns, 0, 90, 180 or 270; a mirror image is counted as the turn
            that its display matrix contains.
    """

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False
    degrees: int = 0

    @classmethod
    def from_display_matrix(cls, data: bytes) -> Orientation:
        """FFmpeg's display matrix: 9 native int32, row by row; x' = a x + c y, y' = b x + d y, y downwards.

        Angles between quarter turns are rounded to the nearest one.
        """
        if len(data) != 36:
            return cls()
        a, b, _, c, d, *_ = struct.unpack("=9i", data)
        if not (a or b) or not (c or d):
            return cls()
        degrees = round(math.degrees(math.atan2(b, a)) / 90) * 90 % 360
        if abs(a) >= abs(b):
            return cls(False, a < 0, d < 0, degrees)
        return cls(True, c < 0, b < 0, degrees)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height once upright."""
        return (height, width) if self.transpose else (width, height)

    def upright(self, frame: np.ndarray) -> np.ndarray:
        """[H, W, 3] as stored -> [H', W', 3] upright, contiguous."""
        if self.transpose:
            frame = frame.transpose(1, 0, 2)
        if self.flip_x:
            frame = frame[:, ::-1]
        if self.flip_y:
            frame = frame[::-1]
        return np.ascontiguousarray(frame)
