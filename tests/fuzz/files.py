"""Kinds of things in the place of a checkpoint's files: FIFOs, links, directories, other texts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from helpers import FIRST, INDEX

from fuzz.base import CHECKPOINT, Reading, copy, from_checkpoint, through_checkpoint
from fuzz.kinds import Case, Expect, Kind, Wrong

REFUSED, ANSWERED, EITHER = Expect.REFUSED, Expect.ANSWERED, Expect.EITHER
Damage = Callable[[Path], object]


FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    INDEX,
    FIRST,
)


def _in_place_of(name: str, put: Callable[[Path], object]) -> Damage:
    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        put(path / name)

    return change


def _sparse(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(900 << 20)


def _secret_link(file: Path) -> None:
    """A link to a file outside that is no JSON of this kind."""
    secret = file.parents[1] / "secret.txt"
    secret.write_text("not yours")
    file.symlink_to(secret)


def _json_secret_link(file: Path) -> None:
    secret = file.parents[1] / "secret.json"
    secret.write_text('{"password": "not yours"}')
    file.symlink_to(secret)


PLACED: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a directory": Path.mkdir,
    "a link to /dev/zero": lambda file: file.symlink_to("/dev/zero"),
    "a link to /proc/self/mem": lambda file: file.symlink_to("/proc/self/mem"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a dangling link": lambda file: file.symlink_to("../../blobs/0123"),
    "a link to a text outside": _secret_link,
    "a sparse file of 900 MB": _sparse,
}


def _file_kinds() -> Iterator[Kind]:
    for name in FILES:
        for what, put in PLACED.items():
            act = partial(_placed, name=name, put=put)
            yield Kind(f"{what} in the place of {name}", "files", act, REFUSED)
        yield Kind(
            f"an empty file in the place of {name}", "files", partial(_placed, name=name, put=Path.touch), REFUSED
        )
        if name.endswith(".json"):
            for what, text in JSON_TEXTS.items():
                put = partial(Path.write_bytes, data=text)
                yield Kind(f"{what} in the place of {name}", "files", partial(_placed, name=name, put=put), REFUSED)
    for name in ("special_tokens_map.json", "generation_config.json", "added_tokens.json"):
        act = partial(_placed, name=name, put=_json_secret_link)
        yield Kind(f"a link to JSON outside in the place of {name}", "files", act, REFUSED)
    yield Kind("a checkpoint of the Hugging Face cache, links into blobs", "files", _hub_cache, ANSWERED)
    yield Kind("a checkpoint whose directory is a link", "files", _linked_directory, ANSWERED)


JSON_TEXTS = {
    "a JSON list": b"[1, 2]",
    "a JSON number": b"7",
    "half a JSON object": b'{"a": ',
    "deeply nested JSON": b"[" * 200_000,
    "an endless number": b'{"a": 1' + b"0" * 10_000 + b"}",
    "JSON that is not UTF-8": b'{"a": "\xff\xfe"}',
    "a NUL": b"\0",
}


def _placed(case: Case, name: str, put: Callable[[Path], object]) -> None:
    through_checkpoint(case, _in_place_of(name, put), right=_nothing_outside)


def _nothing_outside(case: Case, found: Reading) -> None:
    for file in case.room.rglob("*"):
        is_copy = file.is_file() and not file.is_symlink() and file.name not in ("secret.txt", "secret.json")
        if is_copy and file.stat().st_size < 1 << 20 and b"not yours" in file.read_bytes():
            raise Wrong(f"{file.relative_to(case.room)} holds what a link outside the checkpoint names")


def _hub_cache(case: Case) -> None:
    path = copy(case, CHECKPOINT)
    hub = case.room / "hub"
    (hub / "blobs").mkdir(parents=True)
    snapshot = hub / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(path.iterdir())):
        shutil.move(file, hub / "blobs" / f"{i:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
    path.rmdir()
    path.symlink_to(snapshot)
    from_checkpoint(case)


def _linked_directory(case: Case) -> None:
    path = copy(case, CHECKPOINT)
    path.rename(case.room / "real")
    path.symlink_to("real")
    from_checkpoint(case)


KINDS = [*_file_kinds()]
