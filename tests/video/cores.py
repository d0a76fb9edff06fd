"""Decoding as on a machine with another number of cores."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sfexport.video.containers import prepare


def set_cores(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr("sfexport.video.decoder.prepare", partial(_prepare_with, threads))


def _prepare_with(threads: int, stream: Any, path: Path, has_threads: bool) -> Any:
    prepared = prepare(stream, path, has_threads)
    if prepared.codec_context.thread_count != 1:
        prepared.codec_context.thread_count = threads
    return prepared
