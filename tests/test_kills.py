"""Kills at random moments: every verb that writes leaves its output whole or absent, and works when it is run again.

SFEXPORT_KILLS sets how many there are; `make fuzz` has many.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import sfexport

from sfexport.demo.run import DemoPaths as Tree

KILLS = int(os.environ.get("SFEXPORT_KILLS", "2"))
# Reports when the imports are done, so that kills fall into the work.
COMMAND = """
import sys
import sfexport.demo.run, sfexport.commands.build, sfexport.artifacts.inspect, sfexport.engines.weight_check
from sfexport.cli import main
print("ready", flush=True)
main(sys.argv[1:])
"""


def run_and_kill(after: float | None, *arguments: object) -> int:
    """Run a verb in a process of its own; kill it so many seconds after its imports. None: let it end."""
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        if after is not None:
            time.sleep(after)
            process.send_signal(signal.SIGKILL)
        process.stdout.read()
        return process.wait()


def seconds_of(*arguments: object) -> float:
    start = time.monotonic()
    assert run_and_kill(None, *arguments) == 0
    return time.monotonic() - start


@pytest.mark.parametrize("quantize", [False, True], ids=["export", "int4"])
def test_killed_export_leaves_the_earlier_bundle_whole(quantize: bool, tree_copy: Tree) -> None:
    out, chance = tree_copy.root / "again", random.Random(10 + quantize)
    command = ("export", tree_copy.checkpoint, "-o", out, *(["--quantize", "int4"] if quantize else []))
    whole = seconds_of(*command)
    for _ in range(KILLS):
        run_and_kill(chance.uniform(0, whole), *command)
        assert sfexport("inspect", out).exit_code == 0, "never absent, never half"
    assert sfexport(*command).exit_code == 0
    assert not [path.name for path in tree_copy.root.iterdir() if path.name.startswith(".")]


def test_killed_build_leaves_the_earlier_engines_whole(tree_copy: Tree) -> None:
    chance, command = random.Random(12), ("build", tree_copy.bundle, "-o", tree_copy.engines)
    whole = seconds_of(*command)
    for _ in range(KILLS):
        run_and_kill(chance.uniform(0, whole), *command)
        assert sfexport("inspect", tree_copy.engines).exit_code == 0
    assert sfexport(*command).exit_code == 0


def test_killed_demo_can_be_run_again(tmp_path: Path) -> None:
    """Its checkpoint and clip are made in the first second; then come the export and the build."""
    root, chance = tmp_path / "demo", random.Random(13)
    for i in range(KILLS):
        run_and_kill(chance.uniform(0, 0.3 if i % 2 else 1.5), "demo", "-o", root)
    # What versions before this one left behind: a half copied checkpoint, a draft of the clip.
    weights = root / "checkpoint" / "model.safetensors"
    if weights.exists():
        weights.write_bytes(weights.read_bytes()[:1000])
    root.mkdir(exist_ok=True)
    (root / ".clip.4711.mp4").write_bytes(b"half")
    result = sfexport("demo", "-o", root)
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in root.iterdir()) == ["bundle", "checkpoint", "clip.mp4", "engines"]
    assert result.stdout.count("; right)") == 2
