"""The README and the pages that use the demo model stay true: their commands are executed, their links resolve."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Pages whose commands need another machine or a released checkpoint; tests/test_docs.py parses them.
ELSEWHERE = ("jetson.md", "datacenter.md")
README = ROOT / "README.md"
DEMO = ROOT / "docs" / "demo.md"
PAGES = [README, *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in ELSEWHERE)]
SET_UP = ("make ", "pip ")  # what a block begins with that installs or tests, and so cannot run inside a test


def blocks(language: str, *pages: Path) -> list[str]:
    """The pages' code blocks in that language, each once."""
    texts = [page.read_text(encoding="utf-8") for page in pages]
    found = [b for text in texts for b in re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]
    return list(dict.fromkeys(found))


SHELL = [block for block in blocks("sh", *PAGES) if not block.startswith(SET_UP)]
PYTHON = blocks("python", *PAGES)
# What the other examples need.
FIRST = ("sfexport demo", "sfexport export sfexport-demo/checkpoint -o bundle", "sfexport build bundle -o my-engines")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as it is after `make demo` and the README's first commands."""
    folder = tmp_path_factory.mktemp("readme")
    run("\n".join(FIRST), folder)
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
    assert blocks("sh", README)[0].split("\n")[:2] == ["make demo", "make test"]
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for target in ("demo", "test", "lint", "docs"):
        run(f"make -n {target}", ROOT)


def test_the_readme_is_short_and_its_examples_are_among_those_that_are_run() -> None:
    """The pages that were split off the README are run too."""
    assert len(README.read_text(encoding="utf-8").splitlines()) < 150
    for command in ("export", "build", "ask", "inspect", "parity", "doctor", "plan", "demo"):
        assert any(f"sfexport {command}" in block for block in SHELL), command
    assert any("--quantize int4" in block for block in SHELL) and any("--check -o" in block for block in SHELL)
    assert len(PYTHON) >= 4


def test_examples_write_to_names_that_a_clone_does_not_have() -> None:
    """Readers run them at the root of their clone, where `engines` and `model` are links into the package."""
    pages = [*PAGES, *(ROOT / "docs" / name for name in ELSEWHERE)]
    outputs = re.findall(r"sfexport (?:export|build) .*-o (\S+)", "\n".join(blocks("sh", *pages)))
    assert "my-engines" in outputs
    tracked = {"model", "engines", "cli.py", "docs", "tests", "sfexport", "examples", "benchmarks", "optimum"}
    assert not tracked & set(outputs)


def test_install_lines_name_extras_that_exist() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = [line for block in blocks("sh", README) for line in block.splitlines() if line.startswith("pip ")]
    assert lines
    for line in lines:
        for extra in re.findall(r"\.\[(.*?)\]", line):
            assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), line


def test_what_the_other_examples_need_are_examples() -> None:
    """The fixture has run them: they are not run again."""
    assert set(FIRST) <= {line for script in SHELL for line in script.splitlines()}


@pytest.mark.parametrize("script", [script for script in SHELL if not set(script.splitlines()) <= set(FIRST)])
def test_shell_examples(script: str, workplace: Path) -> None:
    if "sfexport parity" in script:
        pytest.importorskip("torch", reason="parity compares with PyTorch, which is not installed")
    run(script, workplace)


@pytest.mark.parametrize("script", PYTHON)
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
    session = next(b for b in blocks("text", DEMO) if b.startswith("sfexport demo"))
    excerpt = next(b for b in blocks("text", README) if b.startswith("Q: "))
    for line in [*session.splitlines(), *excerpt.splitlines()]:
        stable = re.split(r"\d\.\d|, 0\.|\(|A: ", line)[0].strip()
        assert stable in printed, line


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "index.md" or f"]({name}): " in index, name
