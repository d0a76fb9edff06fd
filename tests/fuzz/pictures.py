"""Kinds of pictures. The independent reading is Pillow."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from fuzz.clips import DAMAGE
from fuzz.kinds import Case, Expect, Kind, Unexpected, Wrong, call
from sfexport.video.decoding import Video

REFUSED, ANSWERED, EITHER = Expect.REFUSED, Expect.ANSWERED, Expect.EITHER


def _drawn_picture() -> Image.Image:
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))
    return Image.fromarray(np.stack([ramp, ramp[:, ::-1], np.full_like(ramp, 90)], 2))


def _expect_picture(case: Case, path: Path, wanted: np.ndarray, tolerance: float = 0.6) -> None:
    with call(Video.open, path) as video:
        info, frame = video.info, call(lambda: list(video.frames([0])))[0]
    if not info.is_picture or info.frame_count != 1:
        raise Wrong(f"not taken for a picture: {info}")
    if frame.shape != wanted.shape or np.abs(frame.astype(float) - wanted).max() > tolerance:
        raise Wrong(
            f"pixels of shape {frame.shape}, mean {frame.mean():.2f}; right is {wanted.shape}, {wanted.mean():.2f}"
        )


def _mode(case: Case, mode: str, suffix: str) -> None:
    picture = _drawn_picture().convert(mode)
    path = case.room / f"picture.{suffix}"
    picture.save(path, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as image:
        wanted = np.asarray(image.convert("RGB"))
    _expect_picture(case, path, wanted, tolerance=2.0)


def _grey16(case: Case, mode: str, suffix: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1))
    values = {"I;16": ramp, "I": ramp.astype(np.int32), "F": (ramp / 65535).astype(np.float32)}[mode]
    path = case.room / f"picture.{suffix}"
    Image.fromarray(values).save(path)
    wanted = np.repeat((ramp / 257.0)[:, :, None], 3, 2)
    _expect_picture(case, path, wanted, tolerance=1.5)


def _bomb(case: Case, width: int, height: int, kind: str) -> None:
    """A header that promises far more pixels than there are bytes."""
    import zlib

    path = case.room / f"picture.{kind}"
    if kind == "png":

        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
        rows = zlib.compress(bytes(1000), 9)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    elif kind == "bmp":
        path.write_bytes(
            b"BM"
            + struct.pack("<IHHI", 54, 0, 0, 54)
            + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        )
    elif kind == "gif":
        path.write_bytes(b"GIF89a" + struct.pack("<HHBBB", min(width, 65535), min(height, 65535), 0, 0, 0) + b";")
    else:
        path.write_bytes(f"P6\n{width} {height}\n255\n".encode() + bytes(30))
    with call(Video.open, path) as video:
        call(lambda: list(video.frames([0])))


def _thin(case: Case, width: int, height: int) -> None:
    """Through the whole pipeline: only what is kept may be computed."""
    import resource

    import sfexport

    path = case.room / "thin.png"
    Image.new("RGB", (width, height), (200, 10, 60)).save(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipeline = call(sfexport.load, case.base / "engines")
    pixels, _ = call(pipeline.read_frames, path, 1, "linspace")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > 600_000:
        raise Unexpected(f"{grown / 1e6:.1f} GB for a picture of {width} x {height}")
    if not np.isfinite(pixels).all():
        raise Wrong("pixels that are not numbers")


def _animated(case: Case, suffix: str) -> None:
    """Three pictures of one colour each: three frames, or a refusal."""
    path = case.room / f"moving.{suffix}"
    pictures = [Image.new("RGB", (32, 24), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if suffix == "webp" else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=200, loop=0, **options)
    with call(Video.open, path) as video:
        count = video.info.frame_count
        frames = call(lambda: [frame.copy() for frame in video.frames(list(range(count)))])
    colours = [int(frame.reshape(-1, 3).mean(0).argmax()) for frame in frames]
    if colours != [0, 1, 2]:
        raise Wrong(f"{count} frames of the colours {colours}")


def _one_frame(case: Case, suffix: str) -> None:
    """The same picture in any format is a picture."""
    path = case.room / f"one.{suffix}"
    Image.new("RGB", (32, 32), (200, 10, 60)).save(path)
    wanted = np.full((32, 32, 3), (200, 10, 60))
    _expect_picture(case, path, wanted, tolerance=8)


def _exif(case: Case, orientation: int, suffix: str) -> None:
    path = case.room / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    _drawn_picture().save(path, exif=exif.tobytes())
    from PIL import ImageOps

    with Image.open(path) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    _expect_picture(case, path, wanted)


def _bad_exif(case: Case) -> None:
    path = case.room / "odd.jpg"
    _drawn_picture().save(path, exif=b"Exif\0\0MM\0*" + case.rng.randbytes(60))
    with call(Video.open, path) as video:
        frame = call(lambda: list(video.frames([0])))[0]
    if sorted(frame.shape) != sorted((48, 64, 3)):
        raise Wrong(f"pixels of shape {frame.shape}")


def _damaged_picture(case: Case, suffix: str, damage: Callable[..., bytearray]) -> None:
    path = case.room / f"picture.{suffix}"
    _drawn_picture().save(path)
    path.write_bytes(damage(bytearray(path.read_bytes()), case.rng))
    with call(Video.open, path) as video:
        frame = call(lambda: list(video.frames([0])))[0]
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise Wrong(f"a frame {frame.dtype} {frame.shape}")


def _picture_kinds() -> Iterator[Kind]:
    modes = {
        "png": ("1", "L", "LA", "P", "RGB", "RGBA"),
        "jpg": ("L", "RGB", "CMYK"),
        "tif": ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"),
        "bmp": ("1", "L", "P", "RGB"),
        "webp": ("L", "RGB", "RGBA"),
        "gif": ("L", "P", "RGB"),
        "tga": ("L", "P", "RGB", "RGBA"),
        "ppm": ("1", "L", "RGB"),
    }
    for suffix, names in modes.items():
        for mode in names:
            yield Kind(f"a {suffix} picture in {mode}", "media", partial(_mode, mode=mode, suffix=suffix))
    for mode, suffix in (("I;16", "png"), ("I;16", "tif"), ("I", "tif"), ("F", "tif"), ("I;16", "ppm")):
        yield Kind(f"a 16-bit ramp in {mode} as {suffix}", "media", partial(_grey16, mode=mode, suffix=suffix))
    for width, height in (
        (30_000, 30_000),
        (65_500, 65_500),
        (2**31 - 1, 1),
        (1, 2**31 - 1),
        (0, 5),
        (2**31 - 1, 2**31 - 1),
    ):
        for kind in ("png", "bmp", "gif", "ppm"):
            act = partial(_bomb, width=width, height=height, kind=kind)
            yield Kind(f"a {kind} header of {width} x {height}", "media", act, timeout=30)
    for width, height in ((1, 2000), (2000, 1), (16, 4000), (4000, 16), (1, 60_000), (60_000, 1), (1, 1), (3, 20_000)):
        yield Kind(f"a picture of {width} x {height}", "media", partial(_thin, width=width, height=height))
    for suffix in ("gif", "webp", "png", "tif"):
        yield Kind(f"an animated {suffix}", "media", partial(_animated, suffix=suffix))
    known = Image.registered_extensions()  # older versions of Pillow write no AVIF
    for suffix in ("png", "gif", "webp", "bmp", "jpg", "ppm", "tga", "tif", "jp2", "avif"):
        if known.get(f".{suffix}") not in Image.SAVE:
            continue
        yield Kind(f"one picture as {suffix}", "media", partial(_one_frame, suffix=suffix))
        if suffix not in ("avif",):
            for name, damage in DAMAGE.items():
                act = partial(_damaged_picture, suffix=suffix, damage=damage)
                yield Kind(f"a {suffix} picture, {name}", "media", act, drawn=True)
    for orientation in (*range(10), 65535):
        for suffix in ("jpg", "png", "webp"):
            yield Kind(
                f"EXIF orientation {orientation} in {suffix}",
                "media",
                partial(_exif, orientation=orientation, suffix=suffix),
            )
    yield Kind("EXIF of random bytes", "media", _bad_exif, drawn=True)


KINDS = [*_picture_kinds()]
