"""Choose the frames of a clip that the model sees. Pure arithmetic: imports numpy and sfexport.errors only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sfexport.errors import InputError

SAMPLING_RULES = ("linspace", "eval")
SEEK_MODES = ("exact", "keyframe")


def sample_indices(rule: str, total: int, fps: float, count: int) -> list[int]:
    """Return frame indices by the named rule, in non-decreasing order, each in 0..total-1.

    Args:
        rule: one of SAMPLING_RULES.
        total: number of frames in the clip.
        fps: the clip's frames per second (only "eval" uses it).
        count: number of frames to choose.

    Raises:
        InputError: the rule is unknown, or a number has no meaning.
    """
    if rule == "linspace":
        return linspace_indices(total, count)
    if rule == "eval":
        return eval_indices(total, fps, count)
    raise InputError(f"There is no sampling rule {rule!r}.", f"Known rules: {', '.join(SAMPLING_RULES)}.")


def linspace_indices(total: int, count: int) -> list[int]:
    """Return exactly `count` indices spread over the whole clip; a shorter clip has some of them repeated.

    This is the rule of the reference's demo.

    Raises:
        InputError: `total` or `count` is below 1.
    """
    _check_counts(total, count)
    indices: list[int] = np.linspace(0, total - 1, count, dtype=int).tolist()
    return indices


def eval_indices(total: int, fps: float, count: int, target_fps: float = 2.0) -> list[int]:
    """Return at most `count` indices out of every n-th frame, with n such that these are `target_fps` per second.

    This is the rule of the reference's evaluation (and, with 4 frames per second, of its training). A short clip gives
    fewer than `count` frames, none of them twice.

    Raises:
        InputError: `total` or `count` is below 1, or a rate is not a positive finite number.
    """
    _check_counts(total, count)
    for name, rate in (("fps", fps), ("target_fps", target_fps)):
        if not (rate > 0 and math.isfinite(rate)):
            raise InputError(f"{name} is {rate!r}; it must be a positive number of frames per second.")
    step = max(round(fps / min(target_fps, fps)), 1)
    candidates = range(0, total, step)
    if len(candidates) < count:
        return list(candidates)
    # Spelled as in the reference: round() goes to the even neighbour, so the order of operations shows.
    scale = 1.0 * len(candidates) / count
    return [candidates[round((i + 1) * scale - 1)] for i in range(count)]


def nearest_keyframes(indices: Sequence[int], keyframes: np.ndarray, stamps: np.ndarray) -> list[int]:
    """Return for each frame index the keyframe nearest in time, of two as near ones the earlier.

    A keyframe is repeated if it is the nearest one of several frames.

    Args:
        indices: frame indices.
        keyframes: int64 [k]: indices of the keyframes, ascending, at least one.
        stamps: the frames' presentation times, increasing.
    """
    times, wanted = stamps[keyframes], stamps[np.asarray(indices, np.int64)]
    after = np.clip(np.searchsorted(times, wanted), 0, len(keyframes) - 1)
    before = np.maximum(after - 1, 0)
    nearest: list[int] = keyframes[np.where(wanted - times[before] <= times[after] - wanted, before, after)].tolist()
    return nearest


def check_seek_mode(seek: str) -> None:
    """Raise InputError for a way of seeking that there is not."""
    if seek not in SEEK_MODES:
        raise InputError(f"There is no way of seeking {seek!r}.", f"Known ones: {', '.join(SEEK_MODES)}.")


def _check_counts(total: int, count: int) -> None:
    if total < 1:
        raise InputError(f"A clip of {total} frames has none to choose from.")
    if count < 1:
        raise InputError(f"{count} frames were asked for; ask for at least 1.")
