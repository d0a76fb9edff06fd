"""Pictures: the same one in every format, 16 bits, streams of pictures, animations, folders; and what is refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_clips import numbered_picture, read_number, write_clip
from PIL import Image, features

from sfexport.errors import InputError, VideoError
from sfexport.video.arrays import MemoryFrames
from sfexport.video.decoding import Video

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257  # 16 bits, from 0 to 65535
SMOOTH = np.linspace(30, 220, 64)[:, None, None] + np.linspace(-20, 20, 64)[None, :, None] + np.array([0, 5, 10])


def read(path: Path) -> np.ndarray:
    """The one frame of a picture."""
    with Video.open(path) as video:
        info = video.info
        assert (info.frame_count, info.is_picture, info.duration_seconds) == (1, True, 0.0), info
        return next(video.frames([0]))


def in_memory(image: Image.Image) -> np.ndarray:
    return MemoryFrames(image).frame(0)


def numbers_of(path: Path) -> list[int]:
    with Video.open(path) as video:
        assert not video.info.is_picture
        return [read_number(frame) for frame in video.frames(range(video.info.frame_count))]


def refusal(video: Any, fps: float | None = None) -> str:
    with pytest.raises((VideoError, InputError)) as caught, Video.open(video, fps) as opened:
        list(opened.frames(range(opened.info.frame_count)))
    assert caught.value.hint and "\n" not in caught.value.paragraph()
    return str(caught.value)


class TestOneFrameWithoutADurationIsAPicture:
    LOSSLESS = ("png", "bmp", "tif", "ppm", "tga", "webp", "ico", "jp2", "pcx", "sgi", "qoi")

    @pytest.mark.parametrize("suffix", [*LOSSLESS, "gif", "jpg", "avif"])
    def test_in_every_format(self, tmp_path: Path, suffix: str) -> None:
        if suffix == "avif" and not features.check("avif"):
            pytest.skip("this Pillow writes no AVIF")
        picture = np.rint(SMOOTH).astype(np.uint8)
        path, options = tmp_path / f"one.{suffix}", {"lossless": True} if suffix == "webp" else {}
        if suffix == "ico":
            options = {"sizes": [(64, 64)]}
        if suffix == "qoi":
            write_clip(path, frames=[picture], codec="qoi", pix_fmt="rgb24", form="image2pipe")
        else:
            Image.fromarray(picture).save(path, **options)
        frame = read(path)
        if suffix in self.LOSSLESS:
            assert np.array_equal(frame, picture)
        else:
            assert np.abs(frame.astype(int) - picture).mean() < 6

    def test_a_film_of_one_frame_is_a_clip(self, tmp_path: Path) -> None:
        assert numbers_of(write_clip(tmp_path / "one.mp4", frames=[numbered_picture(77)])) == [77]

    def test_what_the_file_is_called_does_not_matter(self, tmp_path: Path) -> None:
        Image.fromarray(numbered_picture(5)).save(tmp_path / "a.gif", "PNG")
        assert read_number(read(tmp_path / "a.gif")) == 5

    def test_a_picture_with_a_preview_or_a_film_behind_it(self, tmp_path: Path) -> None:
        picture, small, film = io.BytesIO(), io.BytesIO(), write_clip(tmp_path / "film.mp4", frames=3)
        Image.fromarray(numbered_picture(9)).save(picture, "JPEG")
        Image.fromarray(numbered_picture(9)).resize((16, 16)).save(small, "JPEG")
        for behind in (small.getvalue(), film.read_bytes(), b"\0" * 100, b"notes"):
            (tmp_path / "a.jpg").write_bytes(picture.getvalue() + behind)
            assert read_number(read(tmp_path / "a.jpg")) == 9

    def test_a_picture_and_its_smaller_copies(self, tmp_path: Path) -> None:
        image = Image.fromarray(numbered_picture(9))
        image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[image.resize((16, 16))])
        assert read_number(read(tmp_path / "a.jpg")) == 9

    def test_a_tiff_with_a_thumbnail(self, tmp_path: Path) -> None:
        image = Image.fromarray(numbered_picture(9))
        image.save(tmp_path / "a.tif", save_all=True, append_images=[image.resize((16, 16))], tiffinfo={254: 0})
        entry = struct.pack("<HHIH", 254, 4, 1, 0)  # what kind of page it is
        data = (tmp_path / "a.tif").read_bytes()
        at = data.rindex(entry)
        assert data.index(entry) < at
        # The second page becomes a reduced copy of another.
        (tmp_path / "a.tif").write_bytes(data[: at + 8] + b"\1" + data[at + 9 :])
        assert read_number(read(tmp_path / "a.tif")) == 9


class TestSeveralPicturesInARow:
    @pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "PPM"])
    @pytest.mark.parametrize("name", ["dump", "dump.jpg", "dump.bin", "dump.mp4"])
    def test_of_one_size_are_a_clip(self, tmp_path: Path, form: str, name: str) -> None:
        file = io.BytesIO()
        for number in range(12):
            Image.fromarray(numbered_picture(number)).save(file, form)
        (tmp_path / name).write_bytes(file.getvalue())
        assert numbers_of(tmp_path / name) == list(range(12))

    @pytest.mark.parametrize("name", ["a.webp", "a.png", "a.gif", "a.avif"])
    def test_animations_are_clips(self, tmp_path: Path, name: str) -> None:
        if name == "a.avif" and not features.check("avif"):
            pytest.skip("this Pillow writes no AVIF")
        pictures = [Image.fromarray(numbered_picture(number)) for number in range(1, 13)]
        more = {"lossless": True} if name == "a.webp" else {}
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=80, **more)
        assert numbers_of(tmp_path / name) == list(range(1, 13))
        with Video.open(tmp_path / name) as video:
            assert [read_number(frame) for frame in video.frames([9, 2, 2, 11, 0])] == [10, 3, 3, 12, 1]
            assert video.info.fps == pytest.approx(12.5, rel=0.01)
            assert video.info.duration_seconds == pytest.approx(0.96, rel=0.1)

    def test_uneven_durations_of_a_webp(self, tmp_path: Path) -> None:
        pictures = [Image.fromarray(numbered_picture(number)) for number in range(3)]
        durations = [100, 300, 600]
        pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=durations)
        with Video.open(tmp_path / "a.webp") as video:
            assert (video.info.fps, video.info.duration_seconds) == (3.0, 1.0)

    def test_a_webp_cut_off(self, tmp_path: Path) -> None:
        pictures = [Image.effect_noise((64, 64), 90).convert("RGB") for _ in range(4)]
        pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:])
        data = (tmp_path / "a.webp").read_bytes()
        (tmp_path / "a.webp").write_bytes(data[: len(data) // 2])
        assert "a.webp" in refusal(tmp_path / "a.webp")

    def test_pages_are_not_frames(self, tmp_path: Path) -> None:
        pages = [Image.fromarray(numbered_picture(number)) for number in range(3)]
        pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
        assert "3 pages" in refusal(tmp_path / "a.tif")


def sixteen_bit_png(path: Path, channels: int) -> None:
    """By hand: Pillow writes no 16-bit RGB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + np.repeat(row, channels).astype(">u2").tobytes() for row in RAMP)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", 16, 16, 16, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


class TestMoreThanEightBits:
    """Pillow's convert("RGB") cuts off at 255; the right values are the upper 8 bits."""

    RIGHT = np.repeat((RAMP >> 8).astype(np.uint8)[:, :, None], 3, axis=2)

    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    def test_png(self, tmp_path: Path, channels: int) -> None:
        sixteen_bit_png(tmp_path / "a.png", channels)
        assert np.array_equal(read(tmp_path / "a.png"), self.RIGHT)
        with Image.open(tmp_path / "a.png") as opened:
            assert np.array_equal(in_memory(opened), self.RIGHT)

    @pytest.mark.parametrize("name", ["a.tif", "a.jp2", "a.pgm"])
    def test_greys(self, tmp_path: Path, name: str) -> None:
        image = Image.fromarray(RAMP)
        if name == "a.pgm":
            (tmp_path / name).write_bytes(b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes())
        else:
            image.save(tmp_path / name, **({"irreversible": False} if name == "a.jp2" else {}))
        assert np.array_equal(read(tmp_path / name), self.RIGHT)

    def test_tiff_where_zero_is_white(self, tmp_path: Path) -> None:
        Image.fromarray(RAMP).save(tmp_path / "a.tif")
        with Image.open(tmp_path / "a.tif") as image:
            at = image.tag_v2[262]
        assert at == 1
        data = (tmp_path / "a.tif").read_bytes()
        entry = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
        assert data.count(entry) == 1
        (tmp_path / "a.tif").write_bytes(data.replace(entry, struct.pack("<HHIHH", 262, 3, 1, 0, 0)))
        assert np.array_equal(read(tmp_path / "a.tif"), 255 - self.RIGHT)

    @pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
    def test_images_in_memory(self, mode: str) -> None:
        data = RAMP.astype(">u2" if mode.endswith("B") else "<u2").tobytes()
        image = Image.frombytes(mode, (16, 16), data)
        assert np.array_equal(in_memory(image), self.RIGHT)

    @pytest.mark.parametrize("mode", ["I", "F"])
    def test_without_a_range_is_refused(self, tmp_path: Path, mode: str) -> None:
        image = Image.fromarray(RAMP.astype(np.int32)) if mode == "I" else Image.fromarray(RAMP.astype(np.float32))
        with pytest.raises(VideoError, match="range"):
            in_memory(image)
        image.save(tmp_path / "a.tif")
        assert "range" in refusal(tmp_path / "a.tif")

    @pytest.mark.parametrize("suffix", ["pfm", "exr", "hdr"])
    def test_floating_point_formats_are_refused(self, tmp_path: Path, suffix: str) -> None:
        path, grey = tmp_path / f"a.{suffix}", RAMP.astype("<f4")
        if suffix == "pfm":
            path.write_bytes(b"Pf\n16 16\n-1.0\n" + grey.tobytes())
        else:
            write_clip(path, [numbered_picture(1)], codec=suffix, pix_fmt="gbrpf32le", form="image2pipe")
        assert "range" in refusal(path)


class TestColours:
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV"])
    def test_modes_in_memory_are_as_pillow_converts_them(self, mode: str) -> None:
        rgb = Image.fromarray(np.rint(SMOOTH).astype(np.uint8))
        image = rgb.convert("P").convert("PA") if mode == "PA" else rgb.convert(mode)
        assert np.array_equal(in_memory(image), np.asarray(image.convert("RGB")))

    def test_lab_is_refused(self) -> None:
        with pytest.raises(VideoError, match=r"L\*a\*b"):
            in_memory(Image.new("LAB", (8, 8)))

    def test_transparency_is_dropped(self, tmp_path: Path) -> None:
        rgba = np.dstack([numbered_picture(3), np.zeros((64, 64), np.uint8)])
        Image.fromarray(rgba).save(tmp_path / "a.png")
        assert np.array_equal(read(tmp_path / "a.png"), numbered_picture(3))


def test_pictures_in_tiles_are_refused(tmp_path: Path) -> None:
    """HEIC of phones: FFmpeg gives one tile after the other as a stream of its own."""
    item = b"infe" + struct.pack(">BBBBHH", 2, 0, 0, 0, 1, 0) + b"grid\0"
    meta = b"meta" + bytes(4) + struct.pack(">I", len(item) + 4) + item
    head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    (tmp_path / "phone.heic").write_bytes(head + struct.pack(">I", len(meta) + 4) + meta)
    assert "tiles" in refusal(tmp_path / "phone.heic")


class TestSizes:
    def test_a_bomb_is_refused_unopened(self, tmp_path: Path) -> None:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
        path = tmp_path / "bomb.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
        assert "too large" in refusal(path)

    def test_a_strip_is_taken(self, tmp_path: Path) -> None:
        Image.new("L", (1, 50_000), 77).save(tmp_path / "strip.png")
        assert read(tmp_path / "strip.png").shape == (50_000, 1, 3)


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "frames"
        folder.mkdir()
        for number in range(12):
            Image.fromarray(numbered_picture(number)).save(folder / f"frame_{number}.png")
        (folder / ".DS_Store").write_bytes(b"x")
        return folder

    def test_frames_are_in_the_order_of_their_numbers(self, folder: Path) -> None:
        assert numbers_of(folder) == list(range(12))
        with Video.open(f"{folder}/", fps=4) as video:
            assert (video.info.fps, video.info.duration_seconds, video.info.width) == (4, 3.0, 64)
            assert [read_number(frame) for frame in video.frames([11, 3, 3, 0])] == [11, 3, 3, 0]

    def test_upright(self, folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        exif = Image.Exif()
        exif[0x0112] = 6
        for number in range(2):
            Image.new("RGB", (40, 20)).save(folder / f"{number}.jpg", exif=exif)
        with Video.open(folder) as video:
            assert (video.info.width, video.info.height) == (20, 40)
            assert next(video.frames([1])).shape == (40, 20, 3)

    def test_another_size_is_refused(self, folder: Path) -> None:
        Image.new("RGB", (64, 48)).save(folder / "frame_5.png")
        assert "frame_5.png' has 64x48" in refusal(folder)

    def test_another_kind_is_refused(self, folder: Path) -> None:
        (folder / "notes.txt").write_text("notes")
        assert "notes.txt" in refusal(folder)

    def test_animations_and_folders_in_it_are_refused(self, folder: Path) -> None:
        (folder / "more").mkdir()
        assert "'more'" in refusal(folder)
        (folder / "more").rmdir()
        pictures = [Image.fromarray(numbered_picture(number)) for number in range(3)]
        pictures[0].save(folder / "frame_3.png", save_all=True, append_images=pictures[1:])
        assert "frame_3.png" in refusal(folder)

    def test_nothing_in_it(self, tmp_path: Path) -> None:
        (tmp_path / ".hidden.png").write_bytes(b"")
        assert "without pictures" in refusal(tmp_path)

    @pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf"), "25", True])
    def test_a_rate_that_is_none(self, folder: Path, fps: Any) -> None:
        assert "fps" in refusal(folder, fps)

    def test_a_rate_is_for_folders(self, tmp_path: Path) -> None:
        assert "rate of its own" in refusal(write_clip(tmp_path / "a.mp4", frames=3), fps=25)
