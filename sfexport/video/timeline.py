"""Find out from packets which packet makes which frame, and where decoding can start.

A packet is known by its ordinal: its position among the stream's packets when the file is read from the beginning.
Times after a jump may differ from those of a reading from the beginning; ordinals are recognised by content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class PacketInfo:
    """One compressed frame's properties for the timeline; times are in the stream's time base.

    Attributes:
        is_shown: False for packets that are decoded only because others refer to them (edit lists).
        place: bytes from the file's start; None if the container does not say.
        content: a hash of size and content.
        size: size in bytes.
        is_corrupt: the container flags a loss or a change here.
    """

    pts: int | None
    dts: int | None
    duration: int
    is_key: bool
    is_shown: bool
    place: int | None = None
    content: int = 0
    size: int = 0
    is_corrupt: bool = False


@dataclass(frozen=True)
class SeekPoint:
    """A key packet that decoding can start at.

    Attributes:
        ordinal: the packet's ordinal.
        pts: presentation time to seek.
        dts: decoding time to seek.
        frame: index of the packet's frame; after a jump here, earlier frames must not be used.
    """

    ordinal: int
    pts: int
    dts: int
    frame: int


@dataclass(frozen=True)
class Timeline:
    """The frames of a clip in presentation order.

    Attributes:
        order: int64 [frames]: the ordinal of the packet that makes each frame.
        frames: int64 [packets]: the frame that each packet makes, -1 for none; empty where packets do not tell
            frames apart.
        stamps: int64 [frames], increasing: presentation times, or 0, 1, 2, ... where the file has no usable ones.
        identities: int64 [packets]: a hash of each, by which it is recognised (see `identity`).
        has_places: True if identities contain the packets' places.
        seek_points: int64 [k, 4], ascending: the fields of each SeekPoint.
        is_timed: True if stamps are times.
        last_duration: duration of the last frame, in the time base; 0 if unknown.
        keyframes: int64 [k], ascending: the frames that key packets make, without those flagged as damaged.
    """

    order: np.ndarray
    frames: np.ndarray
    stamps: np.ndarray
    identities: np.ndarray
    seek_points: np.ndarray
    has_places: bool = False
    is_timed: bool = False
    last_duration: int = 0
    keyframes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @classmethod
    def from_packets(cls, packets: Iterable[PacketInfo], trust_times: bool = True) -> Timeline | None:
        """Make the timeline of the packets' times; None if they have no times that can be trusted (then decode).

        Args:
            packets: packets in file order.
            trust_times: False if their pts mean nothing.
        """
        packets = list(packets)
        shown = [(p.pts, ordinal) for ordinal, p in enumerate(packets) if p.is_shown]
        if not (trust_times and _has_usable_times(packets)):
            return None
        shown.sort()
        stamps = np.array([pts for pts, _ in shown], np.int64)
        if np.any(stamps[1:] == stamps[:-1]):
            return None
        order = np.array([ordinal for _, ordinal in shown], np.int64)
        last = packets[order[-1]].duration if len(order) else 0
        identities, has_places = _identities(packets)
        points = _seek_points(packets, identities, order)
        frames = _frames(order, len(packets))
        keyframes = _keyframes(packets, frames)
        return cls(order, frames, stamps, identities, points, has_places, True, last, keyframes)

    @classmethod
    def from_decoding(cls, packets: Sequence[PacketInfo], ordinals: Sequence[int | None]) -> Timeline:
        """Make the timeline of a clip that has been decoded once; `ordinals`: the frames' packets in output order."""
        known = [-1 if ordinal is None else ordinal for ordinal in ordinals]
        order = np.array(known, np.int64)
        is_clear = -1 not in known and len(set(known)) == len(known)
        identities, has_places = _identities(packets)
        points = _seek_points(packets, identities, order if is_clear else order[:0])
        frames = _frames(order, len(packets)) if is_clear else order[:0]
        stamps = np.arange(len(order), dtype=np.int64)
        keyframes = _keyframes(packets, frames)
        return cls(order, frames, stamps, identities, points, has_places, keyframes=keyframes)

    def starting_at(self, frame: int) -> Timeline:
        """Return this timeline without the frames before this one, which the decoder never gives."""
        if not frame:
            return self
        points = self.seek_points[self.seek_points[:, 3] >= frame] - [0, 0, 0, frame]
        frames, keyframes = np.maximum(self.frames - frame, -1), self.keyframes[self.keyframes >= frame] - frame
        order, stamps = self.order[frame:], self.stamps[frame:]
        return replace(self, order=order, stamps=stamps, frames=frames, seek_points=points, keyframes=keyframes)

    def number(self, ordinal: int | None, counted: int) -> int:
        """Return the index of the frame that a packet makes, or -1.

        If packets do not tell frames apart, it is `counted`, the number of frames that came out before.
        """
        if not len(self.frames):
            return counted
        return int(self.frames[ordinal]) if ordinal is not None and 0 <= ordinal < len(self.frames) else -1

    def without_seek_points(self, last: SeekPoint, count: int) -> Timeline:
        """Return this timeline without `last` and the seek points before it, `count` in all."""
        end = int(np.searchsorted(self.seek_points[:, 0], last.ordinal)) + 1
        return replace(self, seek_points=np.delete(self.seek_points, slice(max(end - count, 1), end), axis=0))

    def without_any_seek_point(self) -> Timeline:
        return replace(self, seek_points=self.seek_points[:0])

    def seek_point(self, frame: int, steps_back: int = 0) -> SeekPoint | None:
        """Return the last seek point not after `frame`, or one `steps_back` earlier; None: start at the beginning."""
        at = int(np.searchsorted(self.seek_points[:, 3], frame, side="right")) - 1 - steps_back
        # The first one is the beginning itself.
        return SeekPoint(*self.seek_points[at].tolist()) if at > 0 else None

    def is_worth_a_seek(self, passed: int, frame: int) -> bool:
        """Return whether a jump to the seek point of `frame` skips any packet after the ordinal `passed`."""
        point = self.seek_point(frame)
        return point is not None and point.ordinal > passed + 1

    def may_have_losses(self) -> bool:
        """Return whether a frame lasts over 1.5 times the median: one after it may be lost."""
        durations = np.diff(self.stamps)
        return self.is_timed and bool(len(durations) and durations.max() > 1.5 * np.median(durations))

    def span(self) -> int:
        """Return the time from the first frame's start to the last one's end, in the time base; 0 without times."""
        if not self.is_timed or not len(self.stamps):
            return 0
        return int(self.stamps[-1] - self.stamps[0]) + self.last_duration


def _frames(order: np.ndarray, packets: int) -> np.ndarray:
    frames = np.full(packets, -1, np.int64)
    frames[order] = np.arange(len(order))
    return frames


def _keyframes(packets: Sequence[PacketInfo], frames: np.ndarray) -> np.ndarray:
    """List the frames of key packets; none where packets do not tell frames apart."""
    keys = [i for i, p in enumerate(packets[: len(frames)]) if p.is_key and not p.is_corrupt and frames[i] >= 0]
    return np.sort(frames[keys])


def identity(place: int | None, content: int, has_places: bool) -> int:
    """Return a hash that recognises a packet wherever reading started; some containers have no stable places."""
    return hash((place, content)) if has_places else content


def _identities(packets: Sequence[PacketInfo]) -> tuple[np.ndarray, bool]:
    has_places = all(p.place is not None for p in packets)
    return np.array([identity(p.place, p.content, has_places) for p in packets], np.int64), has_places


def _seek_points(packets: Sequence[PacketInfo], identities: np.ndarray, order: np.ndarray) -> np.ndarray:
    """List key packets that have a time, make a frame and are unique, as long as their frames ascend with them.

    A recording with losses has none: its pixels after a loss depend on where the decoder began.
    """
    if any(packet.is_corrupt for packet in packets):
        return np.empty((0, 4), np.int64)
    frame_of = {int(ordinal): frame for frame, ordinal in enumerate(order)}
    names = identities.tolist()
    alike = Counter(names)
    points: list[tuple[int, int, int, int]] = []
    for ordinal, packet in enumerate(packets):
        if not packet.is_key or packet.pts is None or ordinal not in frame_of:
            continue
        is_first, frame = not points, frame_of[ordinal]
        if is_first or (alike[names[ordinal]] == 1 and frame > points[-1][3]):
            points.append((ordinal, packet.pts, packet.pts if packet.dts is None else packet.dts, frame))
    return np.array(points, np.int64).reshape(-1, 4)


def _has_usable_times(packets: list[PacketInfo]) -> bool:
    """Return whether every frame has a time, and decoding times never jump back.

    They do in joined recordings whose clocks restart; sorting would interleave the frames of those.
    """
    if any(p.pts is None for p in packets):
        return False
    dts = [p.dts for p in packets if p.dts is not None]
    return all(a <= b for a, b in zip(dts, dts[1:], strict=False))
