"""Directories that appear whole or not at all: what the verbs' own tests cannot show."""

from __future__ import annotations

from pathlib import Path

from sfexport.atomic import new_directory


def test_a_directory_that_another_is_writing_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with new_directory(target, "manifest") as first:
        (first / "manifest").write_text("first")
        with new_directory(target, "manifest") as second:
            (second / "manifest").write_text("second")
        assert (target / "manifest").read_text() == "second"
        assert first.is_dir()
    assert (target / "manifest").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_only_directories_left_for_the_same_target_are_removed(tmp_path: Path) -> None:
    for name in (".made.abc.partial", ".made-2.abc.partial", "made.partial"):
        (tmp_path / name).mkdir()
    with new_directory(tmp_path / "made", "manifest") as directory:
        (directory / "manifest").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"made", ".made-2.abc.partial", "made.partial"}
