"""What is no video, or a broken one: one clear sentence that names the file, never an error of av."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import pytest
from clip_kinds import DAMAGES
from cores import set_cores
from PIL import Image

from sfexport.errors import VideoError
from sfexport.video.decoding import Video


def refusal(path: Path) -> VideoError:
    with pytest.raises(VideoError) as caught, Video.open(path) as video:
        list(video.frames(range(video.info.frame_count)))
    assert str(path) in str(caught.value)
    assert caught.value.hint
    assert "\n" not in caught.value.paragraph()
    return caught.value


def test_missing(tmp_path: Path) -> None:
    assert "no file" in str(refusal(tmp_path / "missing.mp4"))


def test_directory(tmp_path: Path) -> None:
    assert "directory" in str(refusal(tmp_path))


@pytest.mark.parametrize("name", ["empty.mp4", "empty.png", "empty"])
def test_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert "empty" in str(refusal(tmp_path / name))


@pytest.mark.parametrize("name", ["notes.txt", "notes.mp4", "notes.nfo", "notes", "notes.mkv"])
def test_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("These are notes, not a video.\n" * 40)
    assert "not a video" in str(refusal(tmp_path / name))


@pytest.mark.parametrize("name", ["noise.mp4", "noise.mkv", "noise.avi", "noise.jpg", "noise.png"])
def test_noise(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(random.Random(0).randbytes(20_000))
    refusal(tmp_path / name)


def test_playlist_does_not_reach_for_the_network(tmp_path: Path) -> None:
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:10", "#EXTINF:10,", "http://127.0.0.1:9/x.ts", "#EXT-X-ENDLIST"]
    (tmp_path / "list.m3u8").write_text("\n".join(lines))
    refusal(tmp_path / "list.m3u8")


@pytest.mark.parametrize("cover", [False, True])
def test_sound_alone_even_with_a_cover(clips: Any, tmp_path: Path, cover: bool) -> None:
    assert "no video" in str(refusal(clips.write_sound(tmp_path / "sound.m4a", cover)))


def test_no_frames(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "none.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    assert "without any frames" in str(refusal(tmp_path / "none.avi"))


def test_unknown_codec(clips: Any, tmp_path: Path) -> None:
    path = clips.write(tmp_path / "strange.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    assert "codec" in str(refusal(path))


def test_cut_off_before_the_index(clips: Any, tmp_path: Path) -> None:
    whole = clips.write(tmp_path / "cut.mp4").read_bytes()
    for size in (40, len(whole) // 2, len(whole) - 600):
        (tmp_path / "cut.mp4").write_bytes(whole[:size])
        assert "incomplete" in str(refusal(tmp_path / "cut.mp4"))


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("name", ["cut.mkv", "cut.ts", "cut.mp4"])
def test_cut_off_where_the_rest_can_be_read(clips: Any, tmp_path: Path, name: str, codec: str) -> None:
    options = {"movflags": "faststart"} if name.endswith("mp4") else {}
    path = clips.write(tmp_path / name, codec=codec, frames=100, container_options=options)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with Video.open(path) as video:
        count = video.info.frame_count
        assert 10 < count < 90
        assert [clips.read_number(frame) for frame in video.frames(range(count))] == list(range(count))


def spoil(path: Path, frames: set[int]) -> Path:
    """Overwrite the data of these frames (positions in decoding order)."""
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for index in frames:
        at, size = places[index]
        data[at : at + size] = b"\xff" * size
    path.write_bytes(data)
    return path


def read_all(path: Path, indices: Iterable[int]) -> tuple[list[str], str]:
    """The digests of the frames that come, and the error that ends them."""
    frames: list[str] = []
    try:
        with Video.open(path) as video:
            for frame in video.frames([i for i in indices if i < video.info.frame_count]):
                frames.append(hashlib.sha256(frame.tobytes()).hexdigest())
    except VideoError as error:
        return frames, error.paragraph()
    return frames, ""


class TestDamage:
    @pytest.fixture
    def damaged(self, clips: Any, tmp_path: Path) -> Path:
        return spoil(clips.write(tmp_path / "damaged.mp4"), {25})

    def test_is_reported_when_it_is_reached(self, damaged: Path) -> None:
        error = refusal(damaged)
        assert "damaged about 1." in str(error)
        assert "ffmpeg" in error.hint

    def test_does_not_hinder_what_lies_elsewhere(self, damaged: Path, clips: Any) -> None:
        with Video.open(damaged) as video:
            assert [clips.read_number(frame) for frame in video.frames([0, 38])] == [0, 38]

    def test_is_reported_again_when_asked_again(self, damaged: Path, clips: Any) -> None:
        with Video.open(damaged) as video:
            for _ in range(2):
                with pytest.raises(VideoError, match="damaged"):
                    list(video.frames([27]))
            assert [clips.read_number(frame) for frame in video.frames([38, 2])] == [38, 2]

    @pytest.mark.parametrize("frames", [{25}, {35}, {0, 1}, {2, 9}])
    @pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "libsvtav1"])
    def test_is_the_same_on_any_number_of_cores(
        self, codec: str, frames: set[int], clips: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = spoil(clips.write(tmp_path / "damaged.mp4", codec=codec), frames)
        outcomes = []
        for threads in (1, 2, 16):
            set_cores(monkeypatch, threads)
            outcomes.append((read_all(path, range(0, 40, 3)), read_all(path, [30])))
        assert outcomes[0] == outcomes[1] == outcomes[2]

    def test_of_ffv1_is_reported_each_time_it_is_met(self, tmp_path: Path) -> None:
        path = tmp_path / "dirty_ffv1.mkv"
        DAMAGES[path.name](path)
        frames, error = read_all(path, range(40))
        assert "damaged" in error
        assert [read_all(path, range(40)) for _ in range(2)] == [(frames, error)] * 2

    def test_nothing_but_rubbish(self, clips: Any, tmp_path: Path) -> None:
        path = spoil(clips.write(tmp_path / "rubbish.mp4"), set(range(40)))
        assert "No frame" in str(refusal(path))

    def test_a_damaged_beginning_is_skipped(self, clips: Any, tmp_path: Path) -> None:
        path = spoil(clips.write(tmp_path / "late.mp4"), set(range(12)))
        with Video.open(path) as video:
            count = video.info.frame_count
            assert [clips.read_number(frame) for frame in video.frames(range(count))] == list(range(40 - count, 40))

    def test_ffmpeg_prints_nothing(self, damaged: Path, capfd: pytest.CaptureFixture[str]) -> None:
        refusal(damaged)
        assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.mkv", "mpeg4"), ("a.avi", "mjpeg")])
def test_random_damage_never_shows_an_error_of_av(clips: Any, tmp_path: Path, name: str, codec: str) -> None:
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    good = clips.write(tmp_path / name, codec=codec, frames=12, pix_fmt=pix_fmt).read_bytes()
    chance = random.Random(0)
    for _ in range(40):
        data = bytearray(good[: chance.choice([len(good), chance.randrange(1, len(good))])])
        for _ in range(chance.choice([1, 5, 50])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        (tmp_path / name).write_bytes(data)
        try:
            with Video.open(tmp_path / name) as video:
                for frame in video.frames(range(0, min(video.info.frame_count, 50), 3)):
                    assert frame.ndim == 3
        except VideoError as error:
            assert name in str(error)


class TestStills:
    @pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.jpg", "named_wrongly.mp4"])
    def test_is_a_clip_of_one_frame(self, clips: Any, tmp_path: Path, name: str) -> None:
        form = "PNG" if name.endswith("mp4") else None
        Image.fromarray(clips.numbered_picture(1234)[:, :48]).resize((96, 128)).save(tmp_path / name, form)
        with Video.open(tmp_path / name) as video:
            info = video.info
            assert (info.frame_count, info.width, info.height, info.duration_seconds) == (1, 96, 128, 0.0)
            first, second = video.frames([0, 0])
        assert first.shape == (128, 96, 3) and first.flags.c_contiguous
        assert (first == second).all()

    def test_exif_orientation(self, tmp_path: Path) -> None:
        picture = Image.new("RGB", (40, 20), (255, 0, 0))
        picture.paste((0, 0, 255), (0, 0, 20, 20))
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(tmp_path / "turned.jpg", exif=exif)
        with Video.open(tmp_path / "turned.jpg") as video:
            frame = next(video.frames([0]))
            assert (video.info.width, video.info.height) == (20, 40)
        # Tag 6: turn clockwise to view, so the left half comes to lie on top.
        assert frame[5, 10, 2] > 200 > 50 > frame[5, 10, 0]
        assert frame[35, 10, 0] > 200 > 50 > frame[35, 10, 2]

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
    def test_other_modes_become_rgb(self, tmp_path: Path, mode: str) -> None:
        path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
        Image.new(mode, (8, 6)).save(path)
        with Video.open(path) as video:
            assert next(video.frames([0])).shape == (6, 8, 3)

    @pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.webp"])
    def test_cut_off(self, tmp_path: Path, name: str) -> None:
        Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        refusal(tmp_path / name)

    def test_animated_gif_is_a_clip(self, tmp_path: Path) -> None:
        pictures = [Image.new("L", (16, 16), 80 * i) for i in range(3)]
        pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100)
        with Video.open(tmp_path / "a.gif") as video:
            assert video.info.frame_count == 3
            assert [int(frame.mean()) for frame in video.frames([0, 1, 2])] == [0, 80, 160]
