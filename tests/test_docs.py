"""The pages under docs/ stay true: their commands parse, their links lead somewhere, their sizes are the model's."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from citations import cited_files, problems, texts
from helpers import sfexport

from sfexport.cli import main
from sfexport.demo.shipped import SHIPPED
from sfexport.doctor import checks
from sfexport.engines.memory import HOST_COPIES, PARSER_COPIES
from sfexport.kernels.launch_config import SMS
from sfexport.machines.targets import Target, load_targets
from sfexport.versions import OLDEST, has_aot_plugins, version_text

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("jetson.md", "datacenter.md")}
KEYS: dict[str, list[int]] = json.loads((ROOT / "tests/golden/upstream_7b_keys.json").read_text())


def commands() -> list[str]:
    """Every sfexport command in the pages' shell blocks."""
    blocks = [b for page in PAGES.values() for b in re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("sfexport ")]
    return list(dict.fromkeys(lines))


@pytest.mark.parametrize("line", commands())
def test_commands_have_only_verbs_and_options_that_exist(line: str) -> None:
    _, verb, *arguments = shlex.split(line, comments=True)
    command = main.commands[verb]
    command.make_context(verb, arguments, parent=click.Context(main, **main.context_settings))  # parses only


RUNNABLE = [line for line in commands() if re.match(r"sfexport (export|inspect checkpoint|plan|build .*--check)", line)]


def test_commands_that_need_no_board_work_and_write_what_the_pages_say(tmp_path: Path, monkeypatch) -> None:
    """With the demo's checkpoint in the place of the reader's."""
    pytest.importorskip("triton", reason="the plugin's kernel is written in Triton, which is not installed")
    shutil.copytree(SHIPPED, tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    assert len([line for line in RUNNABLE if "--check" in line]) == 2
    for line in RUNNABLE:
        result = sfexport(*shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, (line, result.output)
    for page in PAGES.values():
        (kit,) = set(re.findall(r"--check -o (\S+)", page))
        written = {file.name for file in (tmp_path / kit).iterdir()}
        assert {"build.sh", "README.md", "kernels.json"} <= written and not list((tmp_path / kit).glob("*.onnx"))
        assert f"`{kit}/build.sh checkpoint`" in page


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_versions_are_the_tables(name: str) -> None:
    if name == "jetson.md":
        systems = {t.jetpack: t for choices in load_targets().values() for t in choices if t.jetpack}
        heads = [cell.split()[-1] for cell in row(name, "| JetPack")[1:]]
        assert set(heads) == set(systems)
        assert row(name, "Python")[1:] == [systems[head].python for head in heads]
        assert row(name, "TensorRT, CUDA")[1:] == [f"{systems[h].tensorrt}, {systems[h].cuda}" for h in heads]
        kinds = ["in the engine" if has_aot_plugins(systems[h].tensorrt) else "Python plugin" for h in heads]
        assert row(name, "cross-attention kernel")[1:] == kinds
    else:
        known = re.search(r"kernel is made for ([\d., \nand]+);", PAGES[name])[1]
        assert [round(10 * float(sm)) for sm in re.findall(r"\d+\.\d", known)] == list(SMS)
    assert f"'triton>={version_text(OLDEST['triton'])}'" in PAGES["datacenter.md"]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGES[name]):
        assert (ROOT / "docs" / target).exists(), target


def numbers() -> dict[str, int]:
    """Parameters of the released model by graph."""

    def count(*parts: str) -> int:
        chosen = (key for key in KEYS if any(part in key for part in parts) and ".head." not in key)
        return sum(math.prod(KEYS[key]) for key in chosen)

    parts = {
        "vision encoder": count("vision_tower", "mm_projector"),
        "compressor": count("cross_attn_kv_proj"),
        "head": math.prod(KEYS["lm_head.weight"]),
    }
    everything = sum(math.prod(shape) for key, shape in KEYS.items() if ".head." not in key)
    embedding = math.prod(KEYS["model.embed_tokens.weight"])
    parts["decoder"] = everything - embedding - parts["vision encoder"] - parts["compressor"]
    parts["engines"] = parts["vision encoder"] + parts["compressor"] + parts["decoder"]
    parts["without the head"] = parts["decoder"] - parts["head"]
    return parts


def row(name: str, start: str) -> list[str]:
    line = next(line for line in PAGES[name].splitlines() if line.startswith(f"| {start}"))
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("name", "start", "part"),
    [
        ("jetson.md", "vision encoder", "vision encoder"),
        ("jetson.md", "compressor", "compressor"),
        ("jetson.md", "decoder, without the head", "without the head"),
        ("jetson.md", "decoder's head", "head"),
        ("jetson.md", "**engines**", "engines"),
        ("datacenter.md", "vision encoder", "vision encoder"),
        ("datacenter.md", "compressor", "compressor"),
        ("datacenter.md", "decoder", "decoder"),
        ("datacenter.md", "**engines**", "engines"),
    ],
)
def test_sizes_are_the_released_models(name: str, start: str, part: str) -> None:
    parameters = numbers()[part]
    cells = row(name, start)
    assert [float(cell) for cell in cells[1:3]] == [round(4 * parameters / 1e9, 2), round(2 * parameters / 1e9, 2)]


def test_the_doctor_uses_the_same_sizes() -> None:
    parts, total = numbers(), sum(math.prod(shape) for shape in KEYS.values())
    decoder = 2 * parts["decoder"] / 1e9
    copies = HOST_COPIES + PARSER_COPIES, HOST_COPIES
    assert tuple(round(number * decoder, 1) for number in copies) == checks.HOST_BUILD_GB
    assert round(2 * parts["engines"] / 1e9, 1) == checks.ENGINES_GB
    assert round(4 * total / 1e9, 1) == checks.FLOAT32_GB


@pytest.mark.parametrize("target", [t[0] for t in load_targets().values()], ids=lambda t: t.name)
def test_every_target_is_on_its_page(target: Target) -> None:
    page = PAGES["jetson.md" if target.jetpack else "datacenter.md"]
    line = next(line for line in page.splitlines() if line.startswith("|") and f"`{target.name}`" in line)
    if not target.jetpack:
        figures = (
            f"{target.sm / 10:.1f}",
            target.multiprocessors,
            f"{target.memory_gb} GB",
            f"{target.bandwidth_gbs:,}",
        )
        for figure in figures:
            assert f"| {figure} |" in line


@pytest.mark.parametrize("file", cited_files(), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_cited_paths_commands_and_options_exist(file: Path) -> None:
    assert problems(texts(file), file) == []


@pytest.mark.parametrize(
    ("planted", "problem"),
    [
        ("See sfexport/engines/no_such_file.py.", "sfexport/engines/no_such_file.py does not exist"),
        ("See `engines/no_such_file.py`.", "engines/no_such_file.py does not exist"),
        ("The figures are in docs/no_page.md.", "docs/no_page.md does not exist"),
        ("As in docs/reference.md, section 99.", "reference.md has no section 99"),
        ("Source: REFERENCE section 4.", "REFERENCE is not a file of this repository: cite docs/reference.md"),
        ("Run `sfexport encode clip.mp4`.", "sfexport has no command encode"),
        ("Run `sfexport build bundle --no-such-option 3`.", "sfexport build has no option --no-such-option"),
        ("    sfexport ask engines clip.mp4 --nope", "sfexport ask has no option --nope"),
        ("Run `python -m sfexport.no_module`.", "there is no module sfexport.no_module to run"),
        ("`python -m sfexport.kernels.check --nope`", "python -m sfexport.kernels.check has no option --nope"),
        ("`python benchmarks/frames.py --nope`", "benchmarks/frames.py has no option --nope"),
        ("`python benchmarks/nothing.py`", "benchmarks/nothing.py does not exist"),
        ("Run `make nonsense`.", "the Makefile has no target nonsense"),
    ],
)
def test_planted_citations_are_found(planted: str, problem: str) -> None:
    assert problem in problems(planted, ROOT / "sfexport" / "api.py")


def test_true_citations_are_not_problems() -> None:
    text = (
        "See sfexport/api.py, `engines/build.py`, docs/reference.md, section 4. Run `sfexport build b -o e`, "
        '`sfexport ask e v -q "a --b c"`, `python -m sfexport.kernels.check --seed 1` or `make test-oldest`.'
    )
    assert problems(text, ROOT / "README.md") == []


def test_the_api_page_is_what_the_docstrings_say() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs/generate_api.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
