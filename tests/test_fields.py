"""Typed reading of JSON objects."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfexport.errors import BundleError, CheckpointError
from sfexport.fields import SHOWN, Count, Fields, PositiveNumber, read_fields, shown, unknown_fields


class Sample(Fields, frozen=True, kw_only=True):
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset({"comment"})

    layers: Count
    theta: PositiveNumber = 10000.0
    tied: bool = False
    side: str | None = None


def test_present_fields_are_read_and_absent_or_null_ones_take_their_default() -> None:
    sample = read_fields(Sample, {"layers": 3, "theta": None, "tied": True, "comment": [], "else": 1}, "f.json")
    assert sample == Sample(layers=3, theta=10000.0, tied=True, side=None)


def test_a_whole_number_is_a_number() -> None:
    assert read_fields(Sample, {"layers": 3, "theta": 7}, "f.json").theta == 7


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "layers"),
        ({"layers": 0}, "layers"),
        ({"layers": True}, "layers"),
        ({"layers": 2.5}, "layers"),
        ({"layers": "3"}, "layers"),
        ({"layers": 10**400}, "layers"),
        ({"layers": 3, "tied": "false"}, "tied"),
        ({"layers": 3, "tied": 0}, "tied"),
        ({"layers": 3, "theta": float("inf")}, "theta"),
        ({"layers": 3, "theta": float("nan")}, "theta"),
        ({"layers": 3, "theta": 10**400}, "theta"),
        ({"layers": 3, "theta": -1}, "theta"),
        ({"layers": 3, "side": ["left"]}, "side"),
        ({"layers": "\ud800"}, "layers"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values: dict, said: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^f\.json: .*{said}"):
        read_fields(Sample, values, "f.json")


def test_the_error_is_the_callers() -> None:
    with pytest.raises(BundleError, match="layers"):
        read_fields(Sample, {}, "f.json", BundleError)


def test_fields_that_nobody_knows_are_named() -> None:
    assert unknown_fields(Sample, {"layers": 1, "comment": 2, "zeta": 3, "alpha": 4}) == ["alpha", "zeta"]


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)


@given(st.dictionaries(st.sampled_from(["layers", "theta", "tied", "side", "other"]), VALUES))
def test_any_object_is_read_or_refused(values: dict) -> None:
    try:
        sample = read_fields(Sample, values, "f.json")
    except CheckpointError as error:
        assert str(error).startswith("f.json: ")
    else:
        assert sample.layers == values["layers"] and type(sample.tied) is bool


def test_long_values_are_cut_in_messages() -> None:
    assert len(shown("x" * 10_000)) == SHOWN + 3
    assert shown("\x1b[31m") == "'\\x1b[31m'"
