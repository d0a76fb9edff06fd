"""Give TensorRT memory of a Jetson's GPU in chunks that look like one block.

A board's memory manager refuses a block of a gigabyte that its memory has room for in pieces. CUDA's virtual memory
maps pieces of CHUNK bytes into one range of addresses.
"""

from __future__ import annotations

from typing import Any

from sfexport.engines.tensorrt import cuda
from sfexport.errors import SfexportError

CHUNK = 64 << 20
# Smaller blocks are not worth a mapping: it is made of whole pages, of 2 MB on most GPUs.
SMALLEST_MAPPED = 4 << 20


class ChunkedMemory:
    """Allocates device memory: large blocks in chunks, small ones in one piece."""

    def __init__(self, device: int = 0) -> None:
        driver = cuda.bindings()
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = device
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        smallest = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self._page = int(cuda.call("cuMemGetAllocationGranularity", self._properties, smallest))
        self._mapped: dict[int, int] = {}  # by address, the bytes mapped there

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes. Raises SfexportError where there is not enough memory."""
        if size < SMALLEST_MAPPED:
            return int(cuda.call("cuMemAlloc", max(size, 1)))
        whole = -(-size // self._page) * self._page
        address = int(cuda.call("cuMemAddressReserve", whole, 0, 0, 0))
        mapped = 0
        try:
            while mapped < whole:
                mapped += self._map(address + mapped, min(max(CHUNK, self._page), whole - mapped))
            cuda.call("cuMemSetAccess", address, whole, [self._access], 1)
        except SfexportError:
            self._release(address, mapped, whole)
            raise
        self._mapped[address] = whole
        return address

    def free(self, address: int) -> None:
        """Free what allocate returned. Nothing on the GPU may use it any more."""
        if address in self._mapped:
            whole = self._mapped.pop(address)
            self._release(address, whole, whole)
        elif address:
            cuda.call("cuMemFree", address)

    def _map(self, address: int, size: int) -> int:
        handle = cuda.call("cuMemCreate", size, self._properties, 0)
        try:
            cuda.call("cuMemMap", address, size, 0, handle, 0)
        finally:
            cuda.call("cuMemRelease", handle)  # the mapping keeps the memory
        return size

    def _release(self, address: int, mapped: int, reserved: int) -> None:
        if mapped:
            cuda.call("cuMemUnmap", address, mapped)
        cuda.call("cuMemAddressFree", address, reserved)


def chunked_allocator(trt: Any) -> Any | None:
    """Return an allocator for TensorRT's builder and runtime; None: the GPU has memory of its own, or cannot map it.

    The caller must keep it for as long as TensorRT uses it.
    """
    cuda.initialise()
    attribute = cuda.bindings().CUdevice_attribute
    needed = ("CU_DEVICE_ATTRIBUTE_INTEGRATED", "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")
    device = cuda.call("cuDeviceGet", 0)
    if not all(cuda.call("cuDeviceGetAttribute", getattr(attribute, name), device) for name in needed):
        return None
    return _make_allocator(trt, ChunkedMemory())


def _make_allocator(trt: Any, memory: ChunkedMemory) -> Any:
    class Allocator(trt.IGpuAllocator):
        """TensorRT takes 0 and False for a failure; an exception would end the process."""

        def __init__(self) -> None:
            trt.IGpuAllocator.__init__(self)

        def allocate(self, size: int, alignment: int, flags: int) -> int:
            try:
                return memory.allocate(size)
            except SfexportError:
                return 0

        def allocate_async(self, size: int, alignment: int, flags: int, stream: int) -> int:
            return self.allocate(size, alignment, flags)

        def deallocate(self, address: Any) -> bool:
            try:
                memory.free(int(address))
            except SfexportError:
                return False
            return True

        def deallocate_async(self, address: Any, stream: int) -> bool:
            try:
                cuda.call("cuStreamSynchronize", stream)
            except SfexportError:
                return False
            return self.deallocate(address)

    return Allocator()
