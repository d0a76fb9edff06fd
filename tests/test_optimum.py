"""`optimum-cli export sfexport`: found by optimum as installed, and the same as `sfexport export`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from helpers import assert_says, sfexport, snapshot, strict_json

from sfexport.artifacts.manifest_files import BUNDLE_FILE
from sfexport.cli import main
from sfexport.demo.shipped import SHIPPED

pytest.importorskip("optimum.commands.optimum_cli")

HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "av", "tokenizers", "numpy", "PIL"}


def optimum(*args: object) -> subprocess.CompletedProcess:
    """optimum's own command, in a process of its own."""
    command = [str(Path(sys.executable).with_name("optimum-cli")), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_names_the_command_and_its_options() -> None:
    assert "sfexport" in optimum("export", "--help").stdout
    run = optimum("export", "sfexport", "--help")
    assert run.returncode == 0, run.stderr
    options = [p for p in main.commands["export"].params if isinstance(p, click.Option) and p.name != "output"]
    assert_says(run.stdout, "--model CHECKPOINT", "OUT", *(name for option in options for name in option.opts))


def test_registration_imports_nothing_heavy(tmp_path: Path) -> None:
    """Every optimum command pays for it."""
    register = (
        "import sys, importlib; optimum = importlib.import_module('optimum.commands.optimum_cli'); "
        "before = set(sys.modules); commands = optimum.load_optimum_namespace_cli_commands(); "
        "assert 'sfexport' in {command.COMMAND.name for command, _ in commands}, commands; "
        "print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", register], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    imported = set(run.stdout.split())
    assert "sfexport.optimum_command" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("options", [(), ("--precision", "fp16", "--frames", 5, "--weights", "copy")])
def test_the_bundle_is_what_sfexport_export_writes(options: tuple[object, ...], tmp_path: Path) -> None:
    run = optimum("export", "sfexport", "--model", SHIPPED, tmp_path / "theirs", *options)
    assert run.returncode == 0, run.stderr
    assert_says(run.stdout, f"bundle written to {tmp_path / 'theirs'}")
    assert sfexport("export", SHIPPED, "-o", tmp_path / "ours", *options).exit_code == 0
    theirs, ours = (snapshot(tmp_path / name) for name in ("theirs", "ours"))
    assert "decoder.onnx" in ours
    assert theirs.pop(BUNDLE_FILE) and ours.pop(BUNDLE_FILE)
    assert theirs == ours
    # The manifests name their own directory and nothing else that differs.
    written = [(tmp_path / name / BUNDLE_FILE).read_text() for name in ("theirs", "ours")]
    manifests = [json.loads(text.replace(str(tmp_path / "theirs"), str(tmp_path / "ours"))) for text in written]
    assert [len(manifest.pop("digest")) for manifest in manifests] == [64, 64]  # of the text, so of the name too
    assert manifests[0] == manifests[1]


def test_flags_are_taken(tmp_path: Path) -> None:
    run = optimum("export", "sfexport", "-m", SHIPPED, tmp_path / "out", "--json")
    assert run.returncode == 0, run.stderr
    assert strict_json(run.stdout)["kind"] == "bundle"


def test_refusals_are_sfexports_own(tmp_path: Path) -> None:
    nowhere, out = tmp_path / "nowhere", tmp_path / "out"
    run, own = optimum("export", "sfexport", "--model", nowhere, out), sfexport("export", nowhere, "-o", out)
    assert (run.returncode, run.stderr) == (own.exit_code, own.stderr) == (2, own.stderr)
    assert own.stderr.startswith("Error: ")
    for arguments, part in (((out,), "--model"), (("-m", SHIPPED, out, "--precision", "fp12"), "fp12")):
        run = optimum("export", "sfexport", *arguments)
        assert run.returncode == 2
        assert_says(run.stderr, part)
    assert not out.exists()
