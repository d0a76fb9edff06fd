"""Read facts about this machine from the operating system, in one class that tests replace to describe any machine.

Methods return None or an empty list instead of raising, so that `sfexport doctor` ends with a diagnosis anywhere.
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

TIMEOUT_SECONDS = 60  # a command that takes longer is stopped


@dataclass(frozen=True)
class Output:
    """A finished command's exit code and output.

    Attributes:
        code: exit code; negative: ended by that signal.
        stdout: text on the standard output.
        stderr: text on the standard error.
    """

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Interpreter:
    """The running Python.

    Attributes:
        version: '3.12.3'.
        executable: path of the interpreter.
        prefix: directory of the environment, as sys.prefix.
        base_prefix: directory of the base installation; inside a venv it differs from `prefix`.
    """

    version: str
    executable: str
    prefix: str
    base_prefix: str


class Probe:
    """Access to this machine's files, commands, Python packages and libraries."""

    def system(self) -> tuple[str, str]:
        """Return operating system and architecture: ('Linux', 'aarch64')."""
        return platform.system(), platform.machine()

    def interpreter(self) -> Interpreter:
        """Describe the running Python."""
        return Interpreter(platform.python_version(), sys.executable, sys.prefix, sys.base_prefix)

    def read_text(self, path: str) -> str | None:
        """Read a file as UTF-8, without NULs and newlines at its end; None if it cannot be read."""
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace").rstrip("\0\n")
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        """Check whether a path exists."""
        return os.path.exists(path)

    def names(self, directory: str) -> list[str]:
        """List the names in a directory, sorted; empty if it cannot be read."""
        try:
            return sorted(os.listdir(directory))
        except OSError:
            return []

    def run(self, *command: str) -> Output | None:
        """Run a command and return its output at any exit code; None if it cannot start or is stopped."""
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS)
        except (OSError, subprocess.SubprocessError):
            return None
        return Output(done.returncode, done.stdout, done.stderr)

    def package(self, name: str) -> str | None:
        """Return the installed version of a Python distribution; None if it is not installed."""
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def has_module(self, name: str) -> bool:
        """Check whether a top-level Python module can be found, without importing it."""
        try:
            return importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):
            return False

    def find_library(self, name: str) -> str | None:
        """Find a shared library's file name on the loader's path: 'nvinfer' -> 'libnvinfer.so.10'."""
        try:
            return ctypes.util.find_library(name)
        except OSError:
            return None

    def load_library(self, name: str) -> Any:
        """Load a shared library through ctypes; None if it cannot be loaded."""
        try:
            return ctypes.CDLL(name)
        except OSError:
            return None

    def onnxruntime_providers(self) -> list[str] | None:
        """List the execution providers of ONNX Runtime; None if it cannot be imported, for any reason."""
        try:
            import onnxruntime

            return list(onnxruntime.get_available_providers())
        except Exception:
            return None

    def disk_free(self) -> int | None:
        """Return the free bytes of the file system of the current directory; None: unknown."""
        try:
            return shutil.disk_usage(".").free
        except OSError:
            return None
