"""Directories that appear whole or not at all: what the verbs' own tests cannot show."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import snapshot

from sfexport.artifacts import atomic
from sfexport.artifacts.atomic import new_directory, new_file, restore
from sfexport.artifacts.manifest_files import describe_files, write_manifest
from sfexport.errors import InputError

MANIFEST = "manifest.json"


def fill(directory: Path, text: str) -> None:
    """An output of ours with one file."""
    (directory / "text").write_text(text)
    write_manifest(directory / MANIFEST, {"files": describe_files(directory, ["text"])})


def make(target: Path, text: str) -> None:
    with new_directory(target, MANIFEST) as directory:
        fill(directory, text)


@pytest.fixture(params=["exchange", "two steps"])
def replacing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of replacing a directory: file systems without an exchange have the second."""
    if request.param == "two steps":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    return request.param


def test_a_directory_that_another_is_writing_is_left_alone(tmp_path: Path, replacing: str) -> None:
    target = tmp_path / "made"
    with new_directory(target, MANIFEST) as first:
        fill(first, "first")
        with new_directory(target, MANIFEST) as second:
            fill(second, "second")
        assert (target / "text").read_text() == "second"
        assert first.is_dir()
    assert (target / "text").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_only_directories_left_for_the_same_target_are_removed(tmp_path: Path) -> None:
    for name in (".made.abc.partial", ".made-2.abc.partial", "made.partial", ".made.abc.old"):
        (tmp_path / name).mkdir()
    make(tmp_path / "made", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"made", ".made-2.abc.partial", "made.partial"}


def test_system_exchanges_directories_in_one_step(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("an exchange needs Linux")
    for name in ("a", "b"):
        (tmp_path / name / name).mkdir(parents=True)
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").is_dir() and (tmp_path / "b" / "a").is_dir()


def test_target_is_never_absent_while_it_is_replaced(tmp_path: Path) -> None:
    target, seen, stop = tmp_path / "made", [], threading.Event()
    make(target, "0")
    if not atomic._exchange(target, target / ".." / "made"):
        pytest.skip("no exchange on this file system")

    def watch() -> None:
        while not stop.is_set():
            seen.append((target / "text").read_text())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(1, 30):
        make(target, str(i))
    stop.set()
    watcher.join()
    assert seen == sorted(seen, key=int) and len(set(seen)) > 1


def test_directory_moved_aside_by_a_killed_process_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "made"
    make(target, "old")
    before = snapshot(target)
    aside = tmp_path / ".made.abc.old"
    aside.mkdir()
    target.rename(aside / "made")
    restore(target)
    assert snapshot(target) == before and list(tmp_path.iterdir()) == [target]
    aside.mkdir()
    target.rename(aside / "made")
    make(target, "new")
    assert (target / "text").read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_failed_replacement_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "made"
    make(target, "old")
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    rename = Path.rename

    def fail(path: Path, new: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(errno.EBUSY, "busy", str(new))
        return rename(path, new)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(InputError, match="cannot be written"):
        make(target, "new")
    assert (target / "text").read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path, replacing: str) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/made")
    make(tmp_path / "disk" / "made", "old")
    make(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "made" / "text").read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "link", "made", "manifest.json", "text"]


def test_file_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real.txt")
    for text in ("one", "two"):
        with new_file(tmp_path / "link") as file:
            assert file.suffix == ".txt"
            file.write_text(text)
        assert (tmp_path / "real.txt").read_text() == text
    assert {path.name for path in tmp_path.iterdir()} == {"link", "real.txt"}


@pytest.mark.parametrize("name", ["x" * 250, "ü" * 120, "new\nline", "\x1b[31m", "[a-z]*", " ", "-rf"])
def test_any_name_that_the_file_system_takes_can_be_replaced(name: str, tmp_path: Path) -> None:
    for text in ("one", "two"):
        make(tmp_path / name, text)
        assert (tmp_path / name / "text").read_text() == text
    assert len(list(tmp_path.iterdir())) == 1


def test_file_that_appears_while_another_writes_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "made"
    make(target, "old")
    writing = new_directory(target, MANIFEST)
    fill(writing.__enter__(), "new")
    (target / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"also holds notes\.txt"):
        writing.__exit__(None, None, None)
    assert (target / "notes.txt").read_text() == "mine" and (target / "text").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_full_disk_is_said_and_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "made"
    make(target, "old")
    before = snapshot(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written"):
            make(target, "x" * (1 << 17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(tmp_path) == before


def test_mount_point_is_refused_before_any_work(tmp_path: Path) -> None:
    if not os.path.ismount("/proc"):
        pytest.skip("/proc is not mounted here")
    with pytest.raises(InputError, match="mounted"), new_directory(Path("/proc"), MANIFEST):
        pytest.fail("it began")


WRITER = """
import sys, time
from pathlib import Path
from sfexport.artifacts import atomic
from test_atomic import make
put = atomic._put
def slowly(*paths):  # widen the window in which two writers meet
    time.sleep(0.03)
    put(*paths)
    time.sleep(0.03)
atomic._put = slowly
if sys.argv[2] == "steps":
    atomic._exchange = lambda first, second: False
for i in range(3):
    make(Path(sys.argv[1]), sys.argv[3])
"""


@pytest.mark.parametrize("way", ["exchange", "steps"])
def test_two_writers_take_turns(way: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path / "made", way, str(i)],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for writer in writers:
        assert (writer.communicate()[1], writer.returncode) == ("", 0)
    assert (tmp_path / "made" / "text").read_text() in "01"
    assert list(tmp_path.iterdir()) == [tmp_path / "made"]


ENDED_EVERYWHERE = """
import os, signal, sys
from pathlib import Path
from sfexport.artifacts.atomic import new_directory

def end(number, frame):
    raise SystemExit(number)

signal.signal(signal.SIGTERM, end)
state = {"count": 0, "at": 0}

def watch(event, arguments):
    if state["at"] and event.split(".")[0] in ("os", "open", "shutil", "tempfile"):
        state["count"] += 1
        if state["count"] == state["at"]:
            state["at"] = 0
            os.kill(os.getpid(), signal.SIGTERM)

sys.addaudithook(watch)
room, ended = Path(sys.argv[1]), 0
for at in range(1, 1000):
    state.update(count=0, at=at)
    try:
        with new_directory(room / "out", "sfexport.json") as directory:
            (directory / "part").mkdir()
            raise LookupError
    except SystemExit:
        ended += 1
    except LookupError:
        if state["at"]:
            break
    finally:
        reached, state["at"] = state["at"], 0
    assert not os.listdir(room), (at, os.listdir(room))
print(ended)
"""


def test_termination_at_any_operation_leaves_nothing(tmp_path: Path) -> None:
    """The signal comes at the first, second, ... operation on the file system, until one run ends without it."""
    done = subprocess.run([sys.executable, "-c", ENDED_EVERYWHERE, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10
