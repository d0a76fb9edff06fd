"""All that `sfexport doctor` asks of the operating system, in one class, so that a test can describe any machine.

Every method answers None (or nothing) instead of raising: an examination must end on any machine.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 60  # a command that says nothing for so long is given up


@dataclass(frozen=True)
class Output:
    """What a command printed and how it ended."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Interpreter:
    """The Python that runs: its version, file, directory, and (other than that inside a venv) its base directory."""

    version: str
    executable: str
    prefix: str
    base_prefix: str


class Probe:
    """This machine."""

    def system(self) -> tuple[str, str]:
        """Operating system and architecture: ('Linux', 'aarch64')."""
        return platform.system(), platform.machine()

    def interpreter(self) -> Interpreter:
        return Interpreter(platform.python_version(), sys.executable, sys.prefix, sys.base_prefix)

    def read_text(self, path: str) -> str | None:
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace").rstrip("\0\n")
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def names(self, directory: str) -> list[str]:
        """What lies in a directory."""
        try:
            return sorted(os.listdir(directory))
        except OSError:
            return []

    def run(self, *command: str) -> Output | None:
        """A command's output, whatever its exit code; None if there is no such command or it hangs."""
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
        except (OSError, subprocess.SubprocessError):
            return None
        return Output(done.returncode, done.stdout, done.stderr)

    def package(self, name: str) -> str | None:
        """The installed version of a Python distribution."""
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def has_module(self, name: str) -> bool:
        """Whether a top-level Python module can be found; it is not imported."""
        try:
            return importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):
            return False

    def find_library(self, name: str) -> str | None:
        """The file name of a shared library on the loader's path: 'nvinfer' -> 'libnvinfer.so.10'."""
        try:
            return ctypes.util.find_library(name)
        except OSError:
            return None

    def load_library(self, name: str) -> Any:
        """A shared library's functions; None if it is not there."""
        try:
            return ctypes.CDLL(name)
        except OSError:
            return None

    def onnxruntime_providers(self) -> list[str] | None:
        """What ONNX Runtime can run on; None if it cannot be imported, for whatever reason."""
        try:
            import onnxruntime

            return list(onnxruntime.get_available_providers())
        except Exception:
            return None

    def disk_free(self) -> int | None:
        """Bytes free where the command was started."""
        try:
            return shutil.disk_usage(".").free
        except OSError:
            return None
