"""Kinds of damaged weights: the shards' headers and values, their index, and sets of weights side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from helpers import FIRST, INDEX, SECOND, edit_header, edit_json, split_shard, write_shard

from fuzz.base import CHECKPOINT, copy, from_checkpoint, through_checkpoint
from fuzz.kinds import Case, Expect, Kind
from fuzz.oracle import same_as_torch

REFUSED, ANSWERED, EITHER = Expect.REFUSED, Expect.ANSWERED, Expect.EITHER
Damage = Callable[[Path], object]


def _entry(tensor: str, **fields: Any) -> Damage:
    """Change a tensor's line in its shard's header."""

    def change(path: Path) -> None:
        shard = path / json.loads((path / INDEX).read_text())["weight_map"][tensor]
        edit_header(shard, lambda header: header[tensor].update(fields))

    return change


def _header(change: Callable[[dict[str, Any]], Any], shard: str = FIRST) -> Damage:
    return lambda path: edit_header(path / shard, change)


def _bytes(change: Callable[[bytes], bytes], name: str = FIRST) -> Damage:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def _index(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return lambda path: edit_json(path / INDEX, change)


def _first_entry(**fields: Any) -> Damage:
    return _header(lambda h: h[next(n for n in h if n != "__metadata__")].update(fields))


def _grow(length: int) -> Callable[[bytes], bytes]:
    return lambda raw: length.to_bytes(8, "little") + raw[8:]


NORM = "model.norm.weight"
TOWER = "model.vision_tower.vision_tower."


def _extra(name: str, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> Damage:
    """One more tensor at the end of a shard."""

    def change(path: Path) -> None:
        header, data = split_shard(path / FIRST)
        size = int(np.prod(shape)) * 4
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + size]}
        write_shard(path / FIRST, header, data + bytes(size))
        edit_json(path / INDEX, lambda index: index["weight_map"].update({name: FIRST}))

    return change


def _values(name: str, number: float) -> Damage:
    """Set a tensor's first value, stored as bfloat16."""

    def change(path: Path) -> None:
        shard = path / json.loads((path / INDEX).read_text())["weight_map"][name]
        header, data = split_shard(shard)
        begin = header[name]["data_offsets"][0]
        bits = (np.array([number], np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
        write_shard(shard, header, data[:begin] + bits + data[begin + 2 :])

    return change


def _duplicate_key(path: Path) -> None:
    header, data = split_shard(path / FIRST)
    text = json.dumps(header)
    name = next(n for n in header if n != "__metadata__")
    text = f"{{{json.dumps(name)}: {json.dumps(header[name])}, {text[1:]}"
    write = len(text.encode()).to_bytes(8, "little") + text.encode() + data
    (path / FIRST).write_bytes(write)


def _gap(path: Path) -> None:
    """Unused bytes before the last tensor: the library refuses holes."""
    header, data = split_shard(path / FIRST)
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    begin, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [begin + 64, end + 64]
    write_shard(path / FIRST, header, data[:begin] + bytes(64) + data[begin:])


def _single_file(path: Path) -> None:
    """The weights in one file, right, without an index."""
    headers, blobs, offset = {}, [], 0
    for shard in (FIRST, SECOND):
        header, data = split_shard(path / shard)
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                headers[name] = entry | {"data_offsets": [begin + offset, end + offset]}
        blobs.append(data)
        offset += len(data)
        (path / shard).unlink()
    (path / INDEX).unlink()
    write_shard(path / "model.safetensors", headers, b"".join(blobs))


def _stale_index(path: Path) -> None:
    """The right weights in one file, and an old index with other weights beside it: transformers takes the file."""
    kept = {name: (path / name).read_bytes() for name in (FIRST, SECOND, INDEX)}
    _single_file(path)
    for name, raw in kept.items():
        (path / name).write_bytes(raw)
    for shard in (FIRST, SECOND):
        header, data = split_shard(path / shard)
        write_shard(path / shard, header, (np.frombuffer(data, "<u2") ^ 0x8000).astype("<u2").tobytes())


def _index_without_shards(path: Path) -> None:
    index = (path / INDEX).read_bytes()
    _single_file(path)
    (path / INDEX).write_bytes(index)


def _adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "base_model_name_or_path": ""}))
    write_shard(path / "adapter_model.safetensors", {}, b"")


def _only_adapter(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    _adapter(path)


def _both_spellings(path: Path) -> None:
    name = next(
        n for n in json.loads((path / INDEX).read_text())["weight_map"] if n.endswith("stages.0.blocks.0.weight")
    )
    shape = tuple(split_shard(path / json.loads((path / INDEX).read_text())["weight_map"][name])[0][name]["shape"])
    _extra(name.removesuffix("weight") + "gamma", shape)(path)


WEIGHTS: dict[str, tuple[Damage, Expect]] = {
    "header length 0": (_bytes(_grow(0)), REFUSED),
    "header length of 2^63": (_bytes(_grow(2**63)), REFUSED),
    "header length of 2^64 - 1": (_bytes(_grow(2**64 - 1)), REFUSED),
    "header length of 99 MB": (_bytes(_grow(99_000_000)), REFUSED),
    "header length one more": (
        _bytes(lambda r: (int.from_bytes(r[:8], "little") + 1).to_bytes(8, "little") + r[8:]),
        REFUSED,
    ),
    "header one byte short": (
        _bytes(lambda r: (int.from_bytes(r[:8], "little") - 1).to_bytes(8, "little") + r[8:]),
        REFUSED,
    ),
    "empty shard": (_bytes(lambda r: b""), REFUSED),
    "shard of 7 bytes": (_bytes(lambda r: r[:7]), REFUSED),
    "shard cut in its header": (_bytes(lambda r: r[:300]), REFUSED),
    "shard one byte short": (_bytes(lambda r: r[:-1], SECOND), REFUSED),
    "shard with bytes after the end": (_bytes(lambda r: r + b"\0" * 64, SECOND), EITHER),
    "header is a list": (lambda p: (p / FIRST).write_bytes((2).to_bytes(8, "little") + b"[]"), REFUSED),
    "header nested deeply": (
        lambda p: (p / FIRST).write_bytes((90_000).to_bytes(8, "little") + b"[" * 90_000),
        REFUSED,
    ),
    "header with a tensor twice": (_duplicate_key, REFUSED),
    "header not UTF-8": (_bytes(lambda r: r[:10] + b"\xff\xfe" + r[12:]), REFUSED),
    "header starts with a space": (_bytes(lambda r: r[:8] + b" " + r[8:].replace(b" ", b"", 1), SECOND), EITHER),
    "hole between tensors": (_gap, EITHER),
    "metadata with numbers": (_header(lambda h: h.update(__metadata__={"format": 1})), EITHER),
    "metadata is a list": (_header(lambda h: h.update(__metadata__=[1])), EITHER),
    "metadata of another framework": (_header(lambda h: h.update(__metadata__={"format": "tf"})), EITHER),
    "no metadata": (_header(lambda h: h.pop("__metadata__")), EITHER),
    "offsets reversed": (_entry(NORM, data_offsets=[128, 0]), REFUSED),
    "offsets negative": (_entry(NORM, data_offsets=[-128, 0]), REFUSED),
    "offsets of 2^63": (_entry(NORM, data_offsets=[2**63, 2**63 + 128]), REFUSED),
    "offsets as fractions": (_entry(NORM, data_offsets=[0.0, 128.0]), REFUSED),
    "offsets as text": (_entry(NORM, data_offsets="ab"), REFUSED),
    "three offsets": (_entry(NORM, data_offsets=[0, 64, 128]), REFUSED),
    "offsets overlap": (_first_entry(data_offsets=[0, 10**6]), REFUSED),
    "dtype unknown": (_entry(NORM, dtype="F7"), REFUSED),
    "dtype a number": (_entry(NORM, dtype=16), REFUSED),
    "dtype a list": (_entry(NORM, dtype=["BF16"]), REFUSED),
    "dtype in lower case": (_entry(NORM, dtype="bf16"), REFUSED),
    "dtype of the same width": (_entry(NORM, dtype="I16"), REFUSED),
    "dtype with escapes": (_entry(NORM, dtype="\x1b[31mF16"), REFUSED),
    "shape negative": (_entry(NORM, shape=[-64]), REFUSED),
    "shape with a huge size": (_entry(NORM, shape=[2**62]), REFUSED),
    "shape that overflows": (_entry(NORM, shape=[2**33, 2**33]), REFUSED),
    "shape true": (_entry(NORM, shape=[True]), REFUSED),
    "shape a text": (_entry(NORM, shape="64"), REFUSED),
    "shape with one more 1": (_entry(NORM, shape=[64, 1]), REFUSED),
    "shape nested": (_entry(NORM, shape=[[64]]), REFUSED),
    "shape of 100,000 sizes": (_entry(NORM, shape=[1] * 100_000), REFUSED),
    "entry null": (_header(lambda h: h.update({"x": None})), REFUSED),
    "entry without dtype": (_header(lambda h: h[next(n for n in h if n[0] != "_")].pop("dtype")), REFUSED),
    "entry with more fields": (_first_entry(colour="red"), EITHER),
    "unknown tensor": (_extra("model.layers.0.self_attn.q_norm.weight", (16,)), EITHER),
    "unknown bias": (_extra("model.layers.0.mlp.gate_proj.bias", (128,)), EITHER),
    "tensor of a 10^9th stage": (_extra(TOWER + "stages.1000000000.blocks.0.weight"), EITHER),
    "tensor of a 10^30th block": (_extra(TOWER + f"stages.0.blocks.{10**30}.weight"), EITHER),
    "tensor of a 10^9th layer": (_extra("model.layers.1000000000.mlp.up_proj.weight"), EITHER),
    "tensor of stage -1": (_extra(TOWER + "stages.-1.blocks.0.weight"), EITHER),
    "tensor named with 5,000 digits": (_extra(TOWER + f"stages.{'9' * 5000}.blocks.0.weight"), EITHER),
    "tensor named with escapes": (_extra("\x1b]0;owned\x07\x1b[2Jmodel.x"), EITHER),
    "tensor with an empty name": (_extra(""), EITHER),
    "tensor named with a surrogate": (
        _header(lambda h: h.update({"\ud800": dict(h[next(n for n in h if n[0] != "_")])})),
        REFUSED,
    ),
    "tensor with a name of 300 kB": (_extra("x" * 300_000), EITHER),
    "layer scale in both spellings": (_both_spellings, EITHER),
    "NaN in the final norm": (_values(NORM, float("nan")), REFUSED),
    "infinity in the final norm": (_values(NORM, float("inf")), REFUSED),
    "NaN in the token table": (_values("model.embed_tokens.weight", float("nan")), REFUSED),
    "NaN in the tower": (_values(TOWER + "stem.0.weight", float("nan")), REFUSED),
    "NaN in the projector": (_values("model.mm_projector.0.weight", float("nan")), REFUSED),
    "NaN in a gate": (_values("model.layers.0.self_attn.cross_attn_gate_proj.0.weight", float("nan")), REFUSED),
    "index without weight_map": (_index(lambda i: i.pop("weight_map")), REFUSED),
    "index with an empty weight_map": (_index(lambda i: i.update(weight_map={})), REFUSED),
    "index with a list": (_index(lambda i: i.update(weight_map=[FIRST])), REFUSED),
    "index names a number": (_index(lambda i: i["weight_map"].update({NORM: 5})), REFUSED),
    "index names null": (_index(lambda i: i["weight_map"].update({NORM: None})), REFUSED),
    "index names another directory": (_index(lambda i: i["weight_map"].update({NORM: "../x.safetensors"})), REFUSED),
    "index names an absolute file": (_index(lambda i: i["weight_map"].update({NORM: "/dev/zero"})), REFUSED),
    "index names escapes": (_index(lambda i: i["weight_map"].update({NORM: "\x1b[2J.safetensors"})), REFUSED),
    "index names a missing shard": (_index(lambda i: i["weight_map"].update({NORM: "m.safetensors"})), REFUSED),
    "index names config.json": (_index(lambda i: i["weight_map"].update({NORM: "config.json"})), REFUSED),
    "index puts a tensor in the wrong shard": (_index(lambda i: i["weight_map"].update({NORM: FIRST})), EITHER),
    "index lacks a tensor": (_index(lambda i: i["weight_map"].pop(NORM)), EITHER),
    "index names a tensor that is not there": (_index(lambda i: i["weight_map"].update(ghost=FIRST)), EITHER),
    "index with a wrong total_size": (_index(lambda i: i.update(metadata={"total_size": -1})), EITHER),
    "index without metadata": (_index(lambda i: i.pop("metadata")), EITHER),
    "index is not JSON": (lambda p: (p / INDEX).write_text("{"), REFUSED),
    "index nested deeply": (lambda p: (p / INDEX).write_bytes(b"[" * 200_000), REFUSED),
    "one whole file": (_single_file, ANSWERED),
    "one whole file beside a stale index": (_stale_index, EITHER),
    "one whole file beside an index without shards": (_index_without_shards, EITHER),
    "adapter beside the model": (_adapter, EITHER),
    "adapter alone": (_only_adapter, REFUSED),
}


def _weights_kinds() -> Iterator[Kind]:
    for name, (damage, expect) in WEIGHTS.items():
        yield Kind(f"weights, {name}", "weights", partial(through_checkpoint, damage=damage), expect)
    yield Kind("weights, header with a flipped byte", "weights", _flipped_header, drawn=True, needs_torch=True)
    yield Kind("weights, header with a changed number", "weights", _changed_number, drawn=True, needs_torch=True)
    yield Kind("weights, a tensor removed", "weights", _removed_tensor, REFUSED, drawn=True)
    yield Kind("weights, a tensor reshaped", "weights", _reshaped_tensor, REFUSED, drawn=True)


def _flipped_header(case: Case) -> None:
    shard = copy(case, CHECKPOINT) / case.rng.choice((FIRST, SECOND))
    raw = bytearray(shard.read_bytes())
    raw[case.rng.randrange(8 + int.from_bytes(raw[:8], "little"))] ^= 1 << case.rng.randrange(8)
    shard.write_bytes(raw)
    from_checkpoint(case, same_as_torch)


def _changed_number(case: Case) -> None:
    shard = copy(case, CHECKPOINT) / case.rng.choice((FIRST, SECOND))

    def change(header: dict[str, Any]) -> None:
        entry = header[case.rng.choice([name for name in header if name[0] != "_"])]
        numbers = entry[case.rng.choice(("shape", "data_offsets"))]
        place = case.rng.randrange(len(numbers))
        numbers[place] = case.rng.choice((numbers[place] + 1, numbers[place] - 2, 0, 10**6, numbers[place] * 2))

    before = split_shard(shard)[0]
    edit_header(shard, change)
    if split_shard(shard)[0] == before:
        return
    from_checkpoint(case, same_as_torch)


def _removed_tensor(case: Case) -> None:
    shard = copy(case, CHECKPOINT) / case.rng.choice((FIRST, SECOND))
    edit_header(shard, lambda header: header.pop(case.rng.choice(_needed(header))))
    from_checkpoint(case)


def _reshaped_tensor(case: Case) -> None:
    shard = copy(case, CHECKPOINT) / case.rng.choice((FIRST, SECOND))

    def change(header: dict[str, Any]) -> None:
        entry = header[case.rng.choice(_needed(header))]
        shape = entry["shape"]
        entry["shape"] = [*shape, 1] if len(set(shape)) < 2 else shape[::-1]

    edit_header(shard, change)
    from_checkpoint(case)


def _needed(header: dict[str, Any]) -> list[str]:
    """Tensors that the model cannot do without: not the tower's head, and not what is a palindrome of sizes."""
    return [
        name
        for name, entry in header.items()
        if name[0] != "_" and ".head." not in name and entry["shape"] != entry["shape"][::-1] + [0]
    ]


KINDS = [*_weights_kinds()]
