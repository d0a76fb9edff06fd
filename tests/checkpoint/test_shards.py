"""Safetensors headers: nothing that the safetensors library refuses is taken."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from sfexport.checkpoint.safetensors import read_shard
from sfexport.errors import CheckpointError

# The library's dtypes grow; these are of 0.8.
DTYPES_OF = "0.8"

ENTRIES = {
    "__metadata__": {"format": "pt", "b": "2"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "F4", "shape": [4], "data_offsets": [32, 34]},
    "empty": {"dtype": "I64", "shape": [0, 5], "data_offsets": [34, 34]},
    "scalar": {"dtype": "F16", "shape": [], "data_offsets": [34, 36]},
}
DATA = bytes(36)
# What a damaged or hostile header has in the place of a piece of a sound one.
PIECES = [
    *("", "0", "-0", "-1", "1.0", "1e0", "1e999", "NaN", "Infinity", "null", "true", "9" * 25, "18446744073709551615"),
    *('"', "[", "]", "{", "}", ",", ":", " ", "\t", "\n", "\0", "\ufeff", "\\", "\\ud800", "\\u0000", "é", '"a"'),
    *('"x": 1', '"dtype": "F16"', '"F4"', '"F8_E4M3"', '"F8_E5M2FNUZ"', '"I8"', '"X9"', "[[]]", "[0, 0]", "[1, [0]]"),
    *('"__metadata__": null,', '"__metadata__": {"a": 1},', '"a": {},', "/* */", "'a'"),
]


def file_of(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def library_takes(path: Path) -> bool:
    safetensors = pytest.importorskip("safetensors", minversion=DTYPES_OF)
    try:
        with safetensors.safe_open(path, "numpy") as file:
            file.keys()
    except safetensors.SafetensorError:
        return False
    return True


def is_taken(path: Path) -> bool:
    try:
        read_shard(path, path.name)
    except CheckpointError:
        return False
    return True


def damaged(rng: random.Random) -> bytes:
    """A file with one or two changes: pieces or single characters of its header, its length, its data."""
    text, data = json.dumps(ENTRIES), DATA
    for _ in range(rng.choice([1, 1, 2])):
        place = rng.randrange(len(text) + 1)
        cut = rng.choice([0, 1, 1, 2, 5, 12])
        text = text[:place] + rng.choice(PIECES) + text[place + cut :]
    if rng.random() < 0.2:
        data = data[: rng.randrange(36)] + bytes(rng.randrange(3))
    header = text.encode() + b" " * rng.choice([0, 0, 1, 7])
    raw = bytearray(file_of(header, data))
    if rng.random() < 0.2:
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


@pytest.mark.parametrize("seed", range(4))
def test_no_file_is_taken_that_the_library_refuses(seed: int, tmp_path: Path) -> None:
    rng, path, taken = random.Random(seed), tmp_path / "x.safetensors", 0
    for _ in range(1500):
        raw = damaged(rng)
        path.write_bytes(raw)
        if is_taken(path):
            taken += 1
            assert library_takes(path), raw
    assert taken > 20


def change(**fields: object) -> dict:
    return ENTRIES | {"a": ENTRIES["a"] | fields}


SOUND = json.dumps(ENTRIES).encode()
BROKEN = {
    "a hole": (json.dumps({k: v for k, v in ENTRIES.items() if k != "b"}).encode(), DATA),
    "a hole at the beginning": (json.dumps({k: v for k, v in ENTRIES.items() if k != "a"}).encode(), DATA),
    "bytes behind the data": (SOUND, DATA + b"\0"),
    "a byte too few": (SOUND, DATA[1:]),
    "metadata of numbers": (json.dumps(ENTRIES | {"__metadata__": {"n": 1}}).encode(), DATA),
    "metadata in a list": (json.dumps(ENTRIES | {"__metadata__": ["pt"]}).encode(), DATA),
    "a dtype of its own": (json.dumps(change(dtype="F31")).encode(), DATA),
    "half a byte": (json.dumps({"c": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}).encode(), bytes(2)),
    "a size beyond 64 bits": (json.dumps(change(shape=[0, 2**64])).encode(), DATA),
    "a product beyond 64 bits": (json.dumps(change(shape=[2**33, 2**33, 0])).encode(), DATA),
    "a minus before nothing": (SOUND.replace(b"[0, 24]", b"[-0, 24]"), DATA),
    "a blank before the header": (b" " + SOUND, DATA),
    "UTF-16": (json.dumps(ENTRIES).encode("utf-16"), DATA),
    "half a character": (SOUND.replace(b'"a"', b'"\\ud800"'), DATA),
    "a tensor twice": (SOUND.replace(b'"b": {', b'"a": {'), DATA),
    "a key twice": (SOUND.replace(b'"dtype": "F32"', b'"dtype": "F32", "dtype": "F32"'), DATA),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(file_of(*BROKEN[name]))
    assert not is_taken(tmp_path / "x.safetensors")


def test_a_sound_file_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(SOUND, DATA))
    shard, tensors = read_shard(path, path.name)
    assert library_takes(path)
    assert shard.size == len(file_of(SOUND, DATA))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tuple(entry["shape"]) for name, entry in ENTRIES.items() if name != "__metadata__"
    }
