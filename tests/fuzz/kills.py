"""Kinds of sudden ends: signals at any moment of export, quantised export, build and demo; two writers; a reader.

A verb runs in a forked process, which ends itself either before its k-th operation on the file system (counted by an
audit hook: the same moment every time) or after a time. Then: the target is absent or opens, an earlier one is intact,
the next run succeeds, and nothing of the killed run is left.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fuzz.base import BUNDLE, CHECKPOINT, ENGINES, copy, expect_same, read
from fuzz.kinds import Case, Expect, Kind, Refused, Unexpected, Wrong, call, check_exit, command
from sfexport.video.decoding import Video

REFUSED, ANSWERED, EITHER = Expect.REFUSED, Expect.ANSWERED, Expect.EITHER
TOO_LATE = "it had ended before the signal"
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP, "SIGINT": signal.SIGINT}
PRELOADED = [
    "sfexport.cli",
    "sfexport.exporting.export",
    "sfexport.engines.build",
    "sfexport.qa.pipeline",
    "fuzz.kills",
]
# Audit events that change or read the disk: the moments at which a kill can show.
EVENTS = (
    *("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.listdir", "os.scandir", "os.truncate"),
    *("shutil.copyfile", "shutil.rmtree", "tempfile.mkdtemp", "tempfile.mkstemp", "ctypes.dlsym"),
)


def _context() -> Any:
    """Processes forked from a server that has imported what a verb needs, and runs no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _run(arguments: list[str], home: str, stop: tuple[int, int, float] | None, written: Any) -> None:
    """In the child. `stop`: (signal, event number or 0, seconds)."""
    from sfexport.cli import main

    os.chdir(home)
    sys.modules["torch"] = None  # type: ignore[assignment]  # seconds that no kill needs
    # What is in a worker's limits stays; what it reads from the runner is not this process's.
    out, err = io.StringIO(), io.StringIO()
    counted = [0]

    def watch(event: str, _: object) -> None:
        if event in EVENTS:
            counted[0] += 1
            if stop and stop[1] == counted[0]:
                os.kill(os.getpid(), stop[0])

    if stop and not stop[1]:
        threading.Timer(stop[2], os.kill, (os.getpid(), stop[0])).start()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        started = time.perf_counter()
        sys.addaudithook(watch)
        try:
            main(arguments, standalone_mode=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    written.put((code, counted[0], time.perf_counter() - started, out.getvalue(), err.getvalue()))
    written.close()
    written.join_thread()
    os._exit(code)


def _start(arguments: list[object], home: Path, stop: tuple[int, int, float] | None = None) -> tuple[Any, Any]:
    context = _context()
    written = context.Queue()
    process = context.Process(target=_run, args=([str(a) for a in arguments], str(home), stop, written))
    process.start()
    return process, written


def _arguments(case: Case, verb: str, target: Path) -> list[object]:
    return {
        "export": ["export", case.base / CHECKPOINT, "-o", target, "--weights", "copy"],
        "quantised export": ["export", case.base / CHECKPOINT, "-o", target, "--quantize", "int4"],
        "build": ["build", case.base / BUNDLE, "-o", target, "--backend", "onnxruntime"],
        "build of a checkpoint": ["build", case.base / CHECKPOINT, "-o", target, "--backend", "onnxruntime"],
        "demo": ["demo", "-o", target],
    }[verb]


def _whole_run(case: Case, verb: str) -> tuple[int, float]:
    """(events, seconds) of an undisturbed run, measured once."""
    note = case.base / f"run {verb}"
    if not note.exists():
        process, written = _start(_arguments(case, verb, case.room / "measured"), case.room)
        code, events, seconds, out, err = written.get(timeout=50)
        process.join()
        if code:
            check_exit(code, out, err)
        note.write_text(f"{events} {seconds}")
        import shutil

        for made in case.room.glob("measured*"):
            shutil.rmtree(made)
    events, seconds = note.read_text().split()
    return int(events), float(seconds)


def _killed(case: Case, verb: str, signal_name: str, replacing: bool, timed: bool) -> str | None:
    target = case.room / "target"
    events, seconds = _whole_run(case, verb)
    if replacing:
        command(*_arguments(case, verb, target))
    names = {path.name for path in case.room.iterdir()}
    stop = (int(SIGNALS[signal_name]), 0 if timed else 1 + case.rng.randrange(events), case.rng.uniform(0, seconds))
    process, _ = _start(_arguments(case, verb, target), case.room, stop)
    process.join(50)
    if process.is_alive():
        process.kill()
        raise Unexpected(f"does not end after {signal_name}")
    if signal_name == "SIGKILL" and not timed and process.exitcode != -signal.SIGKILL:
        raise Unexpected(f"in the campaign itself: exit status {process.exitcode} at event {stop[1]} of {events}")
    moment = f"{stop[2]:.3f} of {seconds:.3f} s" if timed else f"event {stop[1]} of {events}"
    where = f"after {signal_name} at {moment}"
    _check_whole(case, verb, target, replacing, where)
    if signal_name != "SIGKILL" and (left := _strangers(case.room, names | {"target", "target-bundle"})):
        raise Wrong(f"left behind {where}: {left}")
    try:
        _run_again(case, verb, target)
    except Refused as refusal:
        raise Wrong(f"the next run is refused {where}: {refusal}") from refusal
    _check_whole(case, verb, target, True, f"the run {where}")
    if left := _strangers(case.room, names | {"target", "target-bundle"}):
        raise Wrong(f"left behind by the run {where}: {left}")
    return None if process.exitcode else TOO_LATE


def _run_again(case: Case, verb: str, target: Path) -> None:
    process, written = _start(_arguments(case, verb, target), case.room)
    code, _, _, out, err = written.get(timeout=50)
    process.join()
    check_exit(code, out, err)


def _check_whole(case: Case, verb: str, target: Path, must_be_there: bool, where: str) -> None:
    """Raises Wrong for a half-written target, or one that is gone. A demo's parts appear one after the other."""
    if verb == "demo":
        parts = [target / "checkpoint", target / "bundle", *target.glob("engines/[!.]*")]
        for part in parts:
            _check_whole(case, "part of a demo", part, False, where)
        if (target / "clip.mp4").exists():
            with call(Video.open, target / "clip.mp4") as video:
                list(video.frames([video.info.frame_count - 1]))
        return
    if not target.exists():
        if must_be_there:
            raise Wrong(f"the target is gone {where}")
        return
    try:
        command("inspect", target)
    except Refused as refusal:
        raise Wrong(f"the target is damaged {where}: {refusal}") from refusal
    manifest = "sfexport.json" if "export" in verb else "engine.json" if "build" in verb else None
    if manifest and not (target / manifest).is_file():  # what is copied first reads as a checkpoint
        raise Wrong(f"the target has no {manifest} {where}")


def _strangers(room: Path, known: set[str]) -> list[str]:
    return sorted(
        str(path.relative_to(room))
        for path in room.rglob("*")
        if (path.parent == room and path.name not in known) or any(m in path.name for m in (".partial", ".old"))
    )


def _two_writers(case: Case, verb: str) -> None:
    """Both at once: each succeeds or is refused, at least one succeeds, and the target is whole."""
    target = case.room / "target"
    started = [_start(_arguments(case, verb, target), case.room) for _ in range(2)]
    ends = [written.get(timeout=50) for _, written in started]
    for process, _ in started:
        process.join()
    refused = 0
    for code, _, _, out, err in ends:
        try:
            check_exit(code, out, err)
        except Refused:
            refused += 1
    if refused == 2:
        raise Wrong("both were refused")
    _check_whole(case, verb, target, True, "after two writers")
    if left := _strangers(case.room, {"target", "target-bundle"}):
        raise Wrong(f"left behind: {left}")


def _reader(case: Case, verb: str) -> None:
    """Reading while it is replaced: the old one, the new one, or a refusal; never an unexpected error."""
    target = case.room / "target"
    command(*_arguments(case, verb, target))
    process, written = _start(_arguments(case, verb, target), case.room)
    refusals = 0
    while process.is_alive():
        try:
            command("inspect", target)
        except Refused:
            refusals += 1
    code, _, _, out, err = written.get(timeout=50)
    check_exit(code, out, err)
    _check_whole(case, verb, target, True, "after the replacement")


def _asked_while_replaced(case: Case) -> None:
    """Engines that are loaded answer on while their directory is replaced."""
    bundle, engines = copy(case, BUNDLE), case.room / ENGINES
    command("build", bundle, "-o", engines, "--backend", "onnxruntime")
    process, written = _start(["build", bundle, "-o", engines, "--backend", "onnxruntime"], case.room)
    while process.is_alive():
        with contextlib.suppress(Refused):
            expect_same(case, read(engines))
    check_exit(*written.get(timeout=50)[0:1], "", "")
    expect_same(case, read(engines))


def _kinds() -> Iterator[Kind]:
    for verb in ("export", "quantised export", "build", "build of a checkpoint"):
        for name in SIGNALS:
            for replacing in (False, True):
                what = f"{verb}{' onto an earlier one' if replacing else ''} ended by {name}"
                act = partial(_killed, verb=verb, signal_name=name, replacing=replacing)
                yield Kind(what, "kills", partial(act, timed=False), ANSWERED, drawn=True, timeout=120)
                yield Kind(
                    f"{what} after a time",
                    "kills",
                    partial(act, timed=True),
                    ANSWERED,
                    drawn=True,
                    slow=True,
                    timeout=120,
                )
    for name in ("SIGKILL", "SIGTERM"):
        act = partial(_killed, verb="demo", signal_name=name, replacing=False, timed=False)
        yield Kind(f"demo ended by {name}", "kills", act, ANSWERED, drawn=True, slow=True, timeout=180)
    for verb in ("export", "build"):
        yield Kind(f"two writers of one {verb}", "kills", partial(_two_writers, verb=verb), ANSWERED, drawn=True)
        yield Kind(
            f"a reader while {verb} replaces", "kills", partial(_reader, verb=verb), ANSWERED, drawn=True, slow=True
        )
    yield Kind("asked while the engines are replaced", "kills", _asked_while_replaced, ANSWERED, drawn=True, slow=True)


KINDS = [*_kinds()]
