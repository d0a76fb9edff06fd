"""Decode single keyframes of a clip, each by itself, without the frames between them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import av
import av.error

from sfexport.video.containers import packets
from sfexport.video.decoder import Decoder, Lost, stands_alone
from sfexport.video.timeline import Timeline


class KeyframeDecoder:
    """Decodes keyframes of a clip by a decoder of its own: one packet goes in, one frame comes out.

    One thread decodes, so that damage shows in the same way on all machines.
    """

    def __init__(self, decoder: Decoder) -> None:
        """Open the file of `decoder` once more."""
        self._decoder = decoder.single_threaded_copy()
        # The packets from the beginning, up to which they have been read, and if the file has been jumped in since.
        self._following: Iterator[av.Packet] = iter(())
        self._read = -1

    @property
    def frames_decoded(self) -> int:
        return self._decoder.frames_decoded

    def close(self) -> None:
        self._decoder.close()

    def frame(self, index: int, timeline: Timeline) -> av.VideoFrame | None:
        """Return the keyframe of this index; None if it cannot be decoded without other packets."""
        ordinal = int(timeline.order[index])
        try:
            packet = self._packet(ordinal, index, timeline)
            frames = [] if packet is None else self._decoder.decode_alone(ordinal, packet)
        except (av.error.FFmpegError, Lost):
            self._read = -1  # where the file is read is unknown
            return None
        if len(frames) != 1 or frames[0].pts != ordinal:
            return None
        frame = frames[0]
        # The second field of a frame may be in the next packet.
        is_field = frame.interlaced_frame and _makes_no_frame(ordinal + 1, timeline)
        return None if is_field or frame.is_corrupt or not stands_alone(frame) else frame

    def _packet(self, ordinal: int, index: int, timeline: Timeline) -> av.Packet | None:
        """Return a packet: by a jump if the container leads there, else by reading on from the beginning."""
        point = timeline.seek_point(index)
        if point is not None and point.ordinal == ordinal:
            try:
                landed, packet = next(self._decoder.landed(point, timeline))
                self._read = -1
                return packet if landed == ordinal else None
            except Lost:
                self._read = -1
        if not 0 <= self._read < ordinal:
            self._decoder.rewind()
            self._following, self._read = packets(self._decoder.container, self._decoder.stream), -1
        skipped = ordinal - self._read - 1
        self._read = ordinal
        return next(islice(self._following, skipped, None), None)


def _makes_no_frame(ordinal: int, timeline: Timeline) -> bool:
    return ordinal < len(timeline.frames) and timeline.frames[ordinal] < 0
