"""An engine's work done by ONNX Runtime, for a backend whose "device" memory is host memory.

Recorder("10.16", execute=HostExecution(driver)) makes execute_async_v3 read its inputs at the addresses it was given
and write its outputs there. `driver` is a HostDriver (host_cuda.py), which knows what is allocated.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .engines import Bound, Execution
from .host_cuda import HostDriver

NUMPY = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT32": np.int32,
    "INT64": np.int64,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


class HostExecution:
    """Args:
        weights: the folder that the graphs' external data lies in; by default the one that the parser was told of.
        bodies: onnx.FunctionProto of operators that a plugin plays, for graphs without their own.

    Raises (when called): AssertionError for memory that is not allocated, and for an output that lies over an input or
    another output.
    """

    def __init__(self, driver: HostDriver, weights: Path | None = None, bodies: Sequence[Any] = ()) -> None:
        self._driver, self._weights, self._bodies = driver, weights, bodies
        self._sessions: dict[bytes, Any] = {}

    def __call__(self, execution: Execution) -> None:
        self._driver.enqueue(lambda: self._run(execution))

    def _run(self, execution: Execution) -> None:
        self._check(execution)
        session = self._session(execution)
        feeds = {name: _view(bound).copy() for name, bound in execution.inputs.items()}
        names = list(execution.outputs)
        for name, value in zip(names, session.run(names, feeds), strict=True):
            _view(execution.outputs[name])[...] = value

    def _check(self, execution: Execution) -> None:
        used = execution.inputs | execution.outputs
        for name, bound in used.items():
            assert self._driver.holds(bound.address, _size(bound)), f"memory of {name} is not allocated"
            assert self._driver.offset(bound.address) % 256 == 0, f"the address of {name} is not aligned"
        for name in execution.outputs:
            for other in used:
                assert name == other or not _overlap(used[name], used[other]), f"{name} lies over {other}"

    def _session(self, execution: Execution) -> Any:
        from sessions import model_session

        model = execution.model
        key = model.SerializeToString()
        if key not in self._sessions:
            whole = type(model)()
            whole.CopyFrom(model)
            present = {f.name for f in whole.functions}
            whole.functions.extend(body for body in self._bodies if body.name not in present)
            folder = self._weights or Path(execution.source or ".").parent
            self._sessions[key] = model_session(whole, folder)
        return self._sessions[key]


def _view(bound: Bound) -> np.ndarray:
    """The memory at an address, as an array of the tensor's type and shape."""
    buffer = (ctypes.c_char * _size(bound)).from_address(bound.address)
    return np.frombuffer(buffer, dtype=NUMPY[bound.dtype]).reshape(bound.shape)


def _size(bound: Bound) -> int:
    return math.prod(bound.shape) * np.dtype(NUMPY[bound.dtype]).itemsize


def _overlap(a: Bound, b: Bound) -> bool:
    return a.address < b.address + _size(b) and b.address < a.address + _size(a)
