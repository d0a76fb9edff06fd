"""Opening a clip or a picture and getting chosen frames out of it. The only file that imports av (PyAV).

Besides av it imports numpy, sfexport.errors and its neighbours pictures and timeline.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import av.error
import numpy as np

from sfexport.errors import VideoError
from sfexport.video.pictures import Orientation, read_still
from sfexport.video.timeline import PacketFacts, Timeline

# FFmpeg draws any .txt or .nfo file as a film of its letters; nobody means that.
TEXT_CODECS = ("ansi", "bintext", "xbin", "idf")
CONVERT_HINT = "Convert it first, for example: ffmpeg -i INPUT -c:v libx264 -pix_fmt yuv420p OUTPUT.mp4"
KINDS_HINT = "MP4, MOV, MKV, WebM, AVI and MPEG files work, and PNG, JPEG, WebP and BMP pictures."


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a clip before its frames are decoded.

    Attributes:
        frame_count: frames that can be asked for, at least 1.
        fps: average frames per second, positive; 1.0 for a picture.
        width, height: pixels of a frame as displayed, that is after `rotation`.
        duration_seconds: from the first frame to the end of the last one; 0.0 for a picture.
        rotation: clockwise degrees by which frames are turned to stand upright: 0, 90, 180 or 270.
    """

    path: Path
    frame_count: int
    fps: float
    width: int
    height: int
    duration_seconds: float
    rotation: int


class Video:
    """A clip, or a still picture as a clip of one frame. Open it with `Video.open`, in a `with` statement."""

    def __init__(self, source: _Clip | _Still) -> None:
        self._source = source

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Video:
        """Open a file and decode its first frame.

        Raises:
            VideoError: there is no such file, it holds no video, or the video cannot be decoded.
        """
        path = Path(path)
        _check_file(path)
        picture = read_still(path)
        return cls(_Clip(path) if picture is None else _Still(path, picture))

    @property
    def info(self) -> VideoInfo:
        return self._source.info

    @property
    def frames_decoded(self) -> int:
        """Frames that the decoder has given so far, those that nobody asked for included."""
        return self._source.frames_decoded

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the frames of these indices: uint8 RGB [height, width, 3], upright, contiguous.

        An index is a position in presentation order, 0..frame_count-1. Non-decreasing indices are decoded in one
        pass, with jumps over what nobody wants; smaller ones after larger ones work and cost a jump back. A
        repeated index yields the same array again: copy it before changing it. Where the file lists a frame
        that its decoder does not give, the next one (at the end: the last one) is yielded in its place.

        Raises:
            VideoError: an index is out of range (at once), or the clip is damaged (when the damage is reached).
        """
        count = self.info.frame_count
        for index in indices:
            if not 0 <= index < count:
                raise VideoError(f"'{self.info.path}' has no frame {index}.", f"Its frames are 0 to {count - 1}.")
        return (self._source.frame(int(index)) for index in indices)

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Still:
    """A picture; everything is known and decoded."""

    def __init__(self, path: Path, picture: np.ndarray) -> None:
        height, width = picture.shape[:2]
        self.info = VideoInfo(path, 1, 1.0, width, height, 0.0, 0)
        self.frames_decoded = 1
        self._picture = picture

    def frame(self, index: int) -> np.ndarray:
        return self._picture

    def close(self) -> None:
        pass


class _Clip:
    """A video stream, its timeline, and a decoder that stands somewhere on it.

    The decoder's latest frame answers every wanted stamp in `_low`..`_high`: those after the frame before it,
    up to its own; at the end of the stream, everything later as well.
    """

    def __init__(self, path: Path) -> None:
        self.frames_decoded = 0
        self._path = path
        self._open()
        try:
            with _explained(path):
                self._timeline = self._read_timeline()
                self._find_first_frame()
                self.info = self._describe()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._container.close()
        self._output = iter(())

    def frame(self, index: int) -> np.ndarray:
        wanted = int(self._timeline.stamps[index])
        with _explained(self._path):
            if wanted < self._low or self._timeline.is_worth_a_seek(self._fed, wanted):
                self._jump(wanted)
            elif wanted > self._high:
                self._advance_to(wanted)
            if self._picture is None:
                self._picture = self._orientation.upright(self._latest.to_ndarray(format="rgb24"))
        return self._picture

    # Moving about.

    def _jump(self, wanted: int) -> None:
        """Decode from the last seek point that gives `wanted`.

        Usually that is the last one before it. Some give their first frames later than they promise (gradual
        refresh, containers that land elsewhere): then from ever earlier ones, in the end from the beginning.
        """
        steps_back = 0
        while True:
            key = self._timeline.key_before(wanted, steps_back)
            if key is None or not self._seek(key):
                key = None
                self._start_over()
            self._advance_to(wanted)
            if self._low <= wanted or key is None:
                return
            steps_back = 2 * steps_back + 1

    def _seek(self, key: int) -> bool:
        """False where the container cannot."""
        try:
            self._container.seek(key, stream=self._stream, backward=True)
        except av.error.FFmpegError:
            return False
        self._stand_at(key)
        return True

    def _start_over(self) -> None:
        """Opening anew goes back to the beginning in every container, with or without times."""
        self._container.close()
        self._open()
        self._stand_at(None)

    def _stand_at(self, key: int | None) -> None:
        self._latest, self._picture = None, None
        self._low = self._high = self._fed = -np.inf
        self._output = self._decoded(from_start=key is None)

    def _advance_to(self, wanted: int) -> None:
        while self._high < wanted:
            stamp, frame = next(self._output, (np.inf, self._latest))
            if frame is None:
                # Nothing came out at all: no stamp is answered.
                self._low = np.inf
                return
            if frame is not self._latest:
                self._low = self._first_answered(stamp)
                self._latest, self._picture = frame, None
            self._high = stamp

    def _first_answered(self, stamp: int) -> float:
        if self._latest is not None:
            return self._high + 1
        return -np.inf if self._is_from_start else stamp

    # Decoding.

    def _decoded(self, from_start: bool) -> Iterator[tuple[int, av.VideoFrame]]:
        """(stamp, frame) of the frames from here on; after a seek, from the first key packet on."""
        self._is_from_start = from_start
        waiting, given = not from_start, 0
        for packet in _packets(self._container, self._stream):
            if waiting and packet.size and not packet.is_keyframe:
                continue
            waiting = False
            if packet.pts is not None:
                self._fed = max(self._fed, packet.pts)
            for frame in self._decode(packet, tolerant=from_start and not given):
                self.frames_decoded += 1
                # Flagged corrupt: its references are missing, as at the start of a gradual refresh.
                if frame.is_corrupt or (self._timeline.is_timed and frame.pts is None):
                    continue
                yield (frame.pts if self._timeline.is_timed else given), frame
                given += 1

    def _decode(self, packet: av.Packet, tolerant: bool) -> list[av.VideoFrame]:
        """A recording cut out of a broadcast begins with packets that refer to nothing: `tolerant` skips them."""
        try:
            return packet.decode()
        except av.error.FFmpegError as error:
            if tolerant:
                return []
            raise VideoError(
                f"'{self._path}' is damaged{self._time_of(packet)}: the frame there cannot be decoded.",
                "Get a whole copy, or have it repaired without the damaged part: ffmpeg -i INPUT OUTPUT.mp4",
            ) from error

    def _time_of(self, packet: av.Packet) -> str:
        if packet.pts is None or not self._timeline.is_timed:
            return ""
        return f" about {float((packet.pts - int(self._timeline.stamps[0])) * packet.time_base):.1f} seconds in"

    # Opening.

    def _open(self) -> None:
        with _explained(self._path):
            self._container = _open_container(self._path)
            try:
                self._stream = _video_stream(self._container, self._path)
            except BaseException:
                self._container.close()
                raise

    def _read_timeline(self, trust_times: bool = True) -> Timeline:
        container, stream = self._container, self._stream
        packets = [_facts(packet) for packet in _packets(container, stream) if packet.size]
        # AVI stores decoding order only; FFmpeg's times are a guess that reordered frames prove wrong.
        delays = {p.pts - p.dts for p in packets if p.pts is not None and p.dts is not None}
        if container.format.name == "avi" and stream.codec_context.has_b_frames and len(delays) == 1:
            trust_times = False
        return Timeline.from_packets(packets, trust_times)

    def _find_first_frame(self) -> None:
        self._start_over()
        if not len(self._timeline.stamps):
            raise VideoError(f"'{self._path}' has a video stream without any frames.", "Record or convert it again.")
        self._advance_to(int(self._timeline.stamps[0]))
        if self._latest is None:
            raise VideoError(f"No frame of '{self._path}' can be decoded.", f"It may be damaged. {CONVERT_HINT}")
        self._timeline = self._timeline.starting_at(int(self._high))
        data = self._latest.side_data.get("DISPLAYMATRIX")
        self._orientation = Orientation.from_display_matrix(bytes(data) if data else b"")

    def _describe(self) -> VideoInfo:
        stream, timeline = self._stream, self._timeline
        count, seconds = len(timeline.stamps), float(timeline.span() * stream.time_base)
        rate = stream.average_rate or stream.guessed_rate or (count / seconds if seconds else 1)
        width, height = self._orientation.size(self._latest.width, self._latest.height)
        seconds = seconds or count / float(rate)
        return VideoInfo(self._path, count, float(rate), width, height, seconds, self._orientation.degrees)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise VideoError(f"'{path}' is a directory, not a video.", "Name a file in it.")
    if not path.exists():
        raise VideoError(f"There is no file '{path}'.", "Check the path.")
    if not path.is_file():
        raise VideoError(f"'{path}' is not a regular file.", "Save the video to a file first.")
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except OSError as error:
        raise VideoError(f"'{path}' cannot be read: {error.strerror}.", "Check its permissions.") from error
    if is_empty:
        raise VideoError(f"'{path}' is empty.", "Copy or download it again.")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what av raises into a VideoError."""
    try:
        yield
    except av.error.DecoderNotFoundError as error:
        raise VideoError(f"'{path}' is in a video codec that this PyAV cannot decode.", CONVERT_HINT) from error
    except (av.error.InvalidDataError, av.error.EOFError) as error:
        raise VideoError(f"'{path}' is not a video or picture, or it is damaged or incomplete.", KINDS_HINT) from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"'{path}' cannot be read as a video: {reason}.", KINDS_HINT) from error


def _open_container(path: Path) -> av.container.InputContainer:
    # Absolute, so that no part of a name is taken for a protocol; and playlists may not reach for the network.
    return av.open(
        os.path.abspath(path), metadata_errors="replace", options={"protocol_whitelist": "file,crypto,data"}
    )


def _video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    """The first video stream that is not cover art, set to decode on all cores."""
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise VideoError(f"'{path}' contains no video.", "Audio and subtitles alone cannot be looked at.")
    codec = streams[0].codec_context
    if codec is None:
        raise VideoError(f"'{path}' is in a video codec that this PyAV cannot decode.", CONVERT_HINT)
    if codec.name in TEXT_CODECS:
        raise VideoError(f"'{path}' is a text file, not a video.", KINDS_HINT)
    codec.thread_type = "AUTO"
    return streams[0]


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The stream's packets and the empty one that flushes the decoder, also where the file breaks off."""
    try:
        yield from container.demux(stream)
    except (av.error.InvalidDataError, av.error.EOFError):
        yield av.Packet()


def _facts(packet: av.Packet) -> PacketFacts:
    is_shown = not (packet.is_discard or packet.is_corrupt)
    return PacketFacts(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, is_shown)
