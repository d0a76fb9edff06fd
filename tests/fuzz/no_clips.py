"""Kinds of files and addresses that are no clips."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from fuzz.base import CLIP
from fuzz.clips import check_clip
from fuzz.kinds import Case, Expect, Kind, call, command
from sfexport.video.decoding import Video

REFUSED, ANSWERED, EITHER = Expect.REFUSED, Expect.ANSWERED, Expect.EITHER


def _secret(case: Case) -> Path:
    secret = case.room / "secret.mp4"
    secret.write_bytes((case.base / CLIP).read_bytes())
    return secret


PLAYLISTS = {
    "an m3u8 playlist": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n",
    "an m3u8 playlist with a byte order mark": "\ufeff#EXTM3U\n#EXTINF:9,\n{secret}\n",
    "a master playlist": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{secret}\n",
    "an ffconcat list": "ffconcat version 1.0\nfile {secret}\n",
    "an ffconcat list with a name": "ffconcat version 1.0\nfile secret.mp4\n",
    "a DASH manifest": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT1S"><Period><AdaptationSet><Representation id="1" bandwidth="1" mimeType="video/mp4">'
    "<BaseURL>{secret}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "an SDP text": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "an IMF playlist": '<CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016"></CompositionPlaylist>',
    "a pls playlist": "[playlist]\nFile1={secret}\nNumberOfEntries=1\n",
    "an ASX list": '<asx version="3.0"><entry><ref href="{secret}"/></entry></asx>',
    "an AVISynth script": 'DirectShowSource("{secret}")\n',
    "a VapourSynth script": "import vapoursynth\n",
    "a WebVTT text": "WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n",
    "a subtitle file": "1\n00:00:00,000 --> 00:00:01,000\nhello\n",
    "an SVG": '<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><image href="{secret}"/></svg>',
    "a plain text": "What happens in the video?\n" * 40,
    "HTML": "<!doctype html><title>404</title>",
    "a Git LFS pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "an ffmetadata text": ";FFMETADATA1\ntitle=x\n",
    "an MVG picture": "push graphic-context\nviewbox 0 0 8 8\nimage over 0,0 0,0 '{secret}'\npop graphic-context\n",
    "a PostScript file": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n",
    "an lrc text": "[00:01.00]hello\n",
    "an SMIL list": '<smil><body><video src="{secret}"/></body></smil>',
}
ADDRESSES = (
    "concat:{secret}|{secret}",
    "file:{secret}",
    "file://{secret}",
    "subfile,,start,0,end,0,,:{secret}",
    "crypto:{secret}",
    "cache:{secret}",
    "async:{secret}",
    "data:video/mp4;base64,AAAA",
    "http://127.0.0.1:9/x.mp4",
    "https://127.0.0.1:9/x.mp4",
    "rtsp://127.0.0.1:9/x",
    "tcp://127.0.0.1:9",
    "udp://127.0.0.1:9",
    "pipe:0",
    "fd:0",
    "testsrc",
    "lavfi:testsrc",
    "/dev/video0",
    "/dev/zero",
    "/dev/null",
    "/dev/stdin",
    "/proc/self/mem",
    "-",
    "",
    " ",
    "~/clip.mp4",
    "%03d.png",
    "*.mp4",
    "a\0b.mp4",
    "x" * 5000,
    "\x1b[2J.mp4",
)


def _no_clip_kinds() -> Iterator[Kind]:
    for name, text in PLAYLISTS.items():
        for suffix in (".mp4", "", ".m3u8"):
            act = partial(_text_file, text=text, suffix=suffix)
            yield Kind(f"{name} as clip{suffix}", "media", act, REFUSED)
    for address in ADDRESSES:
        kind = EITHER if address.startswith("file:") else REFUSED
        act = partial(_address, address=address, by_command=False)
        yield Kind(f"the address {address[:40]!a}", "media", act, kind, timeout=30)
        if "\0" not in address:
            act = partial(_address, address=address, by_command=True)
            yield Kind(f"the address {address[:40]!a} on the command line", "media", act, kind, timeout=30)
    for name, put in NO_FILES.items():
        yield Kind(f"{name} as a clip", "media", partial(_no_file, put=put), REFUSED, timeout=30)


def _text_file(case: Case, text: str, suffix: str) -> None:
    path = case.room / f"clip{suffix}"
    path.write_text(text.format(secret=_secret(case)) if "{secret}" in text else text, encoding="utf-8")
    check_clip(case, path)


def _address(case: Case, address: str, by_command: bool) -> None:
    os.chdir(case.room)
    address = address.replace("{secret}", str(_secret(case)))
    if by_command:
        command("ask", case.base / "engines", address, "-q", "What?", "--max-new-tokens", 1)
        return
    with call(Video.open, address) as video:
        call(lambda: list(video.frames([0])))


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "an empty file": Path.touch,
    "one byte": lambda path: path.write_bytes(b"\0"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /dev/random": lambda path: path.symlink_to("/dev/random"),
    "an empty directory": Path.mkdir,
    "random bytes": lambda path: path.write_bytes(np.random.default_rng(0).bytes(50_000)),
    "zeros": lambda path: path.write_bytes(bytes(100_000)),
    "a sparse file of 900 MB": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 900 << 20),
    "a socket": lambda path: __import__("socket").socket(1).bind(str(path)),
    "an audio file": lambda path: _wave(path),
    "an mp3 with a cover": lambda path: _cover(path),
}


def _no_file(case: Case, put: Callable[[Path], object]) -> None:
    put(case.room / "clip.mp4")
    check_clip(case, case.room / "clip.mp4")


def _wave(path: Path) -> None:
    import wave

    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))


def _cover(path: Path) -> None:
    """Silent MP3 frames behind an ID3 tag that holds a picture."""
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(picture, "JPEG")
    content = b"\0image/jpeg\0\x03\0" + picture.getvalue()
    frame = b"APIC" + struct.pack(">IH", len(content), 0) + content
    size = len(frame)
    tag = b"ID3\x03\0\0" + bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0)) + frame
    path.write_bytes(tag + (b"\xff\xfb\x90\x64" + bytes(413)) * 40)


KINDS = [*_no_clip_kinds()]
