"""The timeline: presentation order and seek points out of packet facts."""

from __future__ import annotations

from sfexport.video.timeline import PacketFacts, Timeline


def packet(pts: int | None, dts: int | None = None, key: bool = False, shown: bool = True) -> PacketFacts:
    return PacketFacts(pts, dts, 10, key, shown)


def simple(frames: int = 100, gop: int = 10) -> Timeline:
    return Timeline.from_packets(packet(10 * i, 10 * i, key=i % gop == 0) for i in range(frames))


def test_packets_in_decoding_order_become_frames_in_presentation_order() -> None:
    timeline = Timeline.from_packets([packet(0, -20, key=True), packet(30, -10), packet(10, 0), packet(20, 10)])
    assert timeline.is_timed
    assert timeline.stamps.tolist() == [0, 10, 20, 30]
    assert timeline.keys.tolist() == [0]
    assert timeline.span() == 40


def test_packets_that_are_not_shown_are_no_frames_but_can_be_seek_points() -> None:
    timeline = Timeline.from_packets(
        [packet(-20, -20, key=True, shown=False), packet(-10, -10, shown=False), packet(0)]
    )
    assert timeline.stamps.tolist() == [0]
    assert timeline.keys.tolist() == [-20]


def test_without_times_frames_are_counted() -> None:
    timeline = Timeline.from_packets([packet(None, key=True), packet(None), packet(20)])
    assert not timeline.is_timed
    assert timeline.stamps.tolist() == [0, 1, 2]
    assert not len(timeline.keys)
    assert timeline.span() == 0


def test_distrusted_times_are_not_used() -> None:
    packets = [packet(0, key=True), packet(10)]
    assert not Timeline.from_packets(packets, trust_times=False).is_timed


def test_joined_recordings_whose_clock_restarts_are_counted() -> None:
    assert not Timeline.from_packets([packet(10 * (i % 5), 10 * (i % 5)) for i in range(10)]).is_timed


def test_equal_times_for_most_frames_are_no_times() -> None:
    assert not Timeline.from_packets([packet(0, 0)] * 6).is_timed
    assert Timeline.from_packets([packet(0, 0)]).is_timed


def test_no_packets() -> None:
    timeline = Timeline.from_packets([])
    assert not len(timeline.stamps)
    assert timeline.span() == 0


def test_starting_at_drops_frames_that_never_come_out() -> None:
    assert simple(5).starting_at(20).stamps.tolist() == [20, 30, 40]


def test_starting_at_a_time_that_no_packet_has_falls_back_to_counting() -> None:
    for stamp in (15, 1000, -1):
        timeline = simple(5).starting_at(stamp)
        assert not timeline.is_timed
        assert len(timeline.stamps) == 5


def test_key_before() -> None:
    timeline = simple()
    assert timeline.key_before(250) == 200
    assert timeline.key_before(200) == 200
    assert timeline.key_before(250, steps_back=1) == 100
    # The first key packet is the beginning itself.
    assert timeline.key_before(99) is None
    assert timeline.key_before(250, steps_back=5) is None


def test_a_seek_is_worth_it_when_it_skips_frames() -> None:
    timeline = simple()
    assert timeline.is_worth_a_seek(position=50, stamp=250)
    assert not timeline.is_worth_a_seek(position=190, stamp=250), "the next frame is the seek point"
    assert not timeline.is_worth_a_seek(position=210, stamp=250), "the seek point lies behind"
    assert not timeline.is_worth_a_seek(position=0, stamp=90), "there is no seek point but the start"
