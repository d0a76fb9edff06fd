"""Signatures as pybind11 writes them into docstrings: read, shortened and bound to arguments. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# One spelling for what pybind11 releases spell differently, so that versions can be compared.
SPELLINGS = (
    (r"tensorrt(_bindings)?\.tensorrt\.", ""),
    (r"\bnv(infer1|onnxparser)::(v_\d_\d::)?", ""),
    (r"\bcollections\.abc\.", ""),
    (r"\b(typing|typing_extensions|types)\.", ""),
    (r"\bbuffer\b", "Buffer"),
    (r"\bCapsuleType\b", "capsule"),
    (r"\bSupportsInt\b", "int"),
    (r"\bSupportsFloat\b", "float"),
    (r"\bSequence\[", "list["),
    (r"\bList\[", "list["),
    (r"\bTuple\[", "tuple["),
    (r"\bDict\[", "dict["),
)
POSITIONAL = re.compile(r"arg\d+")


@dataclass(frozen=True)
class Parameter:
    """`type` is the annotation's text ('' where there is none)."""

    name: str
    type: str
    optional: bool

    @property
    def positional_only(self) -> bool:
        return POSITIONAL.fullmatch(self.name) is not None


def shorten(text: str) -> str:
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return text


def from_docstring(docstring: str | None, name: str) -> list[str]:
    """'(flag: BuilderFlag) -> None' for every overload of a method or function; without `self`.

    Args:
        name: the function's, or '' for a property's getter or setter.
    """
    signatures = []
    for line in (docstring or "").splitlines():
        found = re.match(rf"(?:\d+\. )?{re.escape(name)}(\(.*)", line.strip())
        if found and not found[1].startswith("(*args, **kwargs)"):
            signatures.append(_without_self(shorten(found[1])))
    return signatures


def _without_self(text: str) -> str:
    return re.sub(r"^\(self(: [^,)]*)?(, )?", "(", text, count=1)


def split_signature(text: str) -> tuple[str, str]:
    """Parameters' text and result type of '(a: int, b: list[int] = None) -> bool'."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return text[1:i], text[i + 1 :].removeprefix(" -> ").strip()
    raise ValueError(f"not a signature: {text}")


def parameters(text: str) -> list[Parameter]:
    inside, _ = split_signature(text)
    return [_parameter(part) for part in _split(inside) if part]


def _parameter(text: str) -> Parameter:
    head, _, default = text.partition(" = ")
    name, _, annotation = head.partition(": ")
    return Parameter(name.strip(), annotation.strip(), bool(default))


def _split(text: str) -> list[str]:
    """At commas outside brackets; the '->' in a default or callable is no bracket."""
    parts, depth, current = [], 0, ""
    for character in text.replace("->", "→"):
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [part.strip().replace("→", "->") for part in [*parts, current]]


def bind(text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments by parameter name, or None where they do not fit this signature."""
    wanted = parameters(text)
    if len(args) > len(wanted):
        return None
    bound = {parameter.name: value for parameter, value in zip(wanted, args, strict=False)}
    by_name = {parameter.name: parameter for parameter in wanted}
    for name, value in kwargs.items():
        if name in bound or name not in by_name or by_name[name].positional_only:
            return None
        bound[name] = value
    return bound if all(p.optional or p.name in bound for p in wanted) else None
