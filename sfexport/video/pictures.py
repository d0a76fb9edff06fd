"""Open picture files, convert their pixels to 8-bit RGB, and turn frames upright."""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from sfexport.errors import VideoError
from sfexport.video.files import VideoInfo
from sfexport.video.picture_streams import format_of_stream, heif_is_tiled, webp_seconds

# Formats that Pillow knows by their first bytes. FFmpeg opens those that this Pillow cannot (AVIF before 11.3).
STILL_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM", "ICO", "AVIF")
TGA_SUFFIXES = (".tga", ".vda", ".icb", ".vst")  # TGA is known by its name alone
# Animated formats that FFmpeg decodes, and its names of them (None: FFmpeg finds out).
ANIMATED_FORMATS = {"GIF": "gif", "PNG": "apng", "AVIF": None}
# Exceptions that Pillow raises for damaged pictures, including those that its plugins do not intend.
DAMAGE = (OSError, ValueError, SyntaxError, struct.error, EOFError, LookupError, TypeError, OverflowError)
MAX_PIXELS = 178_956_970  # above it Pillow raises DecompressionBombError
SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")  # formats whose 16-bit greys Pillow has opened in mode I
EXIF_ORIENTATION = 0x0112
REDUCED_PAGE, PAGE_KIND, WHITE_IS_ZERO, PHOTOMETRIC, SAMPLE_BITS = 1, 254, 0, 262, 258  # TIFF's tags and values


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


class AnimatedPicture:
    """An animated WebP, which FFmpeg's releases do not all decode, as a clip."""

    def __init__(self, path: Path, shown: Path) -> None:
        """Open the animation and decode its first frame. Raises VideoError if it is damaged."""
        self.frames_decoded, self._shown = 0, shown
        self._at, self._pixels = -1, np.empty(0)
        opened: Any = Image.open(path)  # WebP's class, which has n_frames
        self._image = opened
        try:
            count, seconds = self._image.n_frames, webp_seconds(path)
            height, width = self.frame(0).shape[:2]
        except BaseException:
            self.close()
            raise
        rate = count / seconds if seconds else 25.0
        self.info = VideoInfo(shown, count, rate, width, height, count / rate, 0)

    def frame(self, index: int) -> np.ndarray:
        if index != self._at:
            with _damage_explained(self._shown):
                self._image.seek(index)
                self._pixels = rgb_pixels(self._image, f"'{self._shown}'")
            self._at = index
            self.frames_decoded += 1
        return self._pixels

    def close(self) -> None:
        self._image.close()


def open_picture(path: Path, shown: Path | None = None) -> Still | AnimatedPicture | str | None:
    """Open the picture or animation in a file, by its content.

    A picture is one image without a duration, in whatever format; several of one size in a row are a clip.

    Args:
        shown: path for messages instead of `path`.

    Returns:
        The open picture; or FFmpeg's name of the format of a clip; or None if FFmpeg should find out the format.

    Raises:
        VideoError: it is a picture, but a damaged, ambiguous or unreasonably large one.
    """
    shown = shown or path
    image = identify(path, shown)
    if image is None:
        if heif_is_tiled(path):
            raise VideoError(
                f"'{shown}' is a picture in tiles (HEIC or AVIF), which is not put together here.",
                "Save it as JPEG or PNG.",
            )
        return None
    with image:
        # MPO, which phones write as .jpg, is one picture and its smaller copies; an icon is one in several sizes.
        if image.format in ANIMATED_FORMATS or image.format in ("WEBP", "TIFF"):
            with _damage_explained(shown):
                is_animated = getattr(image, "is_animated", False)
            if is_animated and isinstance(image, TiffImageFile):
                _refuse_pages(image, shown)
            elif is_animated:
                if image.format in ANIMATED_FORMATS:
                    return ANIMATED_FORMATS[image.format]
                return AnimatedPicture(path, shown)
        stream = None if image.format == "MPO" else format_of_stream(path, image)
        if stream is not None:
            return stream
        with _damage_explained(shown):
            return Still(shown, rgb_pixels(image, f"'{shown}'"))


def identify(path: Path, shown: Path) -> Image.Image | None:
    """Open the image in a file without decoding it; None if Pillow cannot open it.

    Raises:
        VideoError: the image has too many pixels.
    """
    Image.init()
    formats = [name for name in STILL_FORMATS if name in Image.OPEN]
    if path.suffix.lower() in TGA_SUFFIXES:
        formats.append("TGA")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about sizes and odd metadata; the size is checked below
            image = Image.open(path, formats=formats)
    except Image.DecompressionBombError as error:
        raise VideoError(f"'{shown}' is too large a picture to open: {error}", "Scale it down first.") from error
    except DAMAGE:
        return None
    if math.prod(image.size) > MAX_PIXELS:
        image.close()
        raise VideoError(f"'{shown}' is too large a picture to open: {image.size} pixels.", "Scale it down first.")
    return image


def rgb_pixels(image: Image.Image, name: str) -> np.ndarray:
    """Convert an image to uint8 RGB [H, W, 3], upright by its EXIF tag, without transparency; 16 bits keep the upper 8.

    Args:
        name: name of the image in messages.

    Raises:
        VideoError: the values have no defined range, or Pillow cannot convert the colours.
    """
    kind, shift, is_negative = image.format, _grey_shift(image), _is_negative(image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("F", "I") and shift is None:
        raise VideoError(
            f"{name} has {'floating-point' if upright.mode == 'F' else '32-bit'} pixels (mode {upright.mode}), whose "
            "range for display is not defined.",
            "Scale the values to 0..255 and save it with 8 bits per channel.",
        )
    if shift is not None:
        grey = np.asarray(upright).astype(np.int64) >> shift
        grey = np.clip(255 - grey if is_negative else grey, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if upright.mode == "LAB":
        raise VideoError(f"{name} has CIE L*a*b* colours ({kind}).", "Convert it to RGB first.")
    return np.array(upright.convert("RGB"))


def _grey_shift(image: Image.Image) -> int | None:
    """Return how many bits beyond 8 the greys have; None for other modes, and if it is unknown."""
    if image.mode.startswith("I;16"):
        bits = _tiff_tag(image, SAMPLE_BITS, 16)
        return max(bits[0] if isinstance(bits, tuple) else bits, 8) - 8
    return 8 if image.mode == "I" and image.format in SIXTEEN_BITS else None


def _is_negative(image: Image.Image) -> bool:
    """Return whether 0 is white in a TIFF of 16 bits, which Pillow inverts for 8 bits only."""
    return image.mode.startswith("I;16") and _tiff_tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO


def _tiff_tag(image: Image.Image, tag: int, default: int) -> int | tuple[int, ...]:
    if not isinstance(image, TiffImageFile):
        return default
    value: int | tuple[int, ...] = image.tag_v2.get(tag, default)
    return value


def _refuse_pages(image: TiffImageFile, shown: Path) -> None:
    """Raise VideoError for a TIFF of several pages; smaller copies of its first page do not count."""
    with _damage_explained(shown):
        pages = 0
        for page in range(image.n_frames):
            image.seek(page)
            pages += not image.tag_v2.get(PAGE_KIND, 0) & REDUCED_PAGE
        image.seek(0)
    if pages > 1:
        raise VideoError(
            f"'{shown}' is a TIFF of {pages} pages, which may be frames or not.",
            "Save the wanted page, or all as pictures in a folder and pass the folder.",
        )


@contextmanager
def _damage_explained(shown: Path) -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError as error:
        raise VideoError(f"'{shown}' is too large a picture to open: {error}", "Scale it down first.") from error
    except MemoryError as error:
        raise VideoError(f"'{shown}' is too large a picture for the memory.", "Scale it down first.") from error
    except DAMAGE as error:
        raise VideoError(f"'{shown}' is a damaged picture.", "Save or copy it again.") from error


@dataclass(frozen=True)
class Orientation:
    """How a stored frame is turned upright: by a transposition, then mirrorings, without interpolation.

    Attributes:
        transpose: rows become columns.
        flip_x: mirror left-right, after the transposition.
        flip_y: mirror top-bottom, after the transposition.
        degrees: the clockwise turn, 0, 90, 180 or 270; for a mirror image the turn that its display matrix contains.
    """

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False
    degrees: int = 0

    @classmethod
    def from_display_matrix(cls, data: bytes) -> Orientation:
        """Read FFmpeg's display matrix: 9 native int32, row by row; x' = a x + c y, y' = b x + d y, y downwards.

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

    @classmethod
    def from_exif(cls, tag: int) -> Orientation:
        """Return the orientation of EXIF's tag 0x0112, 1..8; upright for other values."""
        return EXIF_ORIENTATIONS.get(tag, cls())

    @classmethod
    def from_turn(cls, degrees: float) -> Orientation:
        """Return the orientation of a clockwise turn, rounded to quarter turns."""
        quarter = round(degrees / 90) % 4
        return (cls(), EXIF_ORIENTATIONS[6], EXIF_ORIENTATIONS[3], EXIF_ORIENTATIONS[8])[quarter]

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height of the upright frame."""
        return (height, width) if self.transpose else (width, height)

    def upright(self, frame: np.ndarray) -> np.ndarray:
        """Turn a stored frame upright: [H, W, 3] -> [H', W', 3], contiguous."""
        if self.transpose:
            frame = frame.transpose(1, 0, 2)
        if self.flip_x:
            frame = frame[:, ::-1]
        if self.flip_y:
            frame = frame[::-1]
        return np.ascontiguousarray(frame)


EXIF_ORIENTATIONS = {
    2: Orientation(False, True, False, 180),
    3: Orientation(False, True, True, 180),
    4: Orientation(False, False, True, 0),
    5: Orientation(True, False, False, 90),
    6: Orientation(True, True, False, 90),
    7: Orientation(True, True, True, 270),
    8: Orientation(True, False, True, 270),
}
