"""A library that is installed but does not load is told from one that is absent, with what its import raised."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import assert_says

from sfexport.demo.run import DemoPaths as Tree

PART = "raise ImportError(\"cannot import name 'part' from 'helper.parts'\", name='helper.parts')"
BROKEN = {
    "part of another version": (PART, "ImportError: cannot import name 'part'"),
    "module of another version": ("import sys.parts", "No module named 'sys.parts'"),
    "shared library": ("raise OSError('libhelper.so.13: cannot open shared object file')", "OSError: libhelper.so.13"),
    "another NumPy": ("import numpy; numpy.no_such_type", "AttributeError: module 'numpy' has no attribute"),
}
ABSENT = "raise ModuleNotFoundError(\"No module named '{0}'\", name='{0}')"


def run(path: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """`sfexport` in a process of its own, which finds the modules in `path` first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    argv = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)


def replace_module(path: Path, name: str, content: str) -> Path:
    (path / f"{name}.py").write_text(content + "\n")
    return path


COMMANDS = {
    "onnxruntime": lambda tree: ("sfexport", "ask", tree.engines, tree.clip, "-q", "What is it?"),
    "torch": lambda tree: ("sfexport", "parity", tree.engines, tree.clip),
    "triton": lambda tree: ("sfexport.kernels.check",),
}


CASES = [("torch", kind) for kind in BROKEN] + [("onnxruntime", "shared library"), ("triton", "another NumPy")]


@pytest.mark.parametrize(("library", "kind"), CASES)
def test_what_the_import_raised_is_said(library: str, kind: str, tree: Tree, tmp_path: Path) -> None:
    if library == "triton":
        pytest.importorskip("torch", reason="the kernel's check runs in PyTorch, which is not installed")
    content, said = BROKEN[kind]
    result = run(replace_module(tmp_path, library, content), *COMMANDS[library](tree))
    assert result.returncode == 1, result.stderr
    assert_says(result.stderr, "which does not load", said, "Install it again: ")
    assert "Traceback" not in result.stderr
    assert "not installed" not in result.stderr


@pytest.mark.parametrize("library", COMMANDS)
def test_an_absent_library_is_not_installed(library: str, tree: Tree, tmp_path: Path) -> None:
    if library == "triton":
        pytest.importorskip("torch", reason="the kernel's check runs in PyTorch, which is not installed")
    result = run(replace_module(tmp_path, library, ABSENT.format(library)), *COMMANDS[library](tree))
    assert result.returncode == 1, result.stderr
    assert_says(result.stderr, f"the library '{library}', which is not installed", "Install it: ")


def test_the_demo_goes_on_with_recorded_outputs(tmp_path: Path) -> None:
    path = replace_module(tmp_path, "torch", BROKEN["part of another version"][0])
    result = run(path, "sfexport", "demo", "-o", tmp_path / "demo")
    assert result.returncode == 0, result.stderr
    assert_says(result.stdout, "'helper', which does not load", "recorded outputs", "parity passed")
