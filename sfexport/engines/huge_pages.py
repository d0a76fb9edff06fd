"""Start a command again with an allocator that asks for huge pages, for the weights.

Decoding on a CPU streams all weights through memory for every token, and in pages of 4 KB the processor's address
lookups hold it back: with 2 MB pages the full-size INT4 decoder was 1.05 to 1.3 times as fast
(docs/benchmarks/full_size.md).
Most Linux systems give huge pages only to programs that ask (`madvise`), which glibc's allocator does if it is told so
before a process starts. ONNX Runtime has no option for it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sfexport.versions import FIRST_HUGE_PAGES, is_older

TUNABLES = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb=1"
# Verbs that run engines.
VERBS = ("ask", "parity", "demo")
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def relaunch_with_huge_pages() -> None:
    """Replace this process by the same command with huge pages, where that changes something; else return.

    A process whose GLIBC_TUNABLES are set, to whatever, is left alone: that also ends the second round.
    """
    if TUNABLES not in os.environ and sys.argv[1:2] and sys.argv[1] in VERBS and _helps():
        os.environ[TUNABLES] = SETTING
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _helps() -> bool:
    import platform  # not needed by those that only want help

    library, version = platform.libc_ver()
    if library != "glibc" or is_older(version, FIRST_HUGE_PAGES):
        return False
    try:
        return "[madvise]" in _ENABLED.read_text()
    except OSError:
        return False
