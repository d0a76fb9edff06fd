"""cuda-python's driver module on host memory, so that a TensorRT backend runs on a CPU (with HostExecution).

    monkeypatch.setattr("sfexport.engines.tensorrt.cuda.bindings", lambda: driver)   # driver = HostDriver()

Copies happen at once, kernels cannot be launched. A captured graph holds what engines enqueued. What a GPU would punish
is refused: copies outside allocated memory, freeing twice, allocating and copying on the stream while it is captured.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

OK, INVALID = 0, 1


class HostDriver:
    """Every function returns (status, results...), as cuda-python's do.

    Attributes:
        live, peak: bytes allocated.
        modules: PTX texts that were loaded.
    """

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="multiprocessors",
        CU_DEVICE_ATTRIBUTE_INTEGRATED="integrated",
        CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED="virtual memory",
    )
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED="pinned")
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE="device")
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE="read and write")
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM="minimum")

    CUDA_MEMCPY3D = SimpleNamespace
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread local")
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE="device")

    def __init__(self, sm: int = 87, multiprocessors: int = 16) -> None:
        self._attributes = {"major": sm // 10, "minor": sm % 10, "multiprocessors": multiprocessors}
        self._attributes |= {"integrated": 1, "virtual memory": 1}
        self.largest_piece: int | None = None  # of physical memory; None: any
        self._pieces: dict[int, int] = {}  # sizes by handle
        self._ranges: dict[int, dict[int, int]] = {}  # by address reserved, the pieces' sizes by address
        self._memory: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._streams = 0
        self.modules: list[bytes] = []
        self.live = self.peak = 0
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._capturing: list[Callable[[], None]] | None = None
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattribute__(self, name: str) -> Any:
        """Every function notes its call."""
        found = object.__getattribute__(self, name)
        if not name.startswith("cu") or not callable(found):
            return found

        def noted(*arguments: Any) -> Any:
            self.calls.append((name, arguments))
            return found(*arguments)

        return noted

    def enqueue(self, work: Callable[[], None]) -> None:
        """Do what an engine has to do now, or when the graph that is being captured is launched."""
        if self._capturing is None:
            work()
        else:
            self._capturing.append(work)

    def cuStreamBeginCapture(self, stream: int, mode: str) -> tuple[int]:
        if self._capturing is not None:
            return (INVALID,)
        self._capturing = []
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> tuple[int, int]:
        if self._capturing is None:
            return INVALID, 0
        work, self._capturing = self._capturing, None
        return self._new_graph(work)

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        return self._new_graph(self._graphs[graph])

    def _new_graph(self, work: list[Callable[[], None]]) -> tuple[int, int]:
        handle = 1 + max(self._graphs, default=0)
        self._graphs[handle] = work
        return OK, handle

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        for work in self._graphs[graph]:
            work()
        return (OK,)

    def cuGraphDestroy(self, graph: int) -> tuple[int]:
        return (OK,) if self._graphs.pop(graph, None) is not None else (INVALID,)

    def cuGraphExecDestroy(self, graph: int) -> tuple[int]:
        return self.cuGraphDestroy(graph)

    def holds(self, address: int, size: int) -> bool:
        """Whether a range lies inside one allocation."""
        blocks = ((start, ctypes.sizeof(block)) for start, block in self._memory.items())
        return any(start <= address and address + size <= start + length for start, length in blocks)

    def offset(self, address: int) -> int:
        """Where an address is in its allocation, whose own is aligned on a GPU."""
        for start, block in self._memory.items():
            if start <= address < start + ctypes.sizeof(block):
                return address - start
        raise AssertionError(f"{address} is not allocated")

    def cuInit(self, flags: int) -> tuple[int]:
        return (OK,)

    def cuGetErrorString(self, status: int) -> tuple[int, bytes]:
        return OK, b"invalid argument"

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return OK, 1

    def cuDeviceGet(self, ordinal: int) -> tuple[int, int]:
        return OK, ordinal

    def cuDeviceGetAttribute(self, attribute: str, device: int) -> tuple[int, int]:
        return OK, self._attributes[attribute]

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, int]:
        return OK, 1

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        return (OK,)

    def cuCtxGetDevice(self) -> tuple[int, int]:
        return OK, 0

    def cuModuleLoadData(self, text: bytes) -> tuple[int, int]:
        self.modules.append(text)
        return OK, len(self.modules)

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[int, tuple[int, bytes]]:
        return OK, (module, name)

    def cuStreamCreate(self, flags: int) -> tuple[int, int]:
        self._streams += 1
        return OK, self._streams

    def cuStreamSynchronize(self, stream: int) -> tuple[int]:
        return (OK,)

    def cuStreamDestroy(self, stream: int) -> tuple[int]:
        return (OK,)

    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        if size < 1 or self._capturing is not None:
            return INVALID, 0
        block = (ctypes.c_char * size)()
        self._memory[ctypes.addressof(block)] = block
        self.live += size
        self.peak = max(self.peak, self.live)
        return OK, ctypes.addressof(block)

    def CUmemAllocationProp(self) -> SimpleNamespace:
        return SimpleNamespace(location=SimpleNamespace())

    CUmemAccessDesc = SimpleNamespace

    def cuMemGetAllocationGranularity(self, properties: SimpleNamespace, option: str) -> tuple[int, int]:
        return OK, 2 << 20

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> tuple[int, int]:
        if size % (2 << 20):
            return INVALID, 0
        block = (ctypes.c_char * size)()
        self._memory[ctypes.addressof(block)] = block
        self._ranges[ctypes.addressof(block)] = {}
        return OK, ctypes.addressof(block)

    def cuMemCreate(self, size: int, properties: SimpleNamespace, flags: int) -> tuple[int, int]:
        if size % (2 << 20) or (self.largest_piece is not None and size > self.largest_piece):
            return INVALID, 0
        handle = 1 + max(self._pieces, default=0)
        self._pieces[handle] = size
        return OK, handle

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple[int]:
        found = [start for start in self._ranges if start <= address < start + ctypes.sizeof(self._memory[start])]
        if not found or self._pieces.get(handle) != size:
            return (INVALID,)
        self._ranges[found[0]][address] = size
        self.live += size
        return (OK,)

    def cuMemRelease(self, handle: int) -> tuple[int]:
        return (OK,) if self._pieces.pop(handle, None) is not None else (INVALID,)

    def cuMemSetAccess(self, address: int, size: int, access: list[SimpleNamespace], count: int) -> tuple[int]:
        return (OK,) if sum(self._ranges.get(address, {}).values()) == size and count == len(access) else (INVALID,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[int]:
        if sum(self._ranges.get(address, {}).values()) != size:
            return (INVALID,)
        self._ranges[address].clear()
        self.live -= size
        return (OK,)

    def cuMemAddressFree(self, address: int, size: int) -> tuple[int]:
        if self._ranges.get(address) != {} or ctypes.sizeof(self._memory[address]) != size:
            return (INVALID,)
        del self._ranges[address], self._memory[address]
        return (OK,)

    def cuMemFree(self, address: int) -> tuple[int]:
        block = self._memory.pop(int(address), None)
        if block is None:
            return (INVALID,)
        self.live -= ctypes.sizeof(block)
        return (OK,)

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        block = (ctypes.c_char * size)()
        self._pinned[ctypes.addressof(block)] = block
        return OK, ctypes.addressof(block)

    def cuMemFreeHost(self, address: int) -> tuple[int]:
        return (OK,) if self._pinned.pop(int(address), None) is not None else (INVALID,)

    def cuMemcpyHtoDAsync(self, device: int, host: int, size: int, stream: int) -> tuple[int]:
        return self._copy(device, host, size, device)

    def cuMemcpyDtoHAsync(self, host: int, device: int, size: int, stream: int) -> tuple[int]:
        return self._copy(host, device, size, device)

    def cuMemcpy3DAsync(self, copy: SimpleNamespace, stream: int) -> tuple[int]:
        for z in range(copy.Depth):
            for y in range(copy.Height):
                to = copy.dstDevice + (z * copy.dstHeight + y) * copy.dstPitch
                source = copy.srcDevice + (z * copy.srcHeight + y) * copy.srcPitch
                if not self.holds(source, copy.WidthInBytes):
                    return (INVALID,)
                status = self._copy(to, source, copy.WidthInBytes, to)
                if status != (OK,):
                    return status
        return (OK,)

    def _copy(self, to: int, source: int, size: int, device: int) -> tuple[int]:
        if self._capturing is not None or not self.holds(device, size):
            return (INVALID,)
        ctypes.memmove(to, source, size)
        return (OK,)
