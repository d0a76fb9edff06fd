"""Find what texts cite that does not exist: repository paths, sections of pages, commands and their options."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from sfexport.cli import main

ROOT = Path(__file__).parent.parent
CODE = ("sfexport", "optimum", "tests", "benchmarks", "examples", "docs")
# Programs of other packages that pages and comments name.
FOREIGN_MODULES = ("pip", "venv", "pytest")
FOLDERS = "|".join([*CODE, "requirements", r"\.ci", r"\.github"])
PATH = re.compile(rf"(?<![\w./<>-])((?:{FOLDERS})/[\w./-]*[\w-]\.(?:py|md|toml|txt|json|svg|png|yml|npz))\b")
# Shorter ones, as they are cited inside the package: `engines/tensorrt/library.py`.
SHORT_PATH = re.compile(r"(?<![\w./<>-])([a-z]\w*(?:/\w+)*/\w+\.(?:py|toml))\b")
SECTION = re.compile(r"(docs/\w+\.md),? section (\d+)|reference section (\d+)", re.IGNORECASE)
COMMAND = re.compile(r"(?<![\w./-])sfexport ([a-z]+)\b(.*)")
MODULE = re.compile(r"\bpython3? -m ([\w.]+)([^`\n]*)")
SCRIPT = re.compile(r"\bpython3? ([\w./-]+\.py)([^`\n]*)")
MAKE = re.compile(r"^(?:\w+=\S+ )*make ([a-z][\w-]*)")
OPTION = re.compile(r"(?<![\w-])(--?[a-z][\w-]*)")


def problems(text: str, file: Path) -> list[str]:
    """Return a line for everything that a text cites and that does not exist; `file` is where the text stands."""
    return [*_paths(text, file), *_sections(text), *_commands(text), *_programs(text), *_targets(text)]


def texts(file: Path) -> str:
    """Return a page's text, or the docstrings and comments of a Python file."""
    content = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return content
    nodes = [n for n in ast.walk(ast.parse(content)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = [ast.get_docstring(node) or "" for node in nodes]
    tokens = tokenize.generate_tokens(io.StringIO(content).readline)
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join([*docstrings, *comments])


def cited_files() -> list[Path]:
    """Return every Python file and page of the repository."""
    code = [file for folder in CODE for file in (ROOT / folder).rglob("*.py")]
    return sorted([*code, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "sfexport").rglob("*.md")])


def _code_lines(text: str) -> list[str]:
    """Return the lines of fenced and indented blocks, and what stands between backticks, a line each."""
    fenced = "\n".join(re.findall(r"^```(?:sh|console)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = [line for line in rest.splitlines() if re.match(r" {4,}(sfexport|make) ", line)]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    return [line.strip() for line in [*fenced.splitlines(), *indented, *spans]]


def _paths(text: str, file: Path) -> Iterator[str]:
    for path in dict.fromkeys([*PATH.findall(text), *SHORT_PATH.findall(text)]):
        places = (ROOT, ROOT / "sfexport", ROOT / "tests", file.parent)
        if not any((place / path).exists() for place in places):
            yield f"{path} does not exist"


def _sections(text: str) -> Iterator[str]:
    for page, number, bare in SECTION.findall(text):
        target = ROOT / (page or "docs/reference.md")
        if bare and "REFERENCE" in text:
            yield "REFERENCE is not a file of this repository: cite docs/reference.md"
        elif target.exists() and not re.search(rf"^## {number or bare}\. ", target.read_text("utf-8"), re.MULTILINE):
            yield f"{target.name} has no section {number or bare}"


def _commands(text: str) -> Iterator[str]:
    for verb, arguments in [found for line in _code_lines(text) for found in COMMAND.findall(line)]:
        if verb not in main.commands:
            yield f"sfexport has no command {verb}"
            continue
        known = {option for parameter in main.commands[verb].params for option in parameter.opts} | {"--help", "-h"}
        # Another program may follow on the line, and a comment.
        own = re.split(r"\s#|&&|\||'\)|\)", re.sub(r"\"[^\"]*\"|'[^']*'", "TEXT", arguments))[0]
        yield from (f"sfexport {verb} has no option {option}" for option in OPTION.findall(own) if option not in known)


def _programs(text: str) -> Iterator[str]:
    for module, arguments in MODULE.findall(text):
        if module in FOREIGN_MODULES or module == "sfexport":
            continue
        source = _module_source(module)
        if source is None:
            yield f"there is no module {module} to run"
        else:
            yield from _options_missing(f"python -m {module}", source, arguments)
    for script, arguments in SCRIPT.findall(text):
        if not (ROOT / script).is_file():
            yield f"{script} does not exist"
        else:
            yield from _options_missing(script, (ROOT / script).read_text("utf-8"), arguments)


def _options_missing(program: str, source: str, arguments: str) -> Iterator[str]:
    for option in OPTION.findall(re.split(r"\s\s|\s#|\)", arguments)[0]):
        if f'"{option}"' not in source and option not in ("-h", "--help"):
            yield f"{program} has no option {option}"


@cache
def _module_source(module: str) -> str | None:
    path = Path(*module.split("."))
    for place in (ROOT, ROOT / "tests"):
        for file in (place / path / "__main__.py", (place / path).with_suffix(".py")):
            if file.is_file():
                return file.read_text("utf-8")
    return None if module.startswith(("sfexport", "tests")) or importlib.util.find_spec(module) is None else ""


def _targets(text: str) -> Iterator[str]:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in [found for line in _code_lines(text) for found in MAKE.findall(line)]:
        if not re.search(rf"^(?:[\w-]+ )*{target}(?: [\w-]+)*:", makefile, re.MULTILINE):
            yield f"the Makefile has no target {target}"
