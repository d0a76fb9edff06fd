"""Get any frame of a clip, by jumps where they are safe and from the beginning where they are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path

import av
import numpy as np

from sfexport.errors import VideoError
from sfexport.video.containers import (
    CONVERT_HINT,
    ONE_THREAD_CODECS,
    PICTURES,
    explained,
    times_are_usable,
    video_streams,
)
from sfexport.video.decoder import REPAIR_HINT, Decoded, Decoder, Lost, stands_alone
from sfexport.video.files import VideoInfo
from sfexport.video.keyframes import KeyframeDecoder
from sfexport.video.rgb import RgbConverter, stored_orientation
from sfexport.video.sampling import nearest_keyframes
from sfexport.video.timeline import PacketInfo, SeekPoint, Timeline

# Frames decoded on opening, to check that they come in the order of their times and one per packet.
TRIED_FRAMES = 8
Numbered = tuple[int, av.VideoFrame]  # the frame's index, and the frame


class Clip:
    """A video stream, its timeline, and a decoder at some position of it."""

    def __init__(self, path: Path, shape: str | None = None, shown: Path | None = None) -> None:
        """Open a clip, list its packets and decode its first frames.

        Args:
            shape: FFmpeg's name of the file's format; None: FFmpeg finds out.
            shown: path for messages and `info.path` instead of `path`.

        Raises:
            VideoError: the file holds no video, or the video cannot be decoded.
        """
        self._timeline: Timeline
        self._latest: av.VideoFrame | None
        self._picture: np.ndarray | None
        self._jumped_to: SeekPoint | None
        self._path = shown or path
        self._rgb = RgbConverter(self._path)
        self._keyframes: KeyframeDecoder | None = None
        self._keyframe: tuple[int, np.ndarray] | None = None  # the latest one and its index
        with explained(self._path):
            self._decoder = Decoder(path, shape, self._path)
        self._is_closed = False
        try:
            with explained(self._path):
                self._open_timeline(self._decoder.list_packets())
                self._advance_from_start(0)
                self._orientation = stored_orientation(self._current(), self._decoder.first_payload)
                self.info = self._describe()
        except BaseException:
            self.close()
            raise

    @property
    def frames_decoded(self) -> int:
        return self._decoder.frames_decoded + (self._keyframes.frames_decoded if self._keyframes else 0)

    def close(self) -> None:
        self._decoder.close()
        if self._keyframes is not None:
            self._keyframes.close()
        self._is_closed = True

    @property
    def is_timed(self) -> bool:
        """True if the frames have times of their own."""
        return self._timeline.is_timed

    @property
    def stream_count(self) -> int:
        """Number of the file's video streams."""
        return len(video_streams(self._decoder.container, self._path))

    def first_frame(self) -> av.VideoFrame:
        """Return the first frame as decoded, for its colour matrix and range; no other may have been read."""
        return self._current()

    def picture(self, frame: av.VideoFrame) -> np.ndarray:
        """Convert a frame of this clip to uint8 RGB [height, width, 3], upright."""
        with explained(self._path):
            return self._orientation.upright(self._rgb.convert(frame))

    def times(self, indices: Sequence[int]) -> list[float]:
        """Return the presentation times of frames, in seconds after the first one's."""
        timeline, time_base = self._timeline, self._decoder.stream.time_base
        if not timeline.is_timed or time_base is None:
            return [index / self.info.fps for index in indices]
        return [float(int(timeline.stamps[index] - timeline.stamps[0]) * time_base) for index in indices]

    def nearest_keyframes(self, indices: Sequence[int]) -> list[int]:
        """Return for each frame index the nearest keyframe (see `sampling.nearest_keyframes`).

        Raises:
            VideoError: the file does not tell which frames are keyframes.
        """
        keyframes, stamps = self._timeline.keyframes, self._timeline.stamps
        if not len(keyframes):
            raise VideoError(
                f"'{self._path}' does not tell which of its frames are keyframes.", "Read it with --seek exact."
            )
        return nearest_keyframes(indices, keyframes, stamps)

    def keyframe(self, index: int) -> np.ndarray:
        """Return a keyframe as `frame` does, decoded without any other frame if that is possible."""
        if self._is_closed or index == self._at:
            return self.frame(index)
        if self._keyframe is None or self._keyframe[0] != index:
            with explained(self._path):
                if self._keyframes is None:
                    self._keyframes = KeyframeDecoder(self._decoder)
                frame = self._keyframes.frame(index, self._timeline)
                pixels = None if frame is None else self._orientation.upright(self._rgb.convert(frame))
            self._keyframe = (index, self.frame(index) if pixels is None else pixels)
        return self._keyframe[1]

    def frame(self, index: int) -> np.ndarray:
        """Return the frame at this position in presentation order, uint8 RGB [height, width, 3]."""
        if self._is_closed:
            raise VideoError(f"'{self._path}' has been closed.", "Take its frames while it is open.")
        with explained(self._path):
            if index < self._at or self._timeline.is_worth_a_seek(self._passed, index):
                self._jump(index)
            else:
                self._go_on(index)
            if self._picture is None:
                self._picture = self._orientation.upright(self._rgb.convert(self._current()))
        return self._picture

    def _current(self) -> av.VideoFrame:
        """Return the frame that came last from the decoder."""
        assert self._latest is not None
        return self._latest

    # Reaching a frame.

    def _jump(self, index: int) -> None:
        """Decode from the last seek point that leads to this frame, usually the last one before it.

        Some seek points do not lead to their frame (gradual refresh, containers that land elsewhere, wrong flags):
        those are removed, more of them each time, in the end all.
        """
        for tries in count():
            point = self._timeline.seek_point(index)
            if point is None:
                break
            self._stand(self._from_seek_point(point), before=point.frame, jumped_to=point)
            try:
                self._advance_to(index)
                return
            except Lost:
                self._timeline = self._timeline.without_seek_points(point, 2**tries)
        self._stand(self._numbered(self._decoder.from_start()), before=0)
        self._advance_from_start(index)

    def _go_on(self, index: int) -> None:
        """Decode on to a frame; if an earlier jump now proves wrong, remove its seek point and jump again."""
        if self._jumped_to is None:
            self._advance_from_start(index)
            return
        try:
            self._advance_to(index)
        except Lost:
            self._timeline = self._timeline.without_seek_points(self._jumped_to, 1)
            self._jump(index)

    def _advance_from_start(self, index: int) -> None:
        try:
            self._advance_to(index)
        except Lost as error:
            raise VideoError(
                f"'{self._path}' lists a frame{self._time_of(index)} that its decoder does not give in its place.",
                REPAIR_HINT,
            ) from error

    def _stand(self, output: Iterator[Numbered], before: int, jumped_to: SeekPoint | None = None) -> None:
        """Continue with `output`, which gives the frames from number `before` on, after a jump if there was one."""
        self._output, self._at, self._jumped_to = output, before - 1, jumped_to
        self._passed = jumped_to.ordinal - 1 if jumped_to else -1  # the highest ordinal among the frames that came
        self._latest, self._picture = None, None

    def _advance_to(self, index: int) -> None:
        """Take frames up to this one. Raises Lost if the decoder's next frame is not the next one in order."""
        while self._at < index:
            expected = self._at + 1
            # Set past the end, so that after an error no later frame is taken for the latest one.
            self._at = len(self._timeline.order)
            number, frame = next(self._output, (-1, None))
            if number != expected:
                raise Lost
            self._at, self._latest, self._picture = number, frame, None
            self._passed = max(self._passed, int(self._timeline.order[number]))

    def _from_seek_point(self, point: SeekPoint) -> Iterator[Numbered]:
        """Yield the frames from a seek point on, without those before it, which refer to frames not decoded."""
        for number, frame in self._numbered(self._decoder.from_seek_point(point, self._timeline)):
            if number < point.frame:
                continue
            if frame.is_corrupt or (number == point.frame and not stands_alone(frame)):
                raise Lost
            yield number, frame

    def _numbered(self, frames: Iterator[Decoded]) -> Iterator[Numbered]:
        for counted, (ordinal, frame) in enumerate(frames):
            yield self._timeline.number(ordinal, counted), frame

    # Opening.

    def _open_timeline(self, packets: list[PacketInfo]) -> None:
        """Set the timeline, with the decoder before the first frame.

        After a loss in transmission, a decoder's pixels depend on its threads and on where it began: all frames of
        such a clip come from the beginning, decoded by one thread.
        """
        is_stream = self._decoder.container.format.name in ("mpegts", "mpeg")
        if is_stream and any(packet.is_corrupt for packet in packets):
            self._decoder.keep_to_one_thread()
        self._timeline = self._read_timeline(packets)
        if is_stream and self._timeline.may_have_losses():
            self._timeline = self._timeline.without_any_seek_point()
            self._decoder.keep_to_one_thread()
            self._stand(self._numbered(self._decoder.from_start()), before=0)

    def _read_timeline(self, infos: list[PacketInfo]) -> Timeline:
        """Make the timeline of the packets' times; of all decoded frames if the times are wrong or not trusted.

        The decoder is then before the first frame.
        """
        timeline = None
        if times_are_usable(self._decoder.container, self._decoder.stream, infos):
            timeline = Timeline.from_packets(infos)
        if timeline is not None:
            tried, rest, is_complete = self._try_first_frames()
            numbers = [timeline.number(ordinal, 0) for ordinal, _ in tried]
            first = numbers[0] if numbers else -1
            if is_complete:
                is_complete = first + len(tried) == len(timeline.order)
            if first >= 0 and numbers == list(range(first, first + len(numbers))) and is_complete is not False:
                self._timeline = timeline.starting_at(first)
                # Damaged pixels of decoders without checks depend on the frames held: decode the first ones again.
                is_checked = self._decoder.stream.codec_context.name not in ONE_THREAD_CODECS
                output = chain(tried, rest) if is_checked else self._decoder.from_start()
                self._stand(self._numbered(output), before=0)
                return self._timeline
        self._timeline = Timeline.from_decoding(infos, [ordinal for ordinal, _ in self._decoder.from_start()])
        if not len(self._timeline.order):
            raise VideoError(f"No frame of '{self._path}' can be decoded.", f"It may be damaged. {CONVERT_HINT}")
        self._stand(self._numbered(self._decoder.from_start()), before=0)
        return self._timeline

    def _try_first_frames(self) -> tuple[list[Decoded], Iterator[Decoded], bool | None]:
        """Return the first frames, the rest, and True if there is no rest; None if there may be one, or damage."""
        frames, tried = self._decoder.from_start(), list[Decoded]()
        try:
            tried.extend(islice(frames, TRIED_FRAMES))
        except VideoError as error:
            return tried, _failing(error), None
        return tried, frames, None if len(tried) == TRIED_FRAMES else True

    def _describe(self) -> VideoInfo:
        stream, timeline = self._decoder.stream, self._timeline
        frames, seconds = len(timeline.order), float(timeline.span() * (stream.time_base or 0))
        first = self._current()
        size = self._orientation.size(first.width, first.height)
        if frames == 1 and self._decoder.container.format.name in PICTURES.split(","):
            return VideoInfo(self._path, 1, 1.0, *size, 0.0, self._orientation.degrees, is_picture=True)
        rate = float(stream.average_rate or stream.guessed_rate or (frames / seconds if seconds else 1))
        return VideoInfo(self._path, frames, rate, *size, seconds or frames / rate, self._orientation.degrees)

    def _time_of(self, index: int) -> str:
        timeline, time_base = self._timeline, self._decoder.stream.time_base
        if not timeline.is_timed or time_base is None or index >= len(timeline.stamps):
            return ""
        ticks = int(timeline.stamps[index] - timeline.stamps[0])
        return f" about {float(ticks * time_base):.1f} seconds in"


def _failing(error: VideoError) -> Iterator[Decoded]:
    raise error
    yield
