"""Values that callers pass: of the right type and in range, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import refusal

import sfexport
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.run import DemoPaths as Tree
from sfexport.errors import InputError
from sfexport.exporting.export import ExportOptions
from sfexport.values import as_path, one_of, whole_number

NO_COUNT = ("4", "", 2.5, 4.0, float("nan"), None, True, [4], b"4", 1j, object(), -1, 0, 10**30)


@pytest.mark.parametrize("value", [4, np.int64(4), np.uint8(4)])
def test_whole_numbers_are_taken(value: Any) -> None:
    assert whole_number(value, "--frames") == 4


@pytest.mark.parametrize("value", NO_COUNT)
def test_what_is_no_count_is_refused_by_name(value: Any) -> None:
    with pytest.raises(InputError, match="--frames must be"):
        whole_number(value, "--frames")


@pytest.mark.parametrize("value", ["FP32", "", None, 5, [], ["fp32"], b"fp32"])
def test_what_is_no_choice_is_refused_with_the_choices(value: Any) -> None:
    with pytest.raises(InputError, match="choose one of fp32, fp16"):
        one_of(value, "--precision", ("fp32", "fp16"))


@pytest.mark.parametrize("value", [None, 5, b"engines", [], "a\0b", "x" * 5000])
def test_what_is_no_path_is_refused(value: Any) -> None:
    for door in (sfexport.load, Checkpoint.open, lambda path: as_path(path, "The output")):
        with pytest.raises(InputError):
            door(value)


@pytest.mark.parametrize("output", [".", "/", "", "x" * 5000, "a\udcffb", "/dev/null/x"])
def test_outputs_that_cannot_be_are_refused(output: str, tree: Tree, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(tmp_path, "export", tree.checkpoint, "-o", output)
    refusal(tmp_path, "build", tree.bundle, "-o", output)
    refusal(tmp_path, "build", tree.checkpoint, "-o", output)


def test_path_that_is_not_there_is_a_path() -> None:
    assert as_path("nowhere/at/all", "The output") == Path("nowhere/at/all")


@pytest.mark.parametrize("value", [value for value in NO_COUNT if value is not None])
def test_python_and_the_options_refuse_the_same(value: Any, tree: Tree) -> None:
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(InputError, match="number of frames must be"):
        sfexport.load(tree.engines).encode(frames, frames=value)
    with pytest.raises(InputError, match="--frames must be"):
        ExportOptions(frames=value)
    with pytest.raises(InputError, match="--split-lm-head must be"):
        ExportOptions(split_lm_head=value)


@pytest.mark.parametrize("questions", ["What?", b"What?", 5, {"What?"}])
def test_questions_are_a_list(questions: Any, tree: Tree) -> None:
    with pytest.raises(InputError, match="questions is a list"):
        sfexport.load(tree.engines).encode(np.zeros((2, 32, 32, 3), np.uint8), questions=questions)
