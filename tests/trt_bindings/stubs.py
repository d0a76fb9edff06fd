"""Shared objects that let TensorRT's Python bindings be imported, and a `tensorrt` package made of them.

They are generated for tests and never shipped. Needs gcc and g++. Standard library only.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent
WANTED = re.compile(rb"lib(nvinfer|nvonnxparser|nvinfer_plugin)\.so\.(\d+)\0")


class Unavailable(Exception):
    """The bindings cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class Layout:
    """What a process needs in PYTHONPATH, in LD_LIBRARY_PATH, and for expressions.py."""

    packages: Path
    libraries: Path
    expressions: Path
    real_registry: bool


def make_stubs(directory: Path, bindings: Path, lean: Path | None) -> Layout:
    """Compile the shared objects that `bindings` asks for and lay out a package `tensorrt`.

    Args:
        directory: empty or new; everything goes there.
        bindings: the installed package `tensorrt_bindings`, a directory.
        lean: directory with libnvinfer_lean.so.N of the same major version, for a real plugin registry; None for
            a registry that is null.

    Raises:
        Unavailable: no compiler, or the package is not TensorRT's bindings.
    """
    layout = layout_of(directory, lean)
    for folder in (layout.packages, layout.libraries):
        folder.mkdir(parents=True, exist_ok=True)
    _compile_libraries(layout.libraries, wanted_libraries(bindings), lean)
    _run("g++", "-std=c++17", "-O1", "-shared", "-fPIC", SOURCES / "expressions.cpp", "-o", layout.expressions)
    package = layout.packages / "tensorrt"
    package.unlink(missing_ok=True)
    package.symlink_to(bindings.resolve(), target_is_directory=True)
    return layout


def layout_of(directory: Path, lean: Path | None) -> Layout:
    libraries = directory / "libraries"
    return Layout(directory / "packages", libraries, libraries / "libexpressions.so", lean is not None)


def wanted_libraries(bindings: Path) -> dict[str, str]:
    """Library name to the major version that the bindings are linked with: {'nvinfer': '10', ...}."""
    extension = bindings / "tensorrt.so"
    if not extension.is_file():
        raise Unavailable(f"{bindings} does not hold TensorRT's Python bindings")
    found = {name.decode(): major.decode() for name, major in WANTED.findall(extension.read_bytes())}
    if set(found) != {"nvinfer", "nvonnxparser", "nvinfer_plugin"}:
        raise Unavailable(f"{extension} asks for {sorted(found)}, which is not what is known of the bindings")
    return found


def _compile_libraries(libraries: Path, wanted: dict[str, str], lean: Path | None) -> None:
    """All entry points live in libnvinfer; the other two only need to exist."""
    for name, major in wanted.items():
        file = f"lib{name}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", libraries / file]
        if name != "nvinfer":
            command += ["-x", "c", "/dev/null"]
        elif lean is None:
            command += [SOURCES / "stubs.c"]
        else:
            real = lean.resolve() / f"libnvinfer_lean.so.{major}"
            command += ["-DREAL_REGISTRY", SOURCES / "stubs.c", "-Wl,--no-as-needed", real, f"-Wl,-rpath,{real.parent}"]
        _run(*command)


def _run(*command: str | Path) -> None:
    if shutil.which(command[0]) is None:
        raise Unavailable(f"{command[0]} is not installed; the stand-ins for TensorRT's libraries need a compiler")
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {done.stderr.strip()}")
