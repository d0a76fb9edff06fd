"""Decode a container's video stream, from the beginning or from a seek point."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import av
import av.error
import av.logging

from sfexport.errors import VideoError
from sfexport.video.containers import content, open_container, packet_info, packets, prepare, video_streams
from sfexport.video.timeline import PacketInfo, SeekPoint, Timeline, identity

REPAIR_HINT = "Get a whole copy, or leave out what is damaged: ffmpeg -i INPUT OUTPUT.mp4"
_ERRORS: dict[int, Any] = av.error.classes
_INVALID_DATA = next(code for code, kind in _ERRORS.items() if kind is av.error.InvalidDataError)
Decoded = tuple["int | None", av.VideoFrame]  # the ordinal of the packet that it is made of, and the frame


class Lost(Exception):
    """A jump does not lead to the right frame. The file may be fine: start earlier."""


class _FramesMissing(Exception):
    """Some of the last packets gave no frame: none is due to them, or they are damaged."""


class Decoder:
    """Decodes a video stream and knows of each frame from which packet it comes.

    Every packet goes into the decoder with its ordinal (see `Timeline`) as its time, so that a frame is known by its
    packet, whatever times the container gives after a jump.

    Attributes:
        container: the open file.
        stream: the video stream; another object each time the file is opened anew.
        fed: ordinal of the packet that went into the decoder last; it is ahead of the frames that come out.
        frames_decoded: number of frames that came out so far.
        first_payload: the first packet's bytes.
    """

    def __init__(self, path: Path, shape: str | None, shown: Path) -> None:
        self.frames_decoded, self.fed, self.first_payload = 0, -1, b""
        self._file, self._shape, self._path = path, shape, shown
        self._stream_index: int | None = None
        self._seek_ordinals: tuple[object, dict[int, int]] = (None, {})
        self._has_threads = True
        self._open()

    def close(self) -> None:
        self.container.close()

    def list_packets(self) -> list[PacketInfo]:
        """List the packets of the main video stream, or of the next best one if it is empty."""
        # Indices, because a stream must not be used once its container is closed.
        for index in [stream.index for stream in video_streams(self.container, self._path)]:
            if index != self.stream.index:
                self._stream_index = index
                self.rewind()
            codec = self.stream.codec_context.name
            infos = [packet_info(packet, codec) for packet in packets(self.container, self.stream)]
            if infos:
                self._stream_index = index
                return infos
        raise VideoError(f"'{self._path}' has a video stream without any frames.", "Record or convert it again.")

    def keep_to_one_thread(self) -> None:
        """Decode with one thread, starting with the next pass from the beginning."""
        self._has_threads = False

    def single_threaded_copy(self) -> Decoder:
        """Open the same stream of the same file once more, to be decoded by one thread."""
        copy = Decoder(self._file, self._shape, self._path)
        copy._stream_index, copy._has_threads = self.stream.index, False
        copy.rewind()
        return copy

    def decode_alone(self, ordinal: int, packet: av.Packet) -> list[av.VideoFrame]:
        """Decode one packet without any other, and forget it.

        Raises:
            av.error.FFmpegError: the packet is damaged.
        """
        codec = self.stream.codec_context
        codec.flush_buffers()
        try:
            return [*self._decode(ordinal, packet), *self._decode(None, None)]
        finally:
            codec.flush_buffers()

    def rewind(self) -> None:
        """Go back to the beginning by opening the file anew, which works with and without times."""
        self.container.close()
        self._open()

    def from_start(self) -> Iterator[Decoded]:
        """Yield all frames.

        A recording cut out of a broadcast begins with packets that refer to missing ones: those are left out. If
        packets at the beginning cannot be decoded, the frames begin with the next one that refers to none before it.

        Raises:
            VideoError: damage is reached.
        """
        return self._same_on_all_machines(self._each_frame)

    def from_seek_point(self, point: SeekPoint, timeline: Timeline) -> Iterator[Decoded]:
        """Yield the frames from a seek point on, with those before it in presentation order that the decoder gives.

        Raises:
            Lost: the container does not lead there, or a packet cannot be decoded from there.
        """
        try:
            yield from self._same_on_all_machines(partial(self._each_frame_from, point, timeline))
        except av.error.FFmpegError as error:
            raise Lost from error

    def _same_on_all_machines(self, decode: Callable[[], Iterator[Decoded]]) -> Iterator[Decoded]:
        """Yield the frames of `decode`; on damage, decode again with one thread, and keep to it.

        With several threads, the number of the machine's cores decides when damage shows, whether it shows at all, and
        which whole frames are lost with it.
        """
        given = 0
        if self._has_threads:
            try:
                for decoded in decode():
                    given += 1
                    yield decoded
                return
            except (av.error.FFmpegError, VideoError, _FramesMissing):
                self._has_threads = False
                self.rewind()
        yield from islice(decode(), given, None)

    def _each_frame(self) -> Iterator[Decoded]:
        """Yield all frames. Raises VideoError at damage; with several threads, the first error that shows."""
        self.rewind()
        has_begun, failed, highest = False, -1, -1
        numbered = enumerate(packets(self.container, self.stream))
        for ordinal, packet in chain(numbered, ((None, None),)):
            if not self.first_payload and packet is not None:
                self.first_payload = bytes(packet)
            time = self._time_of(packet)
            try:
                frames = self._decode(ordinal, packet)
            except av.error.FFmpegError as error:
                if self._has_threads:
                    raise
                if has_begun:
                    raise self._damaged(time) from error
                failed = self.fed
                continue
            highest = self._check_last(highest, packet, frames)
            for frame in frames:
                if frame.is_corrupt:  # a frame that it refers to is missing
                    if has_begun:
                        raise self._damaged(time)
                    continue
                if not has_begun and failed >= 0 and not (_ordinal(frame) > failed and stands_alone(frame)):
                    continue
                has_begun = True
                yield frame.pts, frame

    def _each_frame_from(self, point: SeekPoint, timeline: Timeline) -> Iterator[Decoded]:
        """Yield the frames from a seek point on. Raises Lost, or av.error.FFmpegError for a damaged packet."""
        highest = point.ordinal - 1
        for ordinal, packet in chain(self.landed(point, timeline), ((None, None),)):
            frames = self._decode(ordinal, packet)
            highest = self._check_last(highest, packet, frames)
            for frame in frames:
                yield frame.pts, frame

    def _check_last(self, highest: int, packet: av.Packet | None, frames: list[av.VideoFrame]) -> int:
        """Return the highest ordinal of a frame so far.

        Raises:
            _FramesMissing: not every packet after number `highest` has given one of the last frames. With several
                threads, errors at the end are not reported, and the frames after them are missing.
        """
        ordinals = {frame.pts for frame in frames}
        is_end_of_threads = packet is None and self._has_threads and self.stream.codec_context.thread_count != 1
        if is_end_of_threads and not ordinals.issuperset(range(highest + 1, self.fed + 1)):
            raise _FramesMissing
        return max([highest, *(ordinal for ordinal in ordinals if ordinal is not None)])

    def _decode(self, ordinal: int | None, packet: av.Packet | None) -> list[av.VideoFrame]:
        """Decode a packet; None makes the decoder give the frames that it holds back."""
        if packet is not None and ordinal is not None:
            packet.pts, packet.dts, self.fed = ordinal, None, ordinal
        name = self.stream.codec_context.name
        # At the end, AV1's decoder does not report an error in the frames that it held back.
        is_silent = name == "ffv1" or (packet is None and name == "libdav1d")
        with _damage_raised() if is_silent else contextlib.nullcontext():
            frames = self.stream.decode(packet)
        self.frames_decoded += len(frames)
        return frames

    def landed(self, point: SeekPoint, timeline: Timeline) -> Iterator[tuple[int, av.Packet]]:
        """Yield (ordinal, packet) from the seek point on, each recognised by its content."""
        # Some containers seek presentation times and some decoding times, and land after the point if given the other.
        for time in sorted({point.pts, point.dts}, reverse=True):
            self.container.seek(time, stream=self.stream, backward=True)
            following = packets(self.container, self.stream)
            first = self._find(point, timeline, following)
            if first is not None:
                break
        else:
            raise Lost
        identities = timeline.identities
        for ordinal, packet in enumerate(chain((first,), following), point.ordinal):
            if ordinal >= len(identities) or _identity(packet, timeline) != identities[ordinal]:
                raise Lost
            yield ordinal, packet

    def _find(self, point: SeekPoint, timeline: Timeline, following: Iterator[av.Packet]) -> av.Packet | None:
        """Return the seek point's packet; None if a later one comes before it."""
        ordinals = self._ordinals_of_seek_points(timeline)
        for packet in following:
            landed = ordinals.get(_identity(packet, timeline), -1)
            if landed >= point.ordinal:
                return packet if landed == point.ordinal else None
        return None

    def _ordinals_of_seek_points(self, timeline: Timeline) -> dict[int, int]:
        if self._seek_ordinals[0] is not timeline:
            ordinals = timeline.seek_points[:, 0]
            found = dict(zip(timeline.identities[ordinals].tolist(), ordinals.tolist(), strict=True))
            self._seek_ordinals = timeline, found
        return self._seek_ordinals[1]

    def _damaged(self, time: str) -> VideoError:
        return VideoError(f"'{self._path}' is damaged{time}: the frame there cannot be decoded.", REPAIR_HINT)

    def _time_of(self, packet: av.Packet | None) -> str:
        if packet is None:
            return " near its end"
        if packet.pts is None or packet.time_base is None:
            return ""
        ticks = packet.pts - (self.stream.start_time or 0)
        return f" about {float(ticks * packet.time_base):.1f} seconds in" if ticks >= 0 else ""

    def _open(self) -> None:
        self.container = open_container(self._file, self._path, self._shape)
        try:
            streams = video_streams(self.container, self._path)
            wanted = [s for s in streams if s.index == self._stream_index] or streams
            self.stream = prepare(wanted[0], self._path, self._has_threads)
        except BaseException:
            self.close()
            raise


@contextlib.contextmanager
def _damage_raised() -> Iterator[None]:
    """Raise InvalidDataError if a decoder logs an error and continues.

    FFV1's reports a wrong checksum in its log only, and leaves the slice's pixels undefined.
    """
    level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # else the same line is not captured a second time
    try:
        with av.logging.Capture(local=True) as lines:
            yield
    finally:
        av.logging.set_skip_repeated(skips)
        av.logging.set_level(level)
    if lines:
        raise av.error.InvalidDataError(_INVALID_DATA, lines[0][2].strip())


def _ordinal(frame: av.VideoFrame) -> int:
    """Return the ordinal of the packet that a frame is made of; -1 if it is unknown."""
    return -1 if frame.pts is None else frame.pts


def stands_alone(frame: av.VideoFrame) -> bool:
    """Return whether a frame refers to no other; decoders without frame types mark their key frames."""
    kind = int(frame.pict_type)
    return kind == int(av.video.frame.PictureType.I) or (not kind and frame.key_frame)


def _identity(packet: av.Packet, timeline: Timeline) -> int:
    return identity(packet.pos, content(packet), timeline.has_places)
