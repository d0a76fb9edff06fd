"""Write docs/api.md from the docstrings of sfexport's public names: `python docs/generate_api.py`.

With --check nothing is written; exits with 1 if the page is stale.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
sys.path.insert(0, str(ROOT))  # this checkout's package, wherever the tool is run

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")
ITEM = re.compile(r"([*\w]+(?:, [*\w]+)*): (.*)")
HEAD = """# Python API

Generated from docstrings by `make docs`; do not edit. Importing `sfexport` is cheap: each name is loaded when
it is first used.
"""


def page() -> str:
    """Render every name of `sfexport.__all__`, then the public classes that they return."""
    import sfexport

    names = [name for name in sfexport.__all__ if not name.startswith("__")]
    public = {name: getattr(sfexport, name) for name in names}
    functions = {name: thing for name, thing in public.items() if not inspect.isclass(thing)}
    classes = {name: thing for name, thing in public.items() if inspect.isclass(thing)}
    parts = [HEAD, "## Functions\n"]
    parts += [_callable(f"sfexport.{name}", thing, "###") for name, thing in sorted(functions.items())]
    returned: dict[str, type] = {}
    for thing in functions.values():
        _collect(thing, returned)
    parts.append("## Classes that they return\n")
    parts += [_class(name, thing) for name, thing in sorted(returned.items()) if name not in classes]
    parts.append("## Exceptions\n")
    parts += [_class(name, thing) for name, thing in sorted(classes.items())]
    return "\n".join(parts)


def _collect(function: object, found: dict[str, type]) -> None:
    """Add to `found` the sfexport classes that a function returns, and those that their methods return."""
    for thing in _returned_classes(function):
        if found.setdefault(thing.__name__, thing) is not thing:
            raise SystemExit(f"Two public classes are called {thing.__name__}.")
        for name, method in _methods(thing):
            plain = inspect.isfunction(vars(thing)[name])  # what properties give is described where it is used
            if plain and any(other.__name__ not in found for other in _returned_classes(method)):
                _collect(method, found)


def _returned_classes(function: object) -> Iterator[type]:
    """Yield the sfexport classes named in a function's return annotation."""
    annotation = getattr(function, "__annotations__", {}).get("return", "")
    module = importlib.import_module(getattr(function, "__module__", "builtins"))
    for word in re.findall(r"[A-Z]\w*", annotation if isinstance(annotation, str) else annotation.__name__):
        thing = getattr(module, word, None)
        if thing is None and word in (places := _type_checking_imports(module.__name__)):
            thing = getattr(importlib.import_module(places[word]), word)
        if inspect.isclass(thing) and thing.__module__.startswith("sfexport."):
            yield thing


@cache
def _type_checking_imports(module: str) -> dict[str, str]:
    """Map the names that a module imports for annotations to the modules they come from."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.asname or alias.name: str(node.module) for node in imports for alias in node.names}


def _methods(thing: type) -> Iterator[tuple[str, object]]:
    """Yield a class's own public methods and properties, by name, in the order of the source."""
    for name, value in vars(thing).items():
        if name.startswith("_"):
            continue
        if isinstance(value, classmethod | staticmethod):
            yield name, value.__func__
        elif isinstance(value, property):
            yield name, value.fget
        elif inspect.isfunction(value):
            yield name, value
        elif hasattr(value, "func") and inspect.isfunction(value.func):  # functools.cached_property
            yield name, value.func


def _class(name: str, thing: type) -> str:
    parts = [f"### class {name}\n", f"`from {thing.__module__} import {thing.__name__}`\n", _docstring(thing)]
    # Enums and exceptions inherit what is documented elsewhere; a method without a docstring is not described.
    for method, function in _methods(thing):
        if inspect.getdoc(function):
            parts.append(_callable(f"{name}.{method}", function, "####", _is_property(thing, method)))
    return "\n".join(part for part in parts if part)


def _is_property(thing: type, name: str) -> bool:
    return not inspect.isfunction(vars(thing)[name]) and not isinstance(vars(thing)[name], classmethod | staticmethod)


def _callable(name: str, function: object, level: str, is_property: bool = False) -> str:
    if is_property:
        returns = getattr(function, "__annotations__", {}).get("return", "")
        return f"{level} {name}\n\n```text\n{name.split('.')[-1]}: {returns}\n```\n\n{_docstring(function)}"
    signature = inspect.signature(function)  # type: ignore[arg-type]
    return f"{level} {name}\n\n```text\n{_signature(name.split('.')[-1], signature)}\n```\n\n{_docstring(function)}"


def _signature(name: str, signature: inspect.Signature) -> str:
    """Return a signature with one parameter per line where it is long; annotations as they are written."""
    parts, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        parts.append(_parameter(parameter))
    returns = signature.return_annotation
    end = "" if returns is inspect.Signature.empty else f" -> {_annotation(returns)}"
    line = f"{name}({', '.join(parts)}){end}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){end}"])


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = stars + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        # The name of a function, as its repr holds an address.
        shown = getattr(parameter.default, "__name__", None) or repr(parameter.default)
        text += f" = {shown}" if ":" in text else f"={shown}"
    return text


def _annotation(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _docstring(thing: object) -> str:
    """Render a docstring as Markdown: sections become lists, the rest stays as it is."""
    lines = (inspect.getdoc(thing) or "").splitlines()
    out: list[str] = []
    inside = False
    for line in lines:
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            inside = True
            out.append(f"**{line.rstrip(':')}**\n")
        elif inside and line.startswith("    "):
            item = ITEM.fullmatch(line.strip()) if not line.startswith("     ") else None
            out.append(f"- `{item[1]}`: {item[2]}" if item else f"  {line.strip()}" if line[4] == " " else line.strip())
        else:
            inside = inside and not line
            out.append(line)
    return "\n".join(out) + "\n" if out else ""


def main() -> int:
    """Write the page, or with --check compare it. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
    text = page()
    if parser.parse_args().check:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            print("docs/api.md is stale: run make docs", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
