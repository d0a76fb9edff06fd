"""What is printed: control characters, long messages, odd file names and sizes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import assert_says, edit_json, refusal, sfexport, strict_json

from sfexport.demo.run import DemoPaths as Tree
from sfexport.printable import LONGEST, json_text, printable, size_text, sizes_text

HOSTILE = "\x1b[2J\x07\x9b31m\u202egnp.\u2066\u2028\x7f\udce9"


def is_harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def test_every_character_that_a_terminal_obeys_is_escaped() -> None:
    assert printable(HOSTILE) == r"\x1b[2J\x07\x9b31m\u202egnp.\u2066\u2028\x7f\xe9"
    for code in [*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xD800, 0xDFFF]:
        shown = printable(f"a{chr(code)}b")
        assert chr(code) in "\n\t" or is_harmless(shown), hex(code)


def test_words_and_emoji_stay_as_they_are() -> None:
    for text in ("naïve 猫", "می‌خواهم", "👩‍🚀 ❤️", "two\nlines\tand a tab"):
        assert printable(text) == text


@pytest.mark.parametrize("verb", ["inspect", "export", "build", "plan"])
def test_terminal_escapes_of_names_are_not_printed(verb: str, tmp_path: Path) -> None:
    name = HOSTILE.replace("\udce9", "")
    output = ("-o", tmp_path / "out") if verb in ("export", "build") else ()
    paragraph = refusal(tmp_path, verb, tmp_path / name, *output)
    assert is_harmless(paragraph)
    assert_says(paragraph, r"\x1b[2J\x07\x9b31m\u202e")


def test_terminal_escapes_of_a_checkpoint_are_not_printed(tree: Tree, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    edit_json(checkpoint / "config.json", lambda c: c.update(hidden_act=HOSTILE.replace("\udce9", "")))
    assert is_harmless(refusal(tmp_path, "inspect", checkpoint))
    result = sfexport("doctor", "--target", "\x1b[31mred")
    assert is_harmless(result.stderr) and r"\x1b[31mred" in result.stderr
    result = sfexport("ask", "x", "y", "-q", "?", "--frames", "\x1b[31mred")
    assert is_harmless(result.stderr) and r"\x1b[31mred" in result.stderr


def test_long_error_keeps_its_ends(tmp_path: Path) -> None:
    result = sfexport("inspect", tmp_path / "/".join(["deep"] * 50_000) / "end")
    assert len(result.stderr) < LONGEST + 200
    assert_says(result.stderr, "Error: ", "characters ...]", "end")


def test_json_of_a_file_name_that_is_not_utf8_is_ascii(tree: Tree, tmp_path: Path) -> None:
    clip = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    shutil.copyfile(tree.clip, clip)
    command = [
        sys.executable,
        "-m",
        "sfexport",
        "ask",
        tree.engines,
        clip,
        "-q",
        "?",
        "--max-new-tokens",
        "1",
        "--json",
    ]
    out = subprocess.run(command, capture_output=True, check=True).stdout
    assert out.isascii()
    found = strict_json(out.decode())["video"]
    assert found == rf"{tmp_path}/caf\xe9.mp4"
    found.encode("utf-8")


def test_json_holds_no_lone_surrogate_and_no_nan() -> None:
    text = json_text({"\udc80": ["\ud800", float("nan"), 1e999, {"deep": ("\udfff", "é", 2)}]})
    assert text.isascii()
    assert json.loads(text) == {r"\x80": [r"\ud800", None, None, {"deep": [r"\udfff", "é", 2]}]}


def test_ascii_output_is_not_an_error(tree: Tree, tmp_path: Path) -> None:
    missing = tmp_path / "猫"
    run = subprocess.run(
        [sys.executable, "-m", "sfexport", "inspect", missing],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert run.returncode == 2
    assert rb"\u732b does not exist" in run.stderr


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2_407_512, "2.4 MB"), (17e9, "17.0 GB")]
)
def test_sizes_have_a_unit_that_shows_them(count: float, text: str) -> None:
    assert size_text(count) == text


def test_compared_sizes_never_read_the_same() -> None:
    assert sizes_text(4e9, 3e6) == ("4.0 GB", "3.0 MB")
    assert sizes_text(4_000_000_001, 4_000_000_000) == ("4,000,000,001 bytes", "4,000,000,000 bytes")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal here")
@pytest.mark.parametrize("ignored", [False, True], ids=["as usual", "under nohup"])
def test_closed_terminal_ends_a_verb_as_sigterm_does(ignored: bool, tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN if {ignored} else signal.SIG_DFL)
import sfexport.artifacts.inspect
def inspect(path):
    try:
        os.kill(os.getpid(), signal.SIGHUP)
    finally:
        print("cleaned up", file=sys.stderr)
    return {{}}
sfexport.artifacts.inspect.inspect = inspect
from sfexport.cli import main
main(["inspect", "x", "--json"])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0 if ignored else 128 + signal.SIGHUP, "cleaned up\n")
