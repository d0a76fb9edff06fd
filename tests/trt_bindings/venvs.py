"""Throw-away environments with TensorRT's real Python bindings, one for each version that sfexport knows.

They are made once, in a folder that SFEXPORT_TENSORRT_VENVS names (otherwise in the system's temporary folder), from
wheels of the package index: 1 MB of bindings each, and 44 MB of lean runtime for the plugin registry.
Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .stubs import SOURCES, Layout, Unavailable, layout_of, make_stubs

TESTS = SOURCES.parent
ROOT = TESTS.parent
COMMAND = "python -m tests.trt_bindings"  # makes them all


@dataclass(frozen=True)
class Wheels:
    """`lean` may be newer than the bindings: within a major version the libraries stay compatible. `numpy`: a field's
    data (trt.PluginField.data) is right only with NumPy 1 up to TensorRT 10.15, and quick plugins fail with 2.4 up to
    10.16.
    """

    bindings: str
    lean: str
    numpy: str


# There is no wheel of the lean runtime older than 10.15; the bindings of 10.3 run on the registry of 10.16.
WHEELS = {
    "10.3": Wheels("tensorrt-cu12-bindings==10.3.0", "tensorrt-lean-cu13-libs==10.16.1.11", "numpy<2"),
    "10.16": Wheels("tensorrt-cu13-bindings==10.16.1.11", "tensorrt-lean-cu13-libs==10.16.1.11", "numpy<2.4"),
    "11.4": Wheels("tensorrt-cu13-bindings==11.4.0.106", "tensorrt-lean-cu13-libs==11.4.0.106", "numpy"),
}
SFEXPORT_NEEDS = ("onnx>=1.16", "onnx-ir>=1.0")  # what sfexport's plugin modules import


@dataclass(frozen=True)
class Environment:
    """One version's bindings: `python` with these `variables` imports them as `tensorrt`."""

    version: str
    python: Path
    layout: Layout

    @property
    def variables(self) -> dict[str, str]:
        path = os.pathsep.join(str(p) for p in (self.layout.packages, TESTS, ROOT))
        return {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": path,
            "LD_LIBRARY_PATH": str(self.layout.libraries),
            "SFEXPORT_EXPRESSIONS": str(self.layout.expressions),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """This Python with some arguments; stdout and stderr as text, whatever the exit status."""
        command = [str(part) for part in (self.python, *arguments)]
        environment = self.variables | variables
        # In a folder of its own: Python looks for modules there first.
        folder = self.layout.packages
        return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)

    def json(self, *arguments: str | Path, **variables: str) -> Any:
        """The last line that a program printed, read as JSON; AssertionError with what it said if it failed."""
        done = self.run(*arguments, **variables)
        assert done.returncode == 0, f"{arguments} with TensorRT {self.version}: {done.stderr or done.stdout}"
        return json.loads(done.stdout.splitlines()[-1])

    def code(self, text: str, **variables: str) -> Any:
        """Run a program given as text, and read the JSON of its last line."""
        return self.json("-c", text, **variables)

    def attributes_missing(self, names: Sequence[str]) -> list[str]:
        """Those of some dotted names ('IBuilderConfig.set_flag', 'plugin.register') that the bindings do not have."""
        return self.json("-m", "trt_bindings.probe", *names)


def cache() -> Path:
    named = os.environ.get("SFEXPORT_TENSORRT_VENVS")
    return Path(named) if named else Path(tempfile.gettempdir()) / "sfexport-tensorrt"


def find(version: str) -> Environment | None:
    """What `make` left behind, or None. Compiles the stand-ins again if their source has changed."""
    folder = cache() / version
    wheels = WHEELS[version]
    complete = _stamp(folder, *_packages(wheels)), _stamp(_lean_folder(wheels), wheels.lean)
    return _environment(version) if all(stamp.is_file() for stamp in complete) else None


def make(version: str, on_step: Callable[[str], None] = lambda line: None) -> Environment:
    """Find an environment, or install it (needs a network).

    Raises:
        Unavailable: with the installer's or the compiler's last words.
    """
    folder, wheels = cache() / version, WHEELS[version]
    if not _stamp(folder, *_packages(wheels)).is_file():
        on_step(f"installing {wheels.bindings}")
        _call([sys.executable, "-m", "venv", "--clear", str(folder)])
        _install(_python(folder), *_packages(wheels))
        _stamp(folder, *_packages(wheels)).touch()
    lean = _lean_folder(wheels)
    if not _stamp(lean, wheels.lean).is_file():
        on_step(f"installing {wheels.lean}")
        _install(_python(folder), "--target", str(lean), "--no-deps", "--upgrade", wheels.lean)
        _stamp(lean, wheels.lean).touch()
    return _environment(version)


def _environment(version: str) -> Environment:
    folder = cache() / version
    libraries = _lean_folder(WHEELS[version]) / "tensorrt_lean_libs"
    digest = hashlib.sha256(b"".join((SOURCES / f).read_bytes() for f in ("stubs.c", "stubs.py", "expressions.cpp")))
    built = folder / f"stubs-{digest.hexdigest()[:12]}"
    layout = layout_of(built, libraries)
    if not layout.expressions.is_file():
        layout = make_stubs(built, _bindings(folder), libraries)
    return Environment(version, _python(folder), layout)


def _stamp(folder: Path, *packages: str) -> Path:
    """A file written last: an interrupted installation is repeated, and so is one of other packages."""
    return folder / f"complete-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:12]}"


def _packages(wheels: Wheels) -> tuple[str, ...]:
    return wheels.bindings, wheels.numpy, *SFEXPORT_NEEDS


def _lean_folder(wheels: Wheels) -> Path:
    return cache() / wheels.lean.replace("==", "-")


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _bindings(folder: Path) -> Path:
    found = sorted(folder.glob("lib/python*/site-packages/tensorrt_bindings"))
    if not found:
        raise Unavailable(f"the wheel left no package tensorrt_bindings in {folder}")
    return found[0]


def _install(python: Path, *arguments: str) -> None:
    # Only wheels: the source packages of these names fetch the full libraries from elsewhere.
    options = ("--quiet", "--disable-pip-version-check", "--only-binary", ":all:", "--timeout", "20", "--retries", "1")
    _call([str(python), "-m", "pip", "install", *options, *arguments])


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise Unavailable(f"{' '.join(command[1:])}: {words[-1]}")
