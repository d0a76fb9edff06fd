"""Tell weight files by their content.

A file of up to 64 MB is read whole. Of a larger one the header and blocks of every tensor are read: its first and last
and three between, 4 KB each, so that opening 17 GB takes a fraction of a second. Other weights of the same shapes, a
tensor of zeros, a changed sign or scale, or tensors in another order show in every block; a change between the blocks,
such as one row of a matrix or one bad sector, does not. That takes the digest of all bytes, which an export of copied
or quantised weights always has, one of referenced weights with `--digest full`, and which a build checks. Engines keep
it too, with the file's time: where that has changed since the build, the whole file is read before they are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from sfexport.checkpoint.safetensors import Shard, read_shard
from sfexport.errors import CheckpointError

WHOLE = 64 << 20
_BLOCK, _BLOCKS = 4096, 5
_THREADS = 8  # reads wait for the disk, one after the other
_CHUNK = 1 << 20


def describe_shard(shard: Shard, full: bool) -> dict[str, Any]:
    """Describe a weight file for a bundle's manifest.

    Args:
        full: add the digest of every byte, not of sampled blocks only.
    """
    sampled = sampled_sha256(shard.path)
    whole = shard.size <= WHOLE
    digest = sampled if whole else full_sha256(shard.path) if full else None
    return {"file": shard.path.name, "size": shard.size, "sampled_sha256": sampled, "sha256": digest}


def has_content(file: Path, promised: dict[str, Any]) -> bool:
    """Tell whether a regular file is the one that `describe_shard` described, by its size and sampled blocks."""
    if file.stat().st_size != promised["size"]:
        return False
    try:
        return bool(sampled_sha256(file) == promised["sampled_sha256"])
    except (CheckpointError, OSError):
        return False


def changed_since(file: Path, read: dict[str, Any]) -> bool:
    """Tell whether a large file, of which only samples were compared, differs from the one a build read.

    All of it is read where its time of modification is another.
    """
    about = file.stat()
    return about.st_size > WHOLE and about.st_mtime_ns != read["mtime_ns"] and full_sha256(file) != read["sha256"]


def has_weights(shards: Iterable[Shard], promised: list[dict[str, Any]]) -> bool:
    """Tell whether files are those that were described, under whatever names."""
    wanted = Counter((entry["size"], entry["sampled_sha256"]) for entry in promised)
    found = list(shards)
    if Counter(shard.size for shard in found) != Counter(size for size, _ in wanted.elements()):
        return False
    return Counter((shard.size, sampled_sha256(shard.path)) for shard in found) == wanted


def full_sha256(file: Path) -> str:
    digest = sha256()
    with file.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def sampled_sha256(file: Path) -> str:
    """Digest sampled blocks of a safetensors file; all bytes of one of up to 64 MB.

    Raises:
        CheckpointError: it is not a safetensors file.
    """
    size = file.stat().st_size
    if size <= WHOLE:
        return full_sha256(file)
    digest = sha256(size.to_bytes(8, "little"))
    with ThreadPoolExecutor(_THREADS) as pool:
        for block in pool.map(lambda span: _read(file, *span), _spans(file)):
            digest.update(block)
    return digest.hexdigest()


def _spans(file: Path) -> Iterator[tuple[int, int]]:
    """List (offset, length) of the samples: the header, then blocks of every tensor."""
    tensors = sorted(read_shard(file, file.name)[1].values(), key=lambda tensor: tensor.offset)
    yield 0, min((tensor.offset for tensor in tensors), default=8)
    for tensor in tensors:
        if tensor.length <= _BLOCK * _BLOCKS:
            yield tensor.offset, tensor.length
            continue
        last = tensor.length - _BLOCK
        for i in range(_BLOCKS):
            yield tensor.offset + last * i // (_BLOCKS - 1), _BLOCK


def _read(file: Path, offset: int, length: int) -> bytes:
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        return stream.read(length)
