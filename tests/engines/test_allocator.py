"""Memory in chunks behind TensorRT's allocator interface, on a driver played on host memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gpu import PlayedGpu, played_gpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfexport.engines.tensorrt.allocator import CHUNK, SMALLEST_MAPPED, ChunkedMemory, chunked_allocator
from sfexport.errors import SfexportError

PAGE = 2 << 20


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedGpu]:
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache") as found:
        yield found


def pieces(played: PlayedGpu) -> list[int]:
    return [arguments[0] for name, arguments in played.driver.calls if name == "cuMemCreate"]


def test_a_block_that_no_piece_has_room_for_is_made_of_chunks(played: PlayedGpu) -> None:
    played.driver.largest_piece = CHUNK
    allocator = chunked_allocator(played.recorder)
    address = allocator.allocate(300 << 20, 256, 0)
    assert address and played.driver.holds(address, 300 << 20)
    assert pieces(played) == [CHUNK] * 4 + [(300 << 20) - 4 * CHUNK]
    assert allocator.deallocate(address) is True
    assert played.driver.live == 0 and not played.driver.holds(address, 1)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 3 * CHUNK), max_size=5))
def test_every_size_is_given_and_taken_back(sizes: list[int], played: PlayedGpu) -> None:
    memory, before = ChunkedMemory(), played.driver.live
    played.driver.calls.clear()
    addresses = [memory.allocate(size) for size in sizes]
    assert all(played.driver.holds(a, size) for a, size in zip(addresses, sizes, strict=True))
    assert all(size <= CHUNK and size % PAGE == 0 for size in pieces(played))
    mapped = sum(-(-size // PAGE) * PAGE for size in sizes if size >= SMALLEST_MAPPED)
    assert sum(pieces(played)) == mapped
    for address in addresses:
        memory.free(address)
    assert played.driver.live == before


def test_memory_that_runs_out_is_a_failure_without_a_leak(played: PlayedGpu) -> None:
    allocator, created = chunked_allocator(played.recorder), []
    create = played.driver.cuMemCreate

    def runs_out(*arguments: object) -> tuple[int, int]:
        created.append(arguments)
        return create(*arguments) if len(created) < 3 else (2, 0)

    played.driver.cuMemCreate = runs_out  # type: ignore[method-assign]
    assert allocator.allocate(4 * CHUNK, 256, 0) == 0
    assert played.driver.live == 0
    with pytest.raises(SfexportError, match="memory is full"):
        ChunkedMemory().allocate(4 * CHUNK)
    assert allocator.deallocate(12345) is False


@pytest.mark.parametrize("attribute", ["integrated", "virtual memory"])
def test_other_gpus_keep_tensorrts_own(attribute: str, played: PlayedGpu) -> None:
    played.driver._attributes[attribute] = 0
    assert chunked_allocator(played.recorder) is None


def test_memory_freed_on_a_stream_waits_for_it(played: PlayedGpu) -> None:
    allocator = chunked_allocator(played.recorder)
    address = allocator.allocate_async(CHUNK, 256, 0, 7)
    assert allocator.deallocate_async(address, 7) is True
    names = [name for name, _ in played.driver.calls]
    assert names.index("cuStreamSynchronize") < names.index("cuMemUnmap")
