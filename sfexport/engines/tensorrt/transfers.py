"""Copy arrays to and from the GPU, through buffers that later calls use again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from sfexport.engines.tensorrt.buffers import DeviceTensor, OwnedBuffer
from sfexport.engines.tensorrt.cuda import PinnedBuffer, Stream
from sfexport.engines.tensorrt.engine import Engine

# Largest copy that goes through pinned memory; a decode step's are all smaller. One that is no larger than COMPARED is
# not made at all where the bytes are those of the last one: masks and the like are the same at every step.
PINNED, COMPARED = 4 << 20, 4 << 10


class Transfers:
    """Holds the inputs and small outputs of engines, as large as they have been."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._device: dict[tuple[str, str], OwnedBuffer] = {}
        self._pinned: dict[tuple[str, str], PinnedBuffer] = {}
        self._sizes: dict[tuple[str, str], int] = {}  # bytes of the last upload
        self._waiting: set[tuple[str, str]] = set()  # pinned buffers that a copy may still read

    def reuse(self, engine: Engine, name: str, shape: tuple[int, ...]) -> DeviceTensor:
        """Return memory that the next call reuses; an input's has the engine's largest size, so it never grows."""
        dtype, key = engine.types[name], (engine.name, name)
        size = max(int(np.prod(s)) for s in (shape, *engine.max_shapes(name))) * dtype.itemsize
        if key not in self._device or self._device[key].size < size:
            self._device[key] = OwnedBuffer(size)
            self._sizes.pop(key, None)
        return DeviceTensor(self._device[key].pointer, tuple(shape), dtype, self._device[key])

    def upload(self, engine: Engine, name: str, array: np.ndarray) -> DeviceTensor:
        """Copy an input to the GPU, in the engine's type."""
        array = np.ascontiguousarray(array.astype(engine.types[name], copy=False))
        tensor, key = self.reuse(engine, name, array.shape), (engine.name, name)
        if array.nbytes > PINNED:
            self._sizes.pop(key, None)
            self._stream.to_device(tensor.pointer, array)
            # The copy may read the array until the call ends.
            return replace(tensor, owner=(tensor.owner, array))
        staged = self._staging(key, self._device[key].size).array(array.shape, array.dtype)
        same = array.nbytes <= COMPARED and self._sizes.get(key) == array.nbytes and array.tobytes() == staged.tobytes()
        if not same:
            if key in self._waiting:
                self._synchronize()
            staged[...] = array
            self._stream.to_device(tensor.pointer, staged)
            self._sizes[key] = array.nbytes
            self._waiting.add(key)
        return tensor

    def download(self, tensor: DeviceTensor) -> np.ndarray:
        """Copy a tensor to the host; 16-bit floats become float32."""
        out = np.empty(tensor.shape, dtype=tensor.dtype)
        self._stream.to_host(out, tensor.pointer)
        self._synchronize()
        return out.astype(np.float32) if out.dtype.itemsize == 2 else out

    def download_small(self, engine: Engine, tensors: Mapping[str, DeviceTensor]) -> list[np.ndarray]:
        """Copy outputs of an engine to the host, through pinned memory."""
        staged = [
            self._staging((engine.name, name), t.size, limit=t.size).array(t.shape, t.dtype)
            for name, t in tensors.items()
        ]
        for out, tensor in zip(staged, tensors.values(), strict=True):
            self._stream.to_host(out, tensor.pointer)
        self._synchronize()
        return [out.copy() for out in staged]

    def _synchronize(self) -> None:
        self._stream.synchronize()
        self._waiting.clear()

    def _staging(self, key: tuple[str, str], size: int, limit: int = PINNED) -> PinnedBuffer:
        if key not in self._pinned or len(self._pinned[key].bytes) < min(size, limit):
            self._pinned[key] = PinnedBuffer(min(size, limit))
        return self._pinned[key]
