"""Read parts of picture files that Pillow does not: further images after the first, tiles, durations."""

from __future__ import annotations

import io
import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path

from PIL import Image

# A marker in compressed JPEG data: not a stuffed zero, a restart marker or padding.
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
PNG_START = b"\x89PNG\r\n\x1a\n"
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif", b"mif2", b"miaf")
STREAM_SUFFIXES = (".mjpeg", ".mjpg")  # always a clip, even if the data after the first image is damaged
PADDING = 1 << 16  # bytes that may lie between two images
HEAD = 1 << 20  # bytes in which a HEIF file lists its items


def format_of_stream(path: Path, image: Image.Image) -> str | None:
    """Return FFmpeg's name of the format if more images of the same size follow the first one, as some cameras write.

    A picture followed by smaller copies (previews) or a film (motion photos) is still a picture: None.
    """
    reader = READERS.get(image.format or "")
    if reader is None or image.format is None:
        return None
    end_of, start, name = reader
    by_name = name if path.suffix.lower() in STREAM_SUFFIXES else None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            end = end_of(data, image)
        except (IndexError, struct.error):
            return by_name
        if end is None or end >= len(data):
            return by_name
        padding = data[end : end + PADDING]
        end += len(padding) - len(padding.lstrip(b"\0\n\r"))
        if data[end : end + len(start)] != start:
            return by_name
        try:
            with Image.open(io.BytesIO(data[end:]), formats=(image.format,)) as second:
                is_same = second.size == image.size
        except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):
            return by_name
    if name == "":
        name = {"1": "pbm_pipe", "L": "pgm_pipe", "I": "pgm_pipe"}.get(image.mode[:1], "ppm_pipe")
    return name if is_same else None


def _jpeg_end(data: mmap.mmap, image: Image.Image) -> int | None:
    at = 2
    while at + 1 < len(data):
        if data[at] != 0xFF:
            return None
        kind = data[at + 1]
        if kind == 0xFF:  # padding
            at += 1
        elif kind == 0xD9:
            return at + 2
        elif kind == 0x01 or 0xD0 <= kind <= 0xD7:
            at += 2
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
            if kind == 0xDA:  # compressed data up to the next marker
                marker = JPEG_MARKER.search(data, at)
                if marker is None:
                    return None
                at = marker.start()
    return None


def _png_end(data: mmap.mmap, image: Image.Image) -> int | None:
    at = len(PNG_START)
    size: int
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        at += 12 + size
        if kind == b"IEND":
            return at
    return None


def _bmp_end(data: mmap.mmap, image: Image.Image) -> int | None:
    size: int = struct.unpack_from("<I", data, 2)[0]
    return size or None


def _webp_end(data: mmap.mmap, image: Image.Image) -> int | None:
    size: int = struct.unpack_from("<I", data, 4)[0]
    return 8 + size + size % 2


def _pnm_end(data: mmap.mmap, image: Image.Image) -> int | None:
    """Return where the first image of a binary kind (P4, P5 or P6) ends."""
    header = re.match(rb"P([456])(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)", data)
    if header is None:
        return None
    kind, width, height = (int(number) for number in header.groups())
    if kind == 4:
        return header.end() + 1 + (width + 7) // 8 * height
    depth = re.compile(rb"(?:\s|#[^\n]*\n)+(\d+)\s").match(data, header.end())
    if depth is None:
        return None
    return depth.end() + width * height * (3 if kind == 6 else 1) * (2 if int(depth.group(1)) > 255 else 1)


# Pillow's format -> where the first image ends, how another begins, FFmpeg's name of a stream of them.
READERS: dict[str, tuple[Callable[[mmap.mmap, Image.Image], int | None], bytes, str]] = {
    "JPEG": (_jpeg_end, b"\xff\xd8\xff", "mjpeg"),
    "PNG": (_png_end, PNG_START, "png_pipe"),
    "BMP": (_bmp_end, b"BM", "bmp_pipe"),
    "WEBP": (_webp_end, b"RIFF", "webp_pipe"),
    "PPM": (_pnm_end, b"P", ""),
}


def heif_is_tiled(path: Path) -> bool:
    """Return whether the file is a HEIF or AVIF picture of several tiles, which FFmpeg decodes one by one."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS and bool(re.search(rb"infe.{8}(grid|iovl)", head, re.S))


def webp_seconds(path: Path) -> float:
    """Return the duration of an animated WebP, all frames together."""
    milliseconds, at = 0, 12
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while at + 8 <= len(data):
            kind, size = struct.unpack_from("<4sI", data, at)
            if kind == b"ANMF" and at + 24 <= len(data):
                milliseconds += int.from_bytes(data[at + 20 : at + 23], "little")
            at += 8 + size + size % 2
    return milliseconds / 1000
