"""Kinds of edited manifests and files of bundles and engine directories."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from helpers import FIRST

from fuzz.base import BUNDLE, ENGINES, copy, expect_same, read
from fuzz.files import PLACED
from fuzz.kinds import Case, Expect, Kind, command

REFUSED, ANSWERED, EITHER = Expect.REFUSED, Expect.ANSWERED, Expect.EITHER


BUNDLE_FILE, ENGINE_FILE = "sfexport.json", "engine.json"
GRAPHS = ("vision_encoder", "compressor", "decoder")

LEAVES: dict[str, Any] = {
    "null": None,
    "text": "abc",
    "empty text": "",
    "negative": -1,
    "zero": 0,
    "fraction": 1.5,
    "huge": 10**9,
    "beyond 64 bits": 10**30,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "true": True,
    "list": [],
    "object": {},
    "escapes": "\x1b[31mred\x1b]0;t\x07",
    "an absolute path": "/dev/zero",
    "a path above": "../../../../etc/passwd",
    "a NUL": "a\0b",
}
SECTIONS = [
    "sfexport",
    "format",
    "model",
    "image",
    "tokens_per_frame",
    "options",
    "graphs",
    "checkpoint",
    "weights",
    "quantization",
    "files",
    "tools",
]
ENGINE_SECTIONS = ["sfexport", "format", "backend", "target", "machine", "runtime", "bundle", "files"]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a JSON value, holders too."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from leaves(child, (*path, key))


def _leaf_kinds() -> Iterator[Kind]:
    """Any leaf of a section, drawn, takes another value: refused, or of no importance."""
    for manifest, sections in ((BUNDLE_FILE, SECTIONS), (ENGINE_FILE, ENGINE_SECTIONS)):
        for section in sections:
            for name, value in LEAVES.items():
                act = partial(_change_leaf, manifest=manifest, section=section, value=value)
                yield Kind(f"{manifest} {section}: {name}", "manifests", act, drawn=True)
            yield Kind(
                f"{manifest} {section}: removed",
                "manifests",
                partial(_change_leaf, manifest=manifest, section=section, remove=True),
                drawn=True,
            )


def _change_leaf(case: Case, manifest: str, section: str, value: Any = None, remove: bool = False) -> None:
    file = both(case) / (BUNDLE if manifest == BUNDLE_FILE else ENGINES) / manifest
    content = json.loads(file.read_text())
    if section not in content:
        content[section] = None
    # The first case takes the section as a whole.
    places = list(leaves(content[section], (section,)))
    *holders, key = places[0] if case.number == 0 else case.rng.choice(places)
    holder = content
    for step in holders:
        holder = holder[step]
    if remove:
        del holder[key]
    else:
        holder[key] = value
    file.write_text(json.dumps(content))
    use(case, built_again=manifest == BUNDLE_FILE)


def both(case: Case) -> Path:
    """Bundle and engines to change."""
    copy(case, BUNDLE)
    copy(case, ENGINES)
    return case.room


def use(case: Case, built_again: bool) -> None:
    """All that reads them: inspect, build, ask."""
    engines = case.room / ENGINES
    if built_again:
        command("inspect", case.room / BUNDLE, "--json")
        engines = case.room / "again"
        command("build", case.room / BUNDLE, "-o", engines, "--backend", "onnxruntime")
    command("inspect", engines, "--json")
    expect_same(case, read(engines))


def _edited(case: Case, change: Callable[[Path], object], built_again: bool) -> None:
    change(both(case) / (BUNDLE if built_again else ENGINES))
    use(case, built_again)


MANIFEST_TEXTS: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[]",
    "a number": b"3",
    "an empty object": b"{}",
    "nested deeply": b"[" * 200_000,
    "not UTF-8": b"\xff\xfe{}",
    "a NUL": b"\0" * 100,
    "an endless number": b'{"format": 1' + b"0" * 10_000 + b"}",
}


def _file_kinds() -> Iterator[Kind]:
    parts = (
        (True, BUNDLE_FILE, "the bundle", (*(f"{g}.onnx" for g in GRAPHS), "config.json", "tokenizer.json", FIRST)),
        (False, ENGINE_FILE, "the engines", tuple(f"{g}.onnx" for g in GRAPHS)),
    )
    for is_bundle, manifest, what, names in parts:
        for name, raw in MANIFEST_TEXTS.items():
            change = partial(_write, name=manifest, raw=raw)
            yield _kind(f"{manifest}: {name}", change, is_bundle, REFUSED)
        for name in (*names, manifest):
            # A bundle with its weights and without its manifest is a checkpoint.
            gone = EITHER if name == BUNDLE_FILE else REFUSED
            yield _kind(f"{name} of {what} removed", partial(_remove, name=name), is_bundle, gone)
            for placed, put in PLACED.items():
                put_there = partial(_put, name=name, put=put)
                yield _kind(f"{placed} in the place of {name} of {what}", put_there, is_bundle, gone)
            act = partial(_flip, is_bundle=is_bundle, name=name)
            expect = EITHER if name == manifest else REFUSED
            yield Kind(f"{name} of {what} with a flipped byte", "manifests", act, expect, drawn=True)
            yield Kind(
                f"{name} of {what} cut", "manifests", partial(_cut, is_bundle=is_bundle, name=name), REFUSED, drawn=True
            )
        yield _kind(f"a file more in {what}", partial(_write, name="more.bin", raw=b"1"), is_bundle, EITHER)
        yield _kind(f"a directory more in {what}", lambda path: (path / "more").mkdir(), is_bundle, EITHER)


def _kind(name: str, change: Callable[[Path], object], is_bundle: bool, expect: Expect) -> Kind:
    return Kind(name, "manifests", partial(_edited, change=change, built_again=is_bundle), expect)


def _write(path: Path, name: str, raw: bytes) -> None:
    (path / name).write_bytes(raw)


def _remove(path: Path, name: str) -> None:
    (path / name).unlink()


def _put(path: Path, name: str, put: Callable[[Path], object]) -> None:
    (path / name).unlink()
    put(path / name)


def _flip(case: Case, is_bundle: bool, name: str) -> None:
    def change(path: Path) -> None:
        raw = bytearray((path / name).read_bytes())
        raw[case.rng.randrange(len(raw))] ^= 1 << case.rng.randrange(8)
        (path / name).write_bytes(raw)

    _edited(case, change, is_bundle)


def _cut(case: Case, is_bundle: bool, name: str) -> None:
    def change(path: Path) -> None:
        os.truncate(path / name, case.rng.randrange((path / name).stat().st_size - 2))

    _edited(case, change, is_bundle)


KINDS = [*_leaf_kinds(), *_file_kinds()]
