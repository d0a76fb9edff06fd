"""Commands and functions measured in processes of their own: seconds, peak resident memory, bytes written.

Imports nothing but the standard library: on Linux the parent's memory counts in a child's peak, so it has to be small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHILD = "--child"


@dataclass(frozen=True)
class Run:
    """Seconds from a process's start to its end, its peak resident memory, and what it printed."""

    seconds: float
    peak_rss_mb: float
    stdout: str


def run(command: Sequence[object], extra: Mapping[str, str] | None = None) -> Run:
    """Run a command with the repository on its path; its messages go where ours go. Raises CalledProcessError.

    Args:
        extra: environment variables to set.
    """
    line = [str(part) for part in command]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])} | dict(extra or {})
    start = time.perf_counter()
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment)
    stdout = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, line)
    # In KiB on Linux, in bytes on macOS.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(round(seconds, 2), round(peak / 1e6, 1), stdout)


def measure(
    script: str,
    mode: str,
    *arguments: object,
    python: str = sys.executable,
    extra: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run a function of `script` (see main_or_child) in a new process: what it returned, with seconds and memory."""
    done = run([python, script, CHILD, mode, *arguments], extra)
    # Libraries print too; the last line is ours.
    return {"seconds": done.seconds, "peak_rss_mb": done.peak_rss_mb, **json.loads(done.stdout.splitlines()[-1])}


def main_or_child(main: Callable[[], Any], children: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """A script's last call: main(), or, in a process that `measure` started, one of its functions."""
    if sys.argv[1:2] == [CHILD]:
        print("\n" + json.dumps(children[sys.argv[2]](*sys.argv[3:])))
    else:
        sys.exit(main())


def written_mb(directory: Path) -> float:
    """Of a directory's own files; links are not followed."""
    files = (f for f in directory.rglob("*") if f.is_file() and not f.is_symlink())
    return round(sum(f.stat().st_size for f in files) / 1e6, 3)
