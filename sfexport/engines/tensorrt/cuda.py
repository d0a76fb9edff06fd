"""Call CUDA's driver API through cuda-python: memory, copies, graphs and launches, every call checked. No torch.

The only file that imports cuda-python (lazily). Used by the TensorRT backend and by the Python plugin.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from sfexport.errors import MissingDependency, SfexportError
from sfexport.versions import CUDA_OF_TENSORRT_PACKAGE, OLDEST, version_text

_MAJOR = CUDA_OF_TENSORRT_PACKAGE[0]
INSTALL = (
    f"pip install 'cuda-python>={version_text(OLDEST['cuda-python'])}' "
    f"(below {_MAJOR} with a driver for CUDA {_MAJOR - 1})"
)
NO_DRIVER = "On a Jetson it comes with JetPack; elsewhere install NVIDIA's driver. See `sfexport doctor`."


def bindings() -> Any:
    """Import cuda-python's driver module, under the name that this version gives it."""
    try:
        from cuda.bindings import driver
    except Exception as error:
        try:
            from cuda import cuda as driver
        except Exception:
            # Other packages have parts of `cuda` too: it may be there without the bindings.
            failure = None if isinstance(error, ModuleNotFoundError) else error
            raise MissingDependency("cuda-python", "Running TensorRT engines", INSTALL, failure=failure) from None
    return driver


def call(name: str, *arguments: Any) -> Any:
    """Call a driver function; return its result, a tuple of its results, or None.

    Raises:
        SfexportError: there is no driver, or the call failed.
    """
    driver = bindings()
    try:
        status, *results = getattr(driver, name)(*arguments)
    except RuntimeError as error:
        if "not found" in str(error) and name in str(error):
            raise SfexportError(
                f"This machine's NVIDIA driver has no {name}, which cuda-python calls ({error}).",
                "cuda-python is newer than the driver; `sfexport doctor` names the version to install.",
            ) from None
        # libcuda cannot be loaded
        raise SfexportError(f"There is no NVIDIA driver on this machine ({error}).", NO_DRIVER) from None
    if int(status) != 0:
        raise SfexportError(f"CUDA's {name} failed: {_error_text(driver, status)}.", _hint(status))
    if not results:
        return None
    return results[0] if len(results) == 1 else tuple(results)


def release(name: str, handle: Any) -> None:
    """Call a function that frees; ignore its error, since CUDA may already be shut down at interpreter exit."""
    with contextlib.suppress(SfexportError):
        call(name, handle)


def _error_text(driver: Any, status: Any) -> str:
    failed, text = driver.cuGetErrorString(status)
    return str(status) if int(failed) or not text else f"{text.decode()} ({int(status)})"


def _hint(status: Any) -> str:
    if int(status) == 2:
        return "The GPU's memory is full: close other programs, or use fewer frames (--frames)."
    if int(status) in (209, 218, 222):
        return "The kernel was compiled for another GPU or a newer driver: build the engines again on this machine."
    return NO_DRIVER if int(status) in (100, 101, 803) else ""


@cache
def initialise(device: int = 0) -> None:
    """Make the device's primary context current, as TensorRT uses it.

    Raises:
        SfexportError: no driver or no GPU.
    """
    call("cuInit", 0)
    if call("cuDeviceGetCount") <= device:
        raise SfexportError("The NVIDIA driver finds no GPU.", NO_DRIVER)
    call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", device)))


@cache
def device_sm(device: int = 0) -> int:
    """Return the compute capability times 10."""
    attribute = bindings().CUdevice_attribute
    handle = call("cuDeviceGet", device)
    major = call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle)
    minor = call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle)
    return 10 * int(major) + int(minor)


@dataclass(frozen=True)
class Place:
    """Pieces of device memory, in groups: K and V of each layer, with a piece per head.

    Attributes:
        pointer: address of the first piece.
        pitch: bytes from one piece to the next.
        height: pieces from one group to the next.
    """

    pointer: int
    pitch: int
    height: int


class Stream:
    """A CUDA stream. `handle` is the integer that TensorRT takes."""

    def __init__(self) -> None:
        self._stream = call("cuStreamCreate", 1)  # does not wait for the default stream
        self.handle = int(self._stream)

    def synchronize(self) -> None:
        call("cuStreamSynchronize", self._stream)

    def to_device(self, pointer: int, array: np.ndarray) -> None:
        """Copy a contiguous host array to device memory. The array must live until synchronize."""
        call("cuMemcpyHtoDAsync", pointer, array.ctypes.data, array.nbytes, self._stream)

    def to_host(self, array: np.ndarray, pointer: int) -> None:
        """Copy device memory into a contiguous host array. It is there after synchronize."""
        call("cuMemcpyDtoHAsync", array.ctypes.data, pointer, array.nbytes, self._stream)

    def copy_pieces(self, to: Place, source: Place, size: int, count: int, groups: int) -> None:
        """Copy `count` pieces of `size` bytes of each group from one place of device memory to another."""
        copy, device = bindings().CUDA_MEMCPY3D(), bindings().CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcMemoryType = copy.dstMemoryType = device
        copy.dstDevice, copy.dstPitch, copy.dstHeight = to.pointer, to.pitch, to.height
        copy.srcDevice, copy.srcPitch, copy.srcHeight = source.pointer, source.pitch, source.height
        copy.WidthInBytes, copy.Height, copy.Depth = size, count, groups
        call("cuMemcpy3DAsync", copy, self._stream)

    @contextlib.contextmanager
    def capture(self) -> Iterator[Captured]:
        """Collect what is enqueued in a CUDA graph, in place of running it; it is there when the block ends."""
        captured = Captured()
        # Only calls of this thread are watched: others may allocate meanwhile.
        call("cuStreamBeginCapture", self._stream, bindings().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            yield captured
        finally:
            captured.graph = Graph(call("cuStreamEndCapture", self._stream))

    def launch(self, graph: Graph) -> None:
        """Enqueue all that a graph holds, in one call."""
        call("cuGraphLaunch", graph.handle, self._stream)

    def close(self) -> None:
        call("cuStreamDestroy", self._stream)


@dataclass
class Captured:
    """Hold the graph of a capture once it has ended."""

    graph: Graph | None = None


class Graph:
    """A CUDA graph that can be launched; freed with the last reference."""

    def __init__(self, captured: Any) -> None:
        try:
            self.handle = call("cuGraphInstantiate", captured, 0)
        finally:
            call("cuGraphDestroy", captured)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            release("cuGraphExecDestroy", self.handle)


class PinnedBuffer:
    """Host memory that the GPU copies from and to without a copy of the driver's; `bytes` is uint8 [size]."""

    def __init__(self, size: int) -> None:
        self._pointer = int(call("cuMemHostAlloc", max(size, 1), 0))
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(self._pointer))

    def array(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """Return the first bytes as an array."""
        count = int(np.prod(shape)) * dtype.itemsize
        return self.bytes[:count].view(dtype).reshape(shape)

    def __del__(self) -> None:
        if hasattr(self, "_pointer"):
            release("cuMemFreeHost", self._pointer)


class Buffer:
    """Device memory of a fixed size, in bytes."""

    def __init__(self, size: int) -> None:
        self.size = max(size, 1)
        self.pointer = int(call("cuMemAlloc", self.size))


@cache
def load_module(ptx: str, device: int) -> Any:
    """Load a PTX text as a module of the device's primary context, once: a plugin is cloned for every context."""
    # The text must end with a zero byte.
    return call("cuModuleLoadData", ptx.encode() + b"\0")


class Function:
    """A kernel of a PTX text in the current context.

    Args:
        threads: number of threads per block.
        shared: dynamic shared memory in bytes.
    """

    def __init__(self, ptx: str, name: str, threads: int, shared: int) -> None:
        module = load_module(ptx, int(call("cuCtxGetDevice")))
        self._function = call("cuModuleGetFunction", module, name.encode())
        self._threads, self._shared = threads, shared

    def launch(
        self, grid: Sequence[int], inputs: Sequence[int], integers: Sequence[int], outputs: Sequence[int], stream: int
    ) -> None:
        """Launch with pointers, int32 values, pointers. Returns at once."""
        values = (*inputs, *integers, *outputs)
        types = [ctypes.c_void_p] * len(inputs) + [ctypes.c_int32] * len(integers) + [ctypes.c_void_p] * len(outputs)
        block = (self._threads, 1, 1)
        call("cuLaunchKernel", self._function, *grid, *block, self._shared, stream, (values, tuple(types)), 0)
