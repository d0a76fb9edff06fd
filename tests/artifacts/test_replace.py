"""Outputs replace only what sfexport wrote and lists, unchanged: nothing of the user's is lost, at every verb."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import assert_says, edit_json, refusal, set_fields, sfexport, snapshot

from sfexport.demo.run import DemoPaths as Tree
from sfexport.engines.tensorrt.preflight import BUILD_FILE


def somebodys_engine(path: Path) -> None:
    """A flat directory of another program's, with a file of that name."""
    path.mkdir()
    (path / "engine.json").write_text(json.dumps({"name": "V8", "cylinders": 8}))
    (path / "sfexport.json").write_text(json.dumps({"files": {}}))
    (path / BUILD_FILE).write_text(json.dumps({"format": "A4"}))
    (path / "drawing.svg").write_text("<svg/>")


@pytest.mark.parametrize("verb", ["export", "build", "check"])
def test_directory_of_another_program_is_left_alone(verb: str, tree: Tree, tmp_path: Path) -> None:
    somebodys_engine(tmp_path / "out")
    arguments: tuple[object, ...] = (verb, tree.checkpoint if verb == "export" else tree.bundle)
    if verb == "check":
        arguments = ("build", tree.checkpoint, "--check", "--target", "jetson-orin-agx-64")
    paragraph = refusal(tmp_path, *arguments, "-o", tmp_path / "out", after_steps=True)
    assert_says(paragraph, tmp_path / "out", "already holds something else", "nothing was changed")


def linked(directory: Path) -> None:
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to("../own.json")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a text of the user's": (lambda d: (d / "notes.txt").write_text("mine"), "notes.txt"),
    "a hidden file": (lambda d: (d / ".env").write_text("mine"), ".env"),
    "weights that are not listed": (lambda d: (d / "adapter_model.safetensors").write_text("mine"), "adapter_model"),
    "a directory": (lambda d: (d / "photos").mkdir(), "photos"),
    "an empty file": (lambda d: (d / "empty").touch(), "empty"),
    "a link": (lambda d: (d / "link").symlink_to("sfexport.json"), "link"),
    "a listed file that was edited": (lambda d: edit_json(d / "generation_config.json", dict.popitem), "changed after"),
    "a listed graph that was edited": (lambda d: (d / "decoder.onnx").write_bytes(b"better"), "changed after"),
    "a link in a listed file's place": (linked, "config.json"),
    "longer weights": (lambda d: next(d.glob("*-of-*")).open("ab").write(b"!"), "changed after"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_users_file_in_a_bundle_stops_its_replacement(name: str, tree_copy: Tree) -> None:
    change, part = CHANGES[name]
    change(tree_copy.bundle)
    paragraph = refusal(tree_copy.root, "export", tree_copy.checkpoint, "-o", tree_copy.bundle)
    assert_says(paragraph, tree_copy.bundle, part, "nothing was changed")


@pytest.mark.parametrize("name", ["a text of the user's", "a directory", "a listed graph that was edited"])
def test_users_file_among_engines_stops_their_replacement(name: str, tree_copy: Tree) -> None:
    change, part = CHANGES[name]
    change(tree_copy.engines)
    paragraph = refusal(tree_copy.root, "build", tree_copy.bundle, "-o", tree_copy.engines)
    assert_says(paragraph, tree_copy.engines, part)


def test_kit_is_replaced_if_nothing_was_added(tree: Tree, tmp_path: Path) -> None:
    command = ("build", tree.bundle, "--check", "--target", "jetson-orin-agx-64", "-o", tmp_path / "kit")
    for _ in range(2):
        assert sfexport(*command).exit_code in (0, 1)
        assert (tmp_path / "kit" / BUILD_FILE).is_file()
    (tmp_path / "kit" / "log.txt").write_text("mine")
    assert_says(refusal(tmp_path, *command, after_steps=True), "log.txt")


@pytest.mark.parametrize("relative", [False, True])
def test_link_to_a_bundle_is_written_through(relative: bool, tree_copy: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree_copy.root / "link").symlink_to("bundle" if relative else tree_copy.bundle)
    before = (tree_copy.bundle / "sfexport.json").read_bytes()
    monkeypatch.chdir(tree_copy.root)
    output = "link" if relative else tree_copy.root / "link"
    assert sfexport("export", tree_copy.checkpoint, "-o", output, "--frames", 4).exit_code == 0
    assert (tree_copy.root / "link").is_symlink()
    assert (tree_copy.bundle / "sfexport.json").read_bytes() != before
    for path in ("link", "bundle"):
        assert sfexport("build", tree_copy.root / path, "-o", tree_copy.engines).exit_code == 0


def test_links_in_the_place_of_outputs_are_left_alone(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "to-file").symlink_to("file")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("nowhere", "to-file", "circle"):
        assert_says(refusal(tmp_path, "export", tree.checkpoint, "-o", tmp_path / name), tmp_path / name)


BAD_FRAMES = ["many", -3, 1.5, 0, True, [8], 1e400, 10**400]


@pytest.mark.parametrize("frames", BAD_FRAMES, ids=lambda value: str(value)[:8])
def test_bad_value_never_replaces_a_good_bundle(frames: object, tree_copy: Tree) -> None:
    set_fields(tree_copy.checkpoint / "config.json", mm_training_video_frames=frames)
    before = snapshot(tree_copy.root)
    result = sfexport("export", tree_copy.checkpoint, "-o", tree_copy.bundle)
    assert (result.exit_code, snapshot(tree_copy.root)) == (2, before)
    assert_says(result.stderr.splitlines()[-1], "config.json", "mm_training_video_frames")


def test_demo_keeps_what_the_user_put_beside_it(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    assert_says(refusal(tmp_path, "demo", "-o", tmp_path / "demo"), "notes.txt")


@pytest.mark.parametrize("verb", ["export", "build", "demo"])
@pytest.mark.parametrize("name", ["loop", "loop/out"])
def test_link_to_itself_is_refused(verb: str, name: str, tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    source = {"export": [tree.checkpoint], "build": [tree.bundle], "demo": []}[verb]
    assert_says(refusal(tmp_path, verb, *source, "-o", tmp_path / name, after_steps=True), "loop", "-o")


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file can become longer than a few kilobytes: what is written first fits, the rest does not."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("verb", ["export", "int4", "build", "demo"])
def test_full_disk_leaves_what_was_there(verb: str, tree_copy: Tree) -> None:
    command: dict[str, tuple[object, ...]] = {
        "export": ("export", tree_copy.checkpoint, "-o", tree_copy.bundle, "--weights", "copy"),
        "int4": ("export", tree_copy.checkpoint, "-o", tree_copy.bundle, "--quantize", "int4"),
        "build": ("build", tree_copy.bundle, "-o", tree_copy.engines),
        "demo": ("demo", "-o", tree_copy.root / "demo"),
    }
    with full_disk():
        paragraph = refusal(tree_copy.root, *command[verb], after_steps=True)
    assert_says(paragraph, "cannot be written", "File too large")


def test_trees_made_by_an_earlier_version_are_replaced(tree_copy: Tree) -> None:
    """Their manifests have another format, and list files in the same way."""
    for file in (tree_copy.bundle / "sfexport.json", tree_copy.engines / "engine.json"):
        content = json.loads(file.read_text())
        kept = {key: value for key, value in content.items() if key not in ("digest", "weights")}
        if weights := content.get("weights"):
            shards = [{"file": s["file"], "size": s["size"], "header_sha256": "0" * 64} for s in weights["shards"]]
            kept["weights"] = {"directory": weights["directory"], "shards": shards}
        file.write_text(json.dumps(kept | {"format": 1, "sfexport": "0.0.9"}))
    assert sfexport("export", tree_copy.checkpoint, "-o", tree_copy.bundle).exit_code == 0
    assert sfexport("build", tree_copy.bundle, "-o", tree_copy.engines).exit_code == 0
    shutil.rmtree(tree_copy.checkpoint)
    assert sfexport("inspect", tree_copy.engines).exit_code == 0
