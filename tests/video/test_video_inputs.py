"""What is named as a video: URLs, standard input, lists of other files, pipes and devices."""

from __future__ import annotations

import io
import os
import socket
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from made_clips import numbered_picture, read_number, with_payload, write_clip
from PIL import Image

from sfexport.errors import VideoError
from sfexport.video.decoding import Video


def numbers(video: Any) -> list[int]:
    with Video.open(video) as opened:
        return [read_number(frame) for frame in opened.frames(range(opened.info.frame_count))]


def refusal(video: Any) -> str:
    with pytest.raises(VideoError) as caught, Video.open(video) as opened:
        list(opened.frames(range(opened.info.frame_count)))
    assert caught.value.hint and "\n" not in caught.value.paragraph()
    return str(caught.value)


class TestUrls:
    @pytest.mark.parametrize(
        "url", ["http://h/a.mp4", "https://h/a.mp4", "rtsp://cam:554/x", "s3://b/a.mp4", "HTTP://h"]
    )
    @pytest.mark.parametrize("kind", [str, Path])
    def test_are_refused_as_what_they_are(self, url: str, kind: type) -> None:
        # A Path keeps one slash of two.
        message = refusal(kind(url))
        assert "offline" in message and f"'{url}'" in message

    @pytest.mark.parametrize("name", ["a.mp4", "ä ö%41.mp4", "a#b?.mp4"])
    def test_of_files_are_opened(self, tmp_path: Path, name: str) -> None:
        path = write_clip(tmp_path / "made.mp4", frames=3).rename(tmp_path / name)
        assert numbers(path.as_uri()) == [0, 1, 2]
        assert numbers(f"file://localhost{path.as_uri()[7:]}") == [0, 1, 2]
        assert numbers(f"file:{path.as_uri()[7:]}") == [0, 1, 2]

    def test_of_files_elsewhere_are_refused(self) -> None:
        assert "another machine" in refusal("file://server/share/a.mp4")
        assert "no file" in refusal("file:///nowhere/a.mp4")

    def test_names_that_only_look_like_urls(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file:").mkdir()
        for name in ("take:1.mp4", "file:clip.mp4", "file:/clip.mp4"):
            write_clip(tmp_path / "made.mp4", frames=3).rename(tmp_path / name)
            assert numbers(name) == [0, 1, 2]

    @pytest.mark.parametrize("name", ["", "a\0b.mp4", "x" * 5000, "concat:a.mp4|b.mp4", "subfile,,start,0,end,9,,:/x"])
    def test_no_paths_at_all(self, name: str) -> None:
        refusal(name)


class TestStandardInput:
    def feed(self, monkeypatch: Any, data: bytes, tmp_path: Path, is_terminal: bool = False) -> None:
        stdin = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: is_terminal)
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def test_is_read_and_cleared_away(self, tmp_path: Path, monkeypatch: Any) -> None:
        data = write_clip(tmp_path / "a.mp4", frames=5).read_bytes()
        (tmp_path / "spool").mkdir()
        self.feed(monkeypatch, data, tmp_path / "spool")
        with Video.open("-") as video:
            assert str(video.info.path) == "-"
            assert [read_number(frame) for frame in video.frames([0, 4, 2])] == [0, 4, 2]
        assert not list((tmp_path / "spool").iterdir())

    @pytest.mark.parametrize(("data", "says"), [(b"", "empty"), (b"notes " * 99, "'-' is not a video")])
    def test_without_a_video_is_refused(self, tmp_path: Path, monkeypatch: Any, data: bytes, says: str) -> None:
        self.feed(monkeypatch, data, tmp_path)
        assert says in refusal("-")
        assert not list(tmp_path.iterdir())

    def test_from_a_terminal_is_refused(self, tmp_path: Path, monkeypatch: Any) -> None:
        self.feed(monkeypatch, b"", tmp_path, is_terminal=True)
        assert "none is piped" in refusal("-")


LISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n",
    "ffconcat": "ffconcat version 1.0\nfile '{}'\n",
    "dash": '<?xml version="1.0"?><MPD type="static" mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:'
    'isoff-main:2011"><Period><AdaptationSet><Representation id="0" mimeType="video/mp4"><BaseURL>{}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na={}\n",
    "smooth": '<SmoothStreamingMedia MajorVersion="2" Duration="1">{}</SmoothStreamingMedia>',
}


class TestFilesThatNameOthers:
    @pytest.mark.parametrize("kind", LISTS)
    @pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.ffconcat", "list.mpd", "list.sdp", "list"])
    def test_are_refused_and_not_followed(self, tmp_path: Path, kind: str, name: str) -> None:
        # Whoever opens the pipe to read waits for ever.
        os.mkfifo(tmp_path / "other.mp4")
        (tmp_path / name).write_text(LISTS[kind].format("other.mp4"))
        refusal(tmp_path / name)

    @pytest.mark.parametrize("kind", ["hls", "ffconcat"])
    def test_are_not_answered_from_what_they_name(self, tmp_path: Path, kind: str) -> None:
        write_clip(tmp_path / "other.ts", frames=5)
        (tmp_path / "list.mp4").write_text(LISTS[kind].format("other.ts"))
        assert "names other files" in refusal(tmp_path / "list.mp4")

    def test_patterns_name_one_file(self, tmp_path: Path) -> None:
        for number in range(3):
            Image.fromarray(numbered_picture(number + 5)).save(tmp_path / f"frame{number}.png")
        Image.fromarray(numbered_picture(77)).save(tmp_path / "frame%d.png")
        with Video.open(tmp_path / "frame%d.png") as video:
            assert video.info.is_picture and read_number(next(video.frames([0]))) == 77
        assert "no file" in refusal(tmp_path / "frame%03d.png")


class TestWhatIsNoFile:
    def test_pipes_and_sockets_are_refused_at_once(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.mp4")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "socket.mp4"))
            for name in ("pipe.mp4", "socket.mp4"):
                assert "not a regular file" in refusal(tmp_path / name)

    def test_devices_are_refused_at_once(self) -> None:
        assert "not a regular file" in refusal("/dev/zero")

    def test_a_loop_of_links(self, tmp_path: Path) -> None:
        (tmp_path / "a.mp4").symlink_to(tmp_path / "a.mp4")
        assert "a.mp4" in refusal(tmp_path / "a.mp4")

    def test_a_sparse_file_of_30_gigabytes(self, tmp_path: Path) -> None:
        with (tmp_path / "sparse.mp4").open("wb") as file:
            file.truncate(30 * 10**9)
        thread = threading.Thread(target=refusal, args=(tmp_path / "sparse.mp4",), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()

    def test_a_pipe_in_a_folder(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "frame.png")
        assert "not a regular file" in refusal(tmp_path)


def test_every_picture_of_a_camera_carries_exif(tmp_path: Path) -> None:
    for tag in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = tag

        def with_exif(index: int, packet: av.Packet, exif: Image.Exif = exif) -> av.Packet:
            file = io.BytesIO()
            Image.fromarray(numbered_picture(index)[:48]).save(file, "JPEG", exif=exif)
            return with_payload(packet, file.getvalue())

        frames = [np.ascontiguousarray(numbered_picture(i)[:48]) for i in range(6)]
        path = write_clip(tmp_path / f"{tag}.avi", frames, codec="mjpeg", pix_fmt="yuvj420p", change=with_exif)
        with Video.open(path) as video:
            assert video.info.frame_count == 6
            assert (video.info.width, video.info.rotation) == ((64, 0) if tag == 1 else (48, 90))
            upright = next(video.frames([5]))
        # Tag 6: turn clockwise to view.
        stored = upright if tag == 1 else np.rot90(upright, 1)
        padded = np.concatenate([stored, np.zeros((16, 64, 3), np.uint8)])
        assert read_number(padded) == 5
