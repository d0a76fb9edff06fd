"""Kinds of places to write to: what is there already, links, names, and directories that are somebody's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from helpers import snapshot

from fuzz.base import BUNDLE, CHECKPOINT, ENGINES, copy, expect_same, read
from fuzz.kinds import Case, Expect, Kind, Refused, Wrong, command

REFUSED, ANSWERED, EITHER = Expect.REFUSED, Expect.ANSWERED, Expect.EITHER
VERBS = ("export", "build", "demo")
Put = Callable[[Case, Path], object]


def _write(case: Case, verb: str, target: object) -> None:
    if verb == "export":
        command("export", case.base / CHECKPOINT, "-o", target)
    elif verb == "build":
        command("build", case.base / BUNDLE, "-o", target, "--backend", "onnxruntime")
    else:
        command("demo", "-o", target)


def _file(case: Case, target: Path) -> None:
    target.write_text("mine")


def _directory_with(*names: str) -> Put:
    def put(case: Case, target: Path) -> None:
        target.mkdir()
        for name in names:
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_text("mine")

    return put


def _ours_and(case: Case, target: Path, name: str, verb: str) -> None:
    """Something of ours, and a file of the user's in it."""
    _write(case, verb, target)
    (target / name).write_text("mine")


# What must be refused, with nothing changed.
TAKEN: dict[str, Put] = {
    "a file": _file,
    "a FIFO": lambda case, target: os.mkfifo(target),
    "a directory with a photo": _directory_with("photo.jpg"),
    "a directory with a directory": _directory_with("sub/file"),
    "a directory with a hidden file": _directory_with(".git"),
    "somebody's engine.json": _directory_with("engine.json", "thesis.tex"),
    "somebody's engine.json alone": _directory_with("engine.json"),
    "somebody's sfexport.json": _directory_with("sfexport.json", "thesis.tex"),
    "somebody's sfexport.json alone": _directory_with("sfexport.json"),
    "the checkpoint's copy": lambda case, target: copy(case, CHECKPOINT).rename(target),
    "a dangling link": lambda case, target: target.symlink_to("nowhere"),
    "a link to a file": lambda case, target: (_file(case, case.room / "other"), target.symlink_to("other")),
    "a link to itself": lambda case, target: target.symlink_to(target.name),
    "a link to a foreign directory": lambda case, target: (
        _directory_with("photo.jpg")(case, case.room / "other"),
        target.symlink_to("other"),
    ),
}
NAMES: dict[str, str] = {
    "with spaces": "a b  c",
    "with a line break": "a\nb",
    "with escapes": "a\x1b[2Jb\x07",
    "with marks of direction": "a\u202eb",
    "with a leading dash": "-out",
    "with a leading dot": ".out",
    "with a percent sign": "50%d%s",
    "with brackets": "[a-z]*?",
    "with quotes": "a'b\"c`d$e",
    "with a surrogate": "a\udcffb",
    "with emoji": "\U0001f469\u200d\U0001f680",
    "not normalised": "Cafe\u0301",
    "of 255 bytes": "x" * 255,
    "of 240 bytes": "x" * 240,
    "of 5,000 bytes": "x" * 5000,
    "deep": "a/b/c/d/e/f",
    "with dots": "a/../b/./c",
    "with a trailing slash": "out/",
    "with an equals sign": "a=b",
    "like a partial": ".out.abc.partial",
    "like an old one": ".out.abc.old",
    "empty": "",
    "the current directory": ".",
    "the directory above": "..",
    "root": "/",
    "in /proc": "/proc/sfexport",
    "below /dev/null": "/dev/null/x",
    "a home that is not expanded": "~nobody/x",
}
UNWRITABLE = ("of 5,000 bytes", "empty", "the current directory", "the directory above", "root")
UNWRITABLE = (*UNWRITABLE, "in /proc", "below /dev/null")


def _kinds() -> Iterator[Kind]:
    for verb in VERBS:
        for name, put in TAKEN.items():
            yield Kind(f"{verb} onto {name}", "outputs", partial(_taken, verb=verb, put=put), REFUSED)
    for verb in ("export", "build"):
        for name, text in NAMES.items():
            expect = REFUSED if name in UNWRITABLE else EITHER
            yield Kind(f"{verb} to a name {name}", "outputs", partial(_named, verb=verb, name=text), expect)
        act = partial(_own_file, verb=verb)
        yield Kind(f"{verb} again onto its own directory with a user's file", "outputs", act, REFUSED)
        yield Kind(f"{verb} again onto its own directory", "outputs", partial(_again, verb=verb), ANSWERED)
        yield Kind(f"{verb} onto an empty directory", "outputs", partial(_empty, verb=verb), ANSWERED)
        yield Kind(f"{verb} through a link to its own directory", "outputs", partial(_through_link, verb=verb), EITHER)
        yield Kind(f"{verb} onto what it reads", "outputs", partial(_onto_source, verb=verb))
        yield Kind(f"{verb} into what it reads", "outputs", partial(_into_source, verb=verb))
        yield Kind(f"{verb} with a full disk", "outputs", partial(_full_disk, verb=verb), REFUSED)
    yield Kind("export of a bad checkpoint onto a good bundle", "outputs", _bad_onto_good, REFUSED)
    yield Kind("build onto the bundle", "outputs", _build_onto_bundle, REFUSED)
    yield Kind("export onto engines", "outputs", _export_onto_engines, REFUSED)


def _taken(case: Case, verb: str, put: Put) -> None:
    target = case.room / "target"
    put(case, target)
    before = snapshot_of(case.room)
    try:
        _write(case, verb, target)
    finally:
        if snapshot_of(case.room) != before:
            raise Wrong("what was there has changed")


def snapshot_of(room: Path) -> dict[str, str]:
    """As helpers.snapshot, and FIFOs by name: they cannot be read."""
    fifos = [path for path in room.rglob("*") if path.is_fifo()]
    return dict.fromkeys(map(str, fifos), "fifo") | ({} if fifos else snapshot(room))


def _open(verb: str, target: Path, case: Case) -> None:
    if verb == "export":
        command("build", target, "-o", case.room / "check", "--backend", "onnxruntime")
        target = case.room / "check"
    expect_same(case, read(target))


def _named(case: Case, verb: str, name: str) -> None:
    here = case.room / "here"
    here.mkdir()
    os.chdir(here)
    _write(case, verb, name if name.startswith("-") is False else f"./{name}")
    _open(verb, Path(os.path.normpath(name)), case)


def _own_file(case: Case, verb: str) -> None:
    target = case.room / "target"
    _ours_and(case, target, "notes.txt", verb)
    _write_unchanged(case, verb, target)


def _write_unchanged(case: Case, verb: str, target: Path) -> None:
    before = snapshot_of(case.room)
    try:
        _write(case, verb, target)
    except Refused:
        if snapshot_of(case.room) != before:
            raise Wrong("what was there has changed") from None
        raise


def _again(case: Case, verb: str) -> None:
    _write(case, verb, case.room / "target")
    _write(case, verb, case.room / "target")
    _open(verb, case.room / "target", case)


def _empty(case: Case, verb: str) -> None:
    (case.room / "target").mkdir()
    _write(case, verb, case.room / "target")
    _open(verb, case.room / "target", case)


def _through_link(case: Case, verb: str) -> None:
    """The link stays a link, whatever becomes of the rest."""
    link = case.room / "link"
    _write(case, verb, case.room / "target")
    link.symlink_to("target")
    try:
        _write(case, verb, link)
    finally:
        if not link.is_symlink():
            raise Wrong("the link was replaced")
    _open(verb, link, case)


def _onto_source(case: Case, verb: str) -> None:
    source = copy(case, CHECKPOINT if verb == "export" else BUNDLE)
    before = snapshot_of(case.room)
    try:
        command(verb, source, "-o", source)
    except Refused:
        if snapshot_of(case.room) != before:
            raise Wrong("what was there has changed") from None
        raise
    _open(verb, source, case)


def _into_source(case: Case, verb: str) -> None:
    source = copy(case, CHECKPOINT if verb == "export" else BUNDLE)
    command(verb, source, "-o", source / "out")
    _open(verb, source / "out", case)


def _full_disk(case: Case, verb: str) -> None:
    """No file may grow beyond some bytes: what a full disk does to a write."""
    import resource

    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, kept[1]))
    try:
        _write(case, verb, case.room / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        if (case.room / "target").exists():
            raise Wrong("half a directory is there")


def _bad_onto_good(case: Case) -> None:
    """The old bundle stays whole."""
    from helpers import set_fields

    target = case.room / "target"
    _write(case, "export", target)
    before = snapshot(target)
    checkpoint = copy(case, CHECKPOINT)
    set_fields(checkpoint / "config.json", mm_training_video_frames="many")
    try:
        command("export", checkpoint, "-o", target)
    finally:
        if snapshot(target) != before:
            raise Wrong("the good bundle was replaced")


def _build_onto_bundle(case: Case) -> None:
    target = copy(case, BUNDLE)
    _write_unchanged(case, "build", target)


def _export_onto_engines(case: Case) -> None:
    target = copy(case, ENGINES)
    _write_unchanged(case, "export", target)


KINDS = [*_kinds()]
