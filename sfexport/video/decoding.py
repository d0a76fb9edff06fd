"""Opening a clip or a picture and getting chosen frames out of it. The only file that imports av (PyAV).

Besides av it imports numpy, sfexport.errors and its neighbours files, pictures and timeline.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import av
import av.error
import numpy as np

from sfexport.errors import VideoError
from sfexport.video.arrays import MemoryFrames
from sfexport.video.files import VideoInfo, check_file
from sfexport.video.pictures import Orientation, Still, read_still
from sfexport.video.timeline import PacketFacts, Timeline

# FFmpeg draws any .txt or .nfo file as a film of its letters; nobody means that.
TEXT_CODECS = ("ansi", "bintext", "xbin", "idf")
KINDS_HINT = "MP4, MOV, MKV, WebM, AVI and MPEG files work, and PNG, JPEG, WebP and BMP pictures."
CONVERT_HINT = "Convert it first, for example: ffmpeg -i INPUT -c:v libx264 -pix_fmt yuv420p OUTPUT.mp4"
REPAIR_HINT = "Get a whole copy, or leave out what is damaged: ffmpeg -i INPUT OUTPUT.mp4"


class Video:
    """A clip, or a still picture as a clip of one frame. Open it with `Video.open`, in a `with` statement.

    Not for use by several threads at a time.
    """

    def __init__(self, source: _Clip | Still | MemoryFrames) -> None:
        self._source = source

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Video:
        """Open a file, list its frames and decode the first one.

        Raises:
            VideoError: there is no such file, it holds no video, or the video cannot be decoded.
        """
        path = Path(path)
        check_file(path)
        picture = read_still(path)
        return cls(_Clip(path) if picture is None else Still(path, picture))

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
        """Let go of the file; frames cannot be asked for any more."""
        self._source.close()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Clip:
    """A video stream, its timeline, and a decoder that stands somewhere on it.

    The decoder's latest frame answers every wanted stamp in `_low`..`_high`: those after the frame before it,
    up to its own; at the end of the stream, everything later as well. `_fed` is the latest stamp that has gone
    into the decoder, which runs ahead of what comes out.
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
        self._is_closed = True

    def frame(self, index: int) -> np.ndarray:
        """uint8 RGB [height, width, 3] of the frame at this position in presentation order."""
        if self._is_closed:
            raise VideoError(f"'{self._path}' has been closed.", "Take its frames while it is open.")
        wanted = int(self._timeline.stamps[index])
        with _explained(self._path):
            if wanted < self._low or self._timeline.is_worth_a_seek(self._fed, wanted):
                self._jump(wanted)
            else:
                self._advance_to(wanted)
            if self._latest is None:
                raise self._nothing_decodes()
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
        self._stand(from_start=False)
        return True

    def _start_over(self) -> None:
        """Opening anew goes back to the beginning in every container, with or without times."""
        self._container.close()
        self._open()
        self._stand(from_start=True)

    def _stand(self, from_start: bool) -> None:
        self._latest, self._picture, self._is_from_start = None, None, from_start
        self._low = self._high = self._fed = -np.inf
        self._output = self._decoded(from_start)

    def _advance_to(self, wanted: int) -> None:
        while self._high < wanted:
            try:
                stamp, frame = next(self._output, (None, None))
            except BaseException:
                # The latest frame must not answer for those behind the damage.
                self._low = np.inf
                raise
            if frame is not None:
                self._take(stamp, frame)
                continue
            self._high = np.inf
            if self._latest is None:
                # Nothing came out at all, so no stamp is answered.
                self._low = np.inf

    def _take(self, stamp: int, frame: av.VideoFrame) -> None:
        if self._latest is not None:
            self._low = self._high + 1
        elif not self._is_from_start:
            self._low = stamp
        self._high, self._latest, self._picture = stamp, frame, None

    # Decoding.

    def _decoded(self, from_start: bool) -> Iterator[tuple[int, av.VideoFrame]]:
        """(stamp, frame) of the frames from here on; after a seek, from the first key packet on."""
        waiting, given, is_timed = not from_start, 0, self._timeline.is_timed
        # The None at the end makes the decoder give what it holds back.
        for packet in chain(_packets(self._container, self._stream), (None,)):
            if packet is not None:
                if waiting and not packet.is_keyframe:
                    continue
                waiting = False
                self._fed = max(self._fed, -np.inf if packet.pts is None else packet.pts)
            for frame in self._decode(packet, tolerant=from_start and not given):
                self.frames_decoded += 1
                # Flagged corrupt: what it refers to is missing, as at the start of a gradual refresh.
                if frame.is_corrupt or (is_timed and frame.pts is None):
                    continue
                yield (frame.pts if is_timed else given), frame
                given += 1

    def _decode(self, packet: av.Packet | None, tolerant: bool) -> list[av.VideoFrame]:
        """A recording cut out of a broadcast begins with packets that refer to nothing: `tolerant` skips them."""
        try:
            return self._stream.decode(packet)
        except av.error.FFmpegError as error:
            if tolerant:
                return []
            message = f"'{self._path}' is damaged{self._time_of(packet)}: the frame there cannot be decoded."
            raise VideoError(message, REPAIR_HINT) from error

    def _time_of(self, packet: av.Packet | None) -> str:
        if packet is None or packet.pts is None or not self._timeline.is_timed:
            return ""
        ticks = packet.pts - int(self._timeline.stamps[0])
        return f" about {float(ticks * packet.time_base):.1f} seconds in" if ticks >= 0 else ""

    def _nothing_decodes(self) -> VideoError:
        return VideoError(f"No frame of '{self._path}' can be decoded.", f"It may be damaged. {CONVERT_HINT}")

    # Opening.

    def _open(self) -> None:
        with _explained(self._path):
            self._container = _open_container(self._path)
            self._is_closed = False
            try:
                self._stream = _video_stream(self._container, self._path)
            except BaseException:
                self.close()
                raise

    def _read_timeline(self) -> Timeline:
        container, stream = self._container, self._stream
        packets = [_facts(packet) for packet in _packets(container, stream)]
        # AVI stores decoding order only; FFmpeg's times are a guess, wrong where frames are reordered.
        delays = {p.pts - p.dts for p in packets if p.pts is not None and p.dts is not None}
        is_guess = container.format.name == "avi" and stream.codec_context.has_b_frames and len(delays) == 1
        return Timeline.from_packets(packets, trust_times=not is_guess)

    def _find_first_frame(self) -> None:
        """Leaves the decoder at the first frame that it gives, which settles the timeline and the orientation."""
        if not len(self._timeline.stamps):
            raise VideoError(f"'{self._path}' has a video stream without any frames.", "Record or convert it again.")
        self._start_over()
        stamp, frame = next(self._output, (0, None))
        if frame is None:
            raise self._nothing_decodes()
        timeline, was_timed = self._timeline.starting_at(stamp), self._timeline.is_timed
        self._timeline = timeline
        if was_timed and not timeline.is_timed:
            self._find_first_frame()
            return
        self._take(stamp, frame)
        matrix = frame.side_data.get("DISPLAYMATRIX")
        self._orientation = Orientation.from_display_matrix(bytes(matrix) if matrix else b"")

    def _describe(self) -> VideoInfo:
        stream, timeline = self._stream, self._timeline
        count, seconds = len(timeline.stamps), float(timeline.span() * stream.time_base)
        rate = float(stream.average_rate or stream.guessed_rate or (count / seconds if seconds else 1))
        width, height = self._orientation.size(self._latest.width, self._latest.height)
        return VideoInfo(self._path, count, rate, width, height, seconds or count / rate, self._orientation.degrees)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what av raises into a VideoError."""
    try:
        yield
    except av.error.DecoderNotFoundError as error:
        raise _unknown_codec(path) from error
    except (av.error.InvalidDataError, av.error.EOFError) as error:
        raise VideoError(f"'{path}' is not a video or picture, or it is damaged or incomplete.", KINDS_HINT) from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"'{path}' cannot be read as a video ({reason}).", KINDS_HINT) from error


def _unknown_codec(path: Path) -> VideoError:
    return VideoError(f"The video codec of '{path}' is unknown to PyAV, or the file is incomplete.", CONVERT_HINT)


def _open_container(path: Path) -> av.container.InputContainer:
    # Absolute, so that no part of a name is taken for a protocol; and playlists may not reach for the network.
    options = {"protocol_whitelist": "file,crypto,data"}
    return av.open(os.path.abspath(path), metadata_errors="replace", options=options)


def _video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    """The first video stream that is not cover art, set to decode on all cores."""
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise VideoError(f"'{path}' contains no video.", "Audio and subtitles alone cannot be looked at.")
    codec = streams[0].codec_context
    if codec is None:
        raise _unknown_codec(path)
    if codec.name in TEXT_CODECS:
        raise VideoError(f"'{path}' is a text file, not a video.", KINDS_HINT)
    codec.thread_type = "AUTO"
    return streams[0]


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The stream's packets with something in them, as far as the file can be read.

    A last one that is flagged corrupt is where the file was cut off, and left out. Elsewhere the flag means a
    loss in transmission, which decoders cover up better than a missing frame.
    """
    held = None
    try:
        for packet in container.demux(stream):
            if packet.size:
                if held is not None:
                    yield held
                held = packet
    # IndexError: PyAV at the very end of files in which FFmpeg found another stream on the way.
    except (av.error.InvalidDataError, av.error.EOFError, IndexError):
        pass
    if held is not None and not held.is_corrupt:
        yield held


def _facts(packet: av.Packet) -> PacketFacts:
    return PacketFacts(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, not packet.is_discard)
