"""The README stays true: its commands are executed, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as it is after `make demo` and the README's first commands."""
    folder = tmp_path_factory.mktemp("readme")
    run("sfexport demo\nsfexport export sfexport-demo/checkpoint -o bundle\nsfexport build bundle -o engines", folder)
    return folder


def run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e", "-c", script],
        cwd=folder,
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done


def test_the_set_up_commands_come_first_and_exist() -> None:
    assert blocks("sh")[0].split("\n")[:2] == ["make demo", "make test"]
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for target in ("demo", "test", "lint"):
        run(f"make -n {target}", ROOT)


@pytest.mark.parametrize("script", [b for b in blocks("sh") if not b.startswith("make")])
def test_shell_examples(script: str, workplace: Path) -> None:
    if "sfexport parity" in script:
        pytest.importorskip("torch", reason="parity compares with PyTorch, which is not installed")
    run(script, workplace)


@pytest.mark.parametrize("script", blocks("python"))
def test_python_examples(script: str, workplace: Path) -> None:
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", script], cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_shown_session_is_what_the_demo_prints(workplace: Path, tmp_path: Path) -> None:
    """As without PyTorch. Answers and parity lines may differ in their last digits elsewhere; the steps may not."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('hidden by the test', name='torch')")
    shutil.rmtree(workplace / "sfexport-demo")
    done = run(
        "sfexport demo", workplace, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    )
    printed = done.stderr + done.stdout
    session = next(b for b in blocks("text") if b.startswith("sfexport demo"))
    for line in session.splitlines():
        stable = re.split(r"\d\.\d|, 0\.|\(|A: ", line)[0].strip()
        assert stable in printed, line


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
