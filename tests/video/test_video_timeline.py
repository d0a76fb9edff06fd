"""The timeline: presentation order and seek points from what its packets say."""

from __future__ import annotations

from sfexport.video.timeline import PacketInfo, Timeline


def packet(
    pts: int | None, dts: int | None = None, key: bool = False, shown: bool = True, content: int | None = None
) -> PacketInfo:
    return PacketInfo(pts, dts, 10, key, shown, None, hash((pts, dts)) if content is None else content)


def simple(frames: int = 100, gop: int = 10) -> Timeline:
    timeline = Timeline.from_packets(packet(10 * i, 10 * i, key=i % gop == 0) for i in range(frames))
    assert timeline is not None
    return timeline


def test_packets_in_decoding_order_become_frames_in_presentation_order() -> None:
    timeline = Timeline.from_packets([packet(0, -20, key=True), packet(30, -10), packet(10, 0), packet(20, 10)])
    assert timeline is not None and timeline.is_timed
    assert timeline.stamps.tolist() == [0, 10, 20, 30]
    assert timeline.order.tolist() == [0, 2, 3, 1]
    assert [timeline.number(ordinal, 0) for ordinal in (0, 1, 2, 3, 4, None)] == [0, 3, 1, 2, -1, -1]
    assert timeline.span() == 40


def test_packets_that_are_not_shown_are_no_frames() -> None:
    timeline = Timeline.from_packets(
        [packet(-20, -20, key=True, shown=False), packet(-10, -10, shown=False), packet(0)]
    )
    assert timeline is not None
    assert timeline.stamps.tolist() == [0]
    assert [timeline.number(ordinal, 0) for ordinal in range(3)] == [-1, -1, 0]


def test_without_times_only_decoding_tells() -> None:
    assert Timeline.from_packets([packet(None, key=True), packet(None), packet(20)]) is None


def test_joined_recordings_whose_clock_restarts_have_no_usable_times() -> None:
    assert Timeline.from_packets([packet(10 * (i % 5), 10 * (i % 5)) for i in range(10)]) is None


def test_equal_times_are_no_times() -> None:
    assert Timeline.from_packets([packet(0, 0)] * 6) is None
    assert Timeline.from_packets([packet(0, 0)]) is not None


def test_decoding_gives_the_order() -> None:
    packets = [packet(None, key=True, content=i) for i in range(4)]
    timeline = Timeline.from_decoding(packets, [0, 2, 1])
    assert not timeline.is_timed and timeline.span() == 0
    assert timeline.order.tolist() == [0, 2, 1]
    assert [timeline.number(ordinal, 0) for ordinal in range(4)] == [0, 2, 1, -1]
    assert not len(timeline.seek_points), "there is no time to ask the container for"


def test_frames_that_no_packet_tells_apart_are_counted() -> None:
    timeline = Timeline.from_decoding([packet(0, 0, key=True), packet(10, 10)], [0, 0, 1])
    assert [timeline.number(0, counted) for counted in range(3)] == [0, 1, 2]
    assert not len(timeline.seek_points)


def test_no_packets() -> None:
    timeline = Timeline.from_packets([])
    assert timeline is not None and not len(timeline.stamps)
    assert timeline.span() == 0


def test_starting_at_drops_frames_that_never_come_out() -> None:
    timeline = simple(50).starting_at(20)
    assert timeline.stamps.tolist() == [10 * i for i in range(20, 50)]
    assert [timeline.number(ordinal, 0) for ordinal in (19, 20, 49)] == [-1, 0, 29]
    assert timeline.seek_points[:, [0, 3]].tolist() == [[20, 0], [30, 10], [40, 20]]


def test_seek_point() -> None:
    timeline = simple()
    assert timeline.seek_point(25).ordinal == 20
    assert timeline.seek_point(20).ordinal == 20
    # The first key packet is the beginning itself.
    assert timeline.seek_point(9) is None


def test_packets_that_look_alike_are_no_seek_points() -> None:
    alike = Timeline.from_packets(packet(10 * i, 10 * i, key=True, content=99 if i in (4, 6) else i) for i in range(8))
    assert alike is not None
    assert alike.seek_points[:, 0].tolist() == [0, 1, 2, 3, 5, 7]


def test_seek_points_that_prove_wrong_are_forgotten() -> None:
    timeline = simple()
    less = timeline.without_seek_points(timeline.seek_point(55), 2)
    assert less.seek_points[:, 0].tolist() == [0, 10, 20, 30, 60, 70, 80, 90]
    assert timeline.without_seek_points(timeline.seek_point(25), 100).seek_point(25) is None


def test_a_seek_is_worth_it_when_it_skips_packets() -> None:
    timeline = simple()
    assert timeline.is_worth_a_seek(passed=5, frame=25)
    assert not timeline.is_worth_a_seek(passed=19, frame=25), "the next packet is the seek point"
    assert not timeline.is_worth_a_seek(passed=21, frame=25), "the seek point lies behind"
    assert not timeline.is_worth_a_seek(passed=0, frame=9), "there is no seek point but the start"
