"""Frame sampling: the reference's tables, and properties of both rules."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfexport.errors import InputError
from sfexport.video.sampling import SAMPLING_RULES, eval_indices, linspace_indices, sample_indices

TABLES = json.loads((Path(__file__).parents[1] / "data" / "frame_sampling.json").read_text())
EVAL_KEY = re.compile(r"N(\d+)_fps([\d.]+)_target(\d+)_M(\d+)")
LINSPACE_KEY = re.compile(r"N(\d+)_M(\d+)")

totals = st.integers(1, 5000)
counts = st.integers(1, 200)
rates = st.floats(0.01, 240.0)


@pytest.mark.parametrize("key", TABLES["linspace_demo"])
def test_linspace_table(key: str) -> None:
    total, count = map(int, LINSPACE_KEY.fullmatch(key).groups())
    assert linspace_indices(total, count) == TABLES["linspace_demo"][key]


@pytest.mark.parametrize("table", ["lmms_eval_get_frame_indices", "train_get_frame_indices(mm_utils)"])
def test_eval_tables(table: str) -> None:
    for key, expected in TABLES[table].items():
        total, fps, target, count = EVAL_KEY.fullmatch(key).groups()
        assert eval_indices(int(total), float(fps), int(count), float(target)) == expected, key


def test_every_table_is_checked() -> None:
    assert set(TABLES) == {"linspace_demo", "lmms_eval_get_frame_indices", "train_get_frame_indices(mm_utils)"}


@given(total=totals, count=counts)
def test_linspace_properties(total: int, count: int) -> None:
    indices = linspace_indices(total, count)
    assert len(indices) == count
    assert indices == sorted(indices)
    assert indices[0] == 0
    assert indices[-1] == (total - 1 if count > 1 else 0)
    assert all(type(i) is int for i in indices)


@given(total=totals, fps=rates, count=counts)
def test_eval_properties(total: int, fps: float, count: int) -> None:
    indices = eval_indices(total, fps, count)
    assert 1 <= len(indices) <= count
    assert all(a < b for a, b in zip(indices, indices[1:], strict=False))
    assert indices[0] >= 0 and indices[-1] < total
    assert all(type(i) is int for i in indices)


@given(total=totals, fps=rates, count=counts)
def test_sample_indices_dispatches(total: int, fps: float, count: int) -> None:
    assert sample_indices("linspace", total, fps, count) == linspace_indices(total, count)
    assert sample_indices("eval", total, fps, count) == eval_indices(total, fps, count)


def test_unknown_rule_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="'best'") as caught:
        sample_indices("best", 10, 30.0, 4)
    assert all(rule in caught.value.hint for rule in SAMPLING_RULES)


@pytest.mark.parametrize("rule", SAMPLING_RULES)
@pytest.mark.parametrize(("total", "count"), [(0, 4), (10, 0), (-1, 4), (10, -2)])
def test_counts_below_one_are_refused(rule: str, total: int, count: int) -> None:
    with pytest.raises(InputError):
        sample_indices(rule, total, 30.0, count)


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_rates_are_refused(fps: float) -> None:
    with pytest.raises(InputError, match="fps"):
        eval_indices(10, fps, 4)
