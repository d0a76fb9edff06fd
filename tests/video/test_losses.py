"""Frames lost in transmission: the others are what FFmpeg gives with one thread, in any order, on any machine."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from cores import set_cores
from fuzz.clips import in_order, numbered_clip

from sfexport.errors import VideoError
from sfexport.video.decoding import Video


def with_hole(path: Path, codec: str, seed: int) -> Path:
    """A transport stream in which some bytes are zero: one or more of its packets are lost."""
    numbered_clip(path, codec)
    data, rng = bytearray(path.read_bytes()), random.Random(seed)
    start, size = rng.randrange(len(data)), rng.choice([100, 256, 600])
    data[start : start + size] = bytes(len(data[start : start + size]))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("seed", [16, 37, 38, 39])
def test_frames_do_not_depend_on_order_or_cores(
    codec: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = with_hole(tmp_path / "clip.ts", codec, seed)
    known = {frame.tobytes() for frame in in_order(path)}
    outcomes: list[list[bytes] | str] = []
    for threads in (1, 3, 16):
        set_cores(monkeypatch, threads)
        try:
            with Video.open(path) as video:
                indices = list(range(video.info.frame_count))
                ordered = [frame.copy() for frame in video.frames(indices)]
        except VideoError as error:
            outcomes.append(str(error))
            continue
        outcomes.append([frame.tobytes() for frame in ordered])
        assert known.issuperset(outcomes[-1])
        shuffled = random.Random(seed).sample(indices, len(indices))
        with Video.open(path) as video:
            for index, frame in zip(shuffled, video.frames(shuffled), strict=True):
                assert np.array_equal(frame, ordered[index]), index
    assert outcomes[0] == outcomes[1] == outcomes[2]
