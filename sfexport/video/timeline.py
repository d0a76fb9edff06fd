"""Where each frame of a clip lies: presentation times and seek points, read from packets. Imports numpy only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PacketFacts:
    """What the timeline needs to know of one compressed frame; times in the stream's time base.

    Attributes:
        is_shown: False for packets that are decoded only because others refer to them (edit lists).
    """

    pts: int | None
    dts: int | None
    duration: int
    is_key: bool
    is_shown: bool


@dataclass(frozen=True)
class Timeline:
    """The frames of a clip in presentation order.

    Attributes:
        stamps: int64 [frames], increasing: presentation times, or 0, 1, 2, ... where the file has no usable ones.
        keys: int64 [k], increasing: times at which decoding can start; empty where it must start at the beginning.
        is_timed: whether stamps are times.
        last_duration: how long the last frame shows, in the time base; 0 where unknown.
    """

    stamps: np.ndarray
    keys: np.ndarray
    is_timed: bool
    last_duration: int = 0

    @classmethod
    def from_packets(cls, packets: Iterable[PacketFacts], trust_times: bool = True) -> Timeline:
        """The timeline of packets in file order; `trust_times` False says that their pts mean nothing."""
        packets = list(packets)
        shown = [p for p in packets if p.is_shown]
        if not (trust_times and _has_usable_times(packets)):
            return cls.counted(len(shown))
        stamps = np.unique(np.array([p.pts for p in shown], np.int64))
        # Equal times for most frames are no times. A few are hidden frames of VP8 and the like.
        if 2 * len(stamps) <= len(shown) and len(shown) > 1:
            return cls.counted(len(shown))
        keys = np.unique(np.array([p.pts for p in packets if p.is_key], np.int64))
        last = max(shown, key=lambda p: p.pts, default=None)
        return cls(stamps, keys, True, last.duration if last else 0)

    @classmethod
    def counted(cls, frames: int) -> Timeline:
        """For files without times: frames are counted from the first one, and there are no seek points."""
        return cls(np.arange(frames, dtype=np.int64), np.empty(0, np.int64), False)

    def starting_at(self, stamp: int) -> Timeline:
        """This timeline, given the first stamp that the decoder gives: earlier frames never come out.

        A stamp that no packet announced shows that the times mean nothing; then frames are counted.
        """
        if not self.is_timed:
            return self
        at = int(np.searchsorted(self.stamps, stamp))
        if at == len(self.stamps) or self.stamps[at] != stamp:
            return self.counted(len(self.stamps))
        return Timeline(self.stamps[at:], self.keys, True, self.last_duration)

    def key_before(self, stamp: int, steps_back: int = 0) -> int | None:
        """The last seek point not after `stamp`, or one `steps_back` earlier; None: start at the beginning."""
        at = int(np.searchsorted(self.keys, stamp, side="right")) - 1 - steps_back
        return int(self.keys[at]) if at > 0 else None

    def is_worth_a_seek(self, position: int, stamp: int) -> bool:
        """Whether jumping to the seek point of `stamp` skips any frame after `position`."""
        key = self.key_before(stamp)
        if key is None or key <= position:
            return False
        after_position, at_key = np.searchsorted(self.stamps, position, "right"), np.searchsorted(self.stamps, key)
        return bool(at_key > after_position)

    def span(self) -> int:
        """From the first frame's start to the last one's end, in the time base; 0 without times."""
        if not self.is_timed or not len(self.stamps):
            return 0
        return int(self.stamps[-1] - self.stamps[0]) + self.last_duration


def _has_usable_times(packets: list[PacketFacts]) -> bool:
    """Every frame has a time, and the file is one recording: its decoding order never jumps back.

    Joined recordings whose clocks restart would have their frames interleaved by sorting.
    """
    if any(p.pts is None for p in packets):
        return False
    dts = [p.dts for p in packets if p.dts is not None]
    return all(a <= b for a, b in zip(dts, dts[1:], strict=False))
