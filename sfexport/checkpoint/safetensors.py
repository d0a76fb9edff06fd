"""Read and write safetensors headers: where each tensor lies in its file.

What the safetensors library refuses is refused here; of the data nothing is read or written.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sfexport.checkpoint.config import TOWER_PREFIX
from sfexport.dtypes import SAFETENSORS_BITS, SAFETENSORS_BYTES, Precision
from sfexport.errors import CheckpointError
from sfexport.fields import shown

HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own limit
_LARGEST = 2**64 - 1
_ENTRY = {"dtype", "shape", "data_offsets"}
_LAYER_SCALE = re.compile(re.escape(TOWER_PREFIX) + r"stages\.\d+\.blocks\.\d+\.gamma$")


@dataclass(frozen=True)
class Tensor:
    """One tensor's place: `length` bytes at `offset` of `shard` (a real path, symlinks resolved)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    offset: int
    length: int

    def rows(self, index: np.ndarray | None = None) -> np.ndarray:
        """Read the tensor, or its rows `index`, from the mapped file, as float32.

        Only the rows asked for are copied.
        """
        return np.array(self._mapped if index is None else self._mapped[index]).astype(np.float32)

    @cached_property
    def _mapped(self) -> np.ndarray:
        """The stored values in the mapped file; mapped once, since decoding asks per token."""
        stored = Precision.from_safetensors(self.dtype).numpy
        mapped = np.memmap(self.shard, dtype=np.uint8, mode="r", offset=self.offset, shape=(self.length,))
        return mapped.view(stored).reshape(self.shape)


@dataclass(frozen=True)
class Shard:
    """A safetensors file.

    Attributes:
        name: in the checkpoint.
        path: the real file, where the checkpoint has a link.
        size: in bytes.
    """

    name: str
    path: Path
    size: int


def read_shard(path: Path, name: str) -> tuple[Shard, dict[str, Tensor]]:
    """Read a safetensors file's header: the file and its tensors. Raises CheckpointError for a bad file."""
    try:
        real = path.resolve(strict=True)
        found = real.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"The shard {path} is not a regular file.", "Download it again.")
        with real.open("rb") as file:
            header = _read_header(file, path)
    except FileNotFoundError:
        what = "is a link to a file that is gone" if path.is_symlink() else "does not exist"
        raise CheckpointError(f"The shard {path} {what}.", "Download the checkpoint again.") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise CheckpointError(f"The shard {path} cannot be read: {error}.", "Download it again.") from None
    tensors = _parse_header(header, real, path)
    _check_layout(tensors, 8 + len(header), found.st_size, path)
    return Shard(name, real, found.st_size), {tensor.name: tensor for tensor in tensors}


def write_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], file: Path, author: str
) -> tuple[bytes, dict[str, Tensor]]:
    """Lay tensors out in a safetensors file; return the file's first bytes and each tensor's place.

    The safetensors library writes arrays that are all in memory; files here are filled in tensor by tensor.

    Args:
        tensors: name, dtype and shape of each, widest dtypes first, so that each is aligned.
        author: the file's metadata entry 'format'.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": author}}
    tensors, offset = list(tensors), 0
    for name, dtype, shape in tensors:
        length = math.prod(shape) * SAFETENSORS_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places = {}
    for name, dtype, shape in tensors:
        begin, end = entries[name]["data_offsets"]
        places[name] = Tensor(name, dtype, shape, file, len(header) + begin, end - begin)
    return header, places


def _read_header(file: BinaryIO, path: Path) -> bytes:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    header = file.read(length) if len(prefix) == 8 and 0 < length <= HEADER_LIMIT else b""
    if not header or len(header) < length:
        raise CheckpointError(
            f"The shard {path} is not a safetensors file, or is truncated within its header.", "Download it again."
        )
    return header


def _parse_header(header: bytes, real: Path, path: Path) -> list[Tensor]:
    """Parse the header into tensors, in the order of their data."""
    try:
        entries = _parse_json(header)
        metadata = entries.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is not an object of texts")
        tensors = [_tensor(name, entry, real, 8 + len(header)) for name, entry in entries.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise CheckpointError(
                f"The shard {path} has '{tensor.name}' twice, as 'gamma' too.",
                "Remove the one that is not the model's.",
            )
        names.add(tensor.name)
    return sorted(tensors, key=lambda t: (t.offset, t.length))


def _parse_json(header: bytes) -> dict[str, Any]:
    """Parse a header's JSON object, as strictly as the library reads it."""
    entries: dict[str, Any] = json.loads(
        header.decode("utf-8"),
        object_pairs_hook=_no_duplicates,
        parse_int=lambda text: int(text) if text != "-0" else -1,  # the library reads -0 as a float
        parse_constant=_refuse_constant,
    )
    if b"\\u" in header:
        json.dumps(entries, ensure_ascii=False).encode()  # UnicodeEncodeError, a ValueError: half a surrogate pair
    if not header.startswith(b"{"):
        raise ValueError("it does not begin with '{'")
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(n for n in names if names.count(n) > 1))} is there twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _tensor(name: str, entry: dict[str, Any], shard: Path, data_start: int) -> Tensor:
    """Parse one entry. Raises ValueError, TypeError or KeyError for one that makes no sense."""
    (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    if entry.keys() != _ENTRY or not isinstance(shape, list) or not isinstance(entry["data_offsets"], list):
        raise ValueError(f"{shown(name)} is described by {shown(entry)}")
    numbers = (begin, end, *shape)
    if not isinstance(dtype, str) or not all(type(n) is int and 0 <= n <= _LARGEST for n in numbers):
        raise ValueError(f"'{name}' has shape {list(shape)} and data offsets {[begin, end]}")
    if _LAYER_SCALE.match(name):  # timm's and open_clip's spelling of the reference's '.weight'
        name = name.removesuffix("gamma") + "weight"
    bits = _bits(shape, SAFETENSORS_BITS.get(dtype, 0))
    if not bits >= 0 or bits != 8 * (end - begin) or dtype not in SAFETENSORS_BITS:
        raise ValueError(f"'{name}', stored as {shown(dtype)[1:-1]}, has shape {shape} and data offsets {[begin, end]}")
    return Tensor(name, dtype, tuple(shape), shard, data_start + begin, end - begin)


def _bits(shape: list[int], bits: int) -> int:
    """Compute the bits of a tensor; -1 where a product on the way does not fit 64 bits, which the library refuses."""
    total = 1
    for size in (*shape, bits):
        total *= size
        if total > _LARGEST:
            return -1
    return total


def _check_layout(tensors: list[Tensor], start: int, size: int, path: Path) -> None:
    """Check that the data follow each other without overlap or hole, and end with the file."""
    previous = None
    for tensor in tensors:
        if tensor.offset < start:
            raise _damaged(path, f"the tensors '{previous}' and '{tensor.name}' overlap")
        if tensor.offset > start:
            raise _damaged(path, f"there is a hole before the tensor '{tensor.name}'")
        start, previous = tensor.offset + tensor.length, tensor.name
    if size < start:
        raise CheckpointError(
            f"The shard {path} is truncated: it has {size:,} bytes and its header promises {start:,}.",
            "Download it again.",
        )
    if size > start:
        raise CheckpointError(
            f"The shard {path} has {size - start:,} bytes more than its header promises.", "Download it again."
        )


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"The shard {path} has a damaged safetensors header ({problem}).", "Download it again.")
