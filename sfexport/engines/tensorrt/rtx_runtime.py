"""Make execution contexts of TensorRT for RTX, and keep the kernels that it compiles on the GPU for the next start."""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path
from typing import Any

from sfexport.artifacts.atomic import write_bytes
from sfexport.engines.tensorrt.builder import cache_directory
from sfexport.errors import SfexportError
from sfexport.versions import TENSORRT_RTX, version_text


class RtxContexts:
    """Makes the contexts of all engines, which share one cache of compiled kernels.

    An engine of TensorRT for RTX holds portable code: kernels are compiled when a context first needs them, which
    takes seconds. The cache's file is read now, and written when the object is no longer used.
    """

    def __init__(self, trt: Any, file: Path) -> None:
        self._trt, self._file = trt, file
        self._stored = file.read_bytes() if file.is_file() else b""
        self._cache: Any = None

    def __call__(self, engine: Any, fixed_shapes: bool) -> Any:
        """Make a context whose scratch memory is set later.

        Args:
            fixed_shapes: the context sees few shapes, and each again and again: kernels are compiled for them at once,
                since a CUDA graph keeps those it was captured with. Otherwise that happens in the background.
        """
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        strategies = self._trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if fixed_shapes else strategies.LAZY
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._stored:
                self._cache.deserialize(self._stored)  # False for another driver's or version's: it begins empty then
            weakref.finalize(self, _save, self._cache, self._file, self._stored)
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)


def _save(cache: Any, file: Path, stored: bytes) -> None:
    """Write the cache if it has changed. A disk that is full, or read-only, costs time at the next start, no more."""
    content = bytes(memoryview(cache.serialize()))
    if content and content != stored:
        with contextlib.suppress(OSError, SfexportError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(file, content)


def runtime_cache_file(sm: int) -> Path:
    """Return the file that compiled kernels are kept in: one per kind of GPU and version."""
    return cache_directory() / f"kernels-sm{sm}-tensorrt-rtx-{version_text(TENSORRT_RTX)}.cache"
