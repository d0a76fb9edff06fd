"""Commands that run engines start again with huge pages, once, and only where that helps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sfexport.engines import huge_pages


@pytest.fixture
def relaunched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list:
    """What a system with glibc that gives huge pages to those who ask would be asked to run."""
    calls: list = []
    enabled = tmp_path / "enabled"
    enabled.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_ENABLED", enabled)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(os, "execv", lambda file, arguments: calls.append((file, arguments)))
    monkeypatch.setattr(sys, "argv", ["sfexport", "ask", "engines"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "sfexport", "ask", "engines"])
    monkeypatch.setattr(os, "environ", {})
    return calls


def test_the_same_command_once(relaunched: list) -> None:
    huge_pages.relaunch_with_huge_pages()
    assert relaunched == [(sys.executable, [sys.executable, "-X", "dev", "sfexport", "ask", "engines"])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    huge_pages.relaunch_with_huge_pages()
    assert len(relaunched) == 1


@pytest.mark.parametrize("verb", [[], ["--help"], ["export"], ["inspect"]])
def test_not_for_what_runs_no_engine(verb: list[str], relaunched: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sfexport", *verb])
    huge_pages.relaunch_with_huge_pages()
    assert relaunched == []


@pytest.mark.parametrize("text", ["[always] madvise never", "always madvise [never]"])
def test_not_where_the_system_decides_otherwise(text: str, relaunched: list) -> None:
    huge_pages._ENABLED.write_text(text)
    huge_pages.relaunch_with_huge_pages()
    huge_pages._ENABLED.unlink()
    huge_pages.relaunch_with_huge_pages()
    assert relaunched == []


@pytest.mark.parametrize("library", [("glibc", "2.31"), ("", "")])
def test_not_without_a_library_that_can(
    library: tuple[str, str], relaunched: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: library)
    huge_pages.relaunch_with_huge_pages()
    assert relaunched == []


def test_tunables_of_the_user_are_left_alone(relaunched: list) -> None:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.check=1"
    huge_pages.relaunch_with_huge_pages()
    assert relaunched == []
