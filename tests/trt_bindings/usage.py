"""What source files use of TensorRT, read from their syntax trees. Standard library only.

Two conventions make it readable: the module is called `trt` (its plugin module `quick`), and a TensorRT object is
held in a variable or an attribute of the name that VARIABLES lists. So
`builder_config.set_flag(trt.BuilderFlag.TF32)` and `self._builder_config.set_flag(...)` use
'IBuilderConfig.set_flag', 'BuilderFlag' and 'BuilderFlag.TF32'. What a function assigns from them (`names =
trt.BuilderFlag`, `error = parser.get_error(0)`) is followed. A file with a class of its own of such a name (`class
Engine`) means that one where the attribute is the class's.

What not every version has is named by the caller: since={"IProgressMonitor": "10.0"} is used from that version on,
until={"BuilderFlag.FP16": "11.0"} only before. An entry covers what lies below it.
`getattr` with a default and `hasattr` ask first and need no entry.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .signatures import split_signature
from .surface import VERSIONS, Surface

MODULES = {"trt": "", "tensorrt": "", "quick": "plugin"}
VARIABLES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "builder_config": "IBuilderConfig",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "serialized": "IHostMemory",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "registry": "IPluginRegistry",
    "exprBuilder": "IExprBuilder",
}
Names = Mapping[str, str]


@dataclass
class Usage:
    """`where` maps a dotted name to the places that use it ('file.py:12'); the other two are collect's."""

    where: dict[str, list[str]] = field(default_factory=dict)
    since: dict[str, str] = field(default_factory=dict)
    until: dict[str, str] = field(default_factory=dict)

    def required(self, version: str) -> list[str]:
        """What a TensorRT of this version must have."""
        at = _numbers(version)
        return sorted(
            name
            for name in self.where
            if all(_numbers(v) <= at for v in _covering(self.since, name))
            and all(at < _numbers(v) for v in _covering(self.until, name))
        )

    def unused(self) -> list[str]:
        """Entries of `since` and `until` that cover nothing: left behind by a change, or misspelt."""
        entries = {*self.since, *self.until}
        return sorted(e for e in entries if not any(name == e or name.startswith(e + ".") for name in self.where))


def collect(
    paths: Iterable[Path],
    special: Mapping[str, Names] | None = None,
    since: Names | None = None,
    until: Names | None = None,
) -> Usage:
    """Read files.

    Args:
        special: by file name, variables that mean something else there ('' for: nothing of TensorRT's).
        since: the version from which on a name is used. until: the version that uses it no more.
    """
    usage = Usage(since=dict(since or {}), until=dict(until or {}))
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        variables = VARIABLES | MODULES | (special or {}).get(path.name, {})
        for name, line in _Reader(variables, _own_members(tree)).read(tree):
            usage.where.setdefault(name, []).append(f"{path.name}:{line}")
    return usage


class _Reader:
    """Walks one file, function by function. `own` has the members of the file's classes, by lower-case class name."""

    def __init__(self, variables: Names, own: Mapping[str, set[str]]) -> None:
        self._variables, self._own = variables, own

    def read(self, tree: ast.AST, aliases: Names | None = None) -> Iterable[tuple[str, int]]:
        known = dict(aliases or {})
        for node in _inside(tree):
            if isinstance(node, ast.Assign) and (meant := self._assigned(node.value, known)) is not None:
                known |= {target.id: meant for target in node.targets if isinstance(target, ast.Name)}
            name = self._name(node, known)
            if name and not name.rpartition(".")[2].startswith("__"):
                yield name, node.lineno  # type: ignore[attr-defined]
            if isinstance(node, ast.FunctionDef):
                yield from self.read(node, known)

    def _assigned(self, value: ast.expr, aliases: Names) -> str | None:
        """The class that an assigned name stands for, where it is TensorRT's."""
        meant = self._resolve(value, aliases)
        return meant if meant and class_named(meant) else None

    def _name(self, node: ast.AST, aliases: Names) -> str | None:
        """What one node uses: one name, without those that it is reached through (they are nodes of their own)."""
        if isinstance(node, ast.Attribute) and not self._is_held(node, aliases):
            return self._resolve(node, aliases)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            return self._constant_getattr(node, aliases)
        return None

    def _resolve(self, node: ast.expr, aliases: Names) -> str | None:
        """'' for the module itself, a dotted name for what belongs to it, None for anything else."""
        if isinstance(node, ast.Name):
            return self._meaning(node.id, aliases)
        if isinstance(node, ast.Call):
            return result_of(self._resolve(node.func, aliases) or "")
        if not isinstance(node, ast.Attribute):
            return None
        if self._is_held(node, aliases):
            return self._meaning(node.attr, {})
        owner = self._resolve(node.value, aliases)
        return None if owner is None else f"{owner}.{node.attr}".lstrip(".")

    def _is_held(self, node: ast.Attribute, aliases: Names) -> bool:
        """An attribute of an object that is not TensorRT's: `self.engine`, or the own class's `engine.context`."""
        plain = node.value.id.lower() if isinstance(node.value, ast.Name) else ""
        return node.attr in self._own.get(plain, ()) or self._resolve(node.value, aliases) is None

    def _meaning(self, name: str, aliases: Names) -> str | None:
        if name in aliases:
            return aliases[name]
        found = self._variables.get(name.lstrip("_"))
        return None if found == "" and name.lstrip("_") not in MODULES else found

    def _constant_getattr(self, node: ast.Call, aliases: Names) -> str | None:
        if len(node.args) != 2 or not isinstance(node.args[1], ast.Constant):
            return None
        owner = self._resolve(node.args[0], aliases)
        return None if owner is None else f"{owner}.{node.args[1].value}".lstrip(".")


def class_named(name: str) -> bool:
    """A class of the module, or of `tensorrt.plugin` ('plugin.KernelLaunchParams')."""
    surfaces = [Surface.load(version) for version in VERSIONS]
    if any(name in surface.classes for surface in surfaces):
        return True
    module, _, last = name.partition(".")
    return module == "plugin" and last[:1].isupper() and any(last in (surface.plugin or ()) for surface in surfaces)


def result_of(name: str) -> str | None:
    """Class of what a call of a class or method gives, in the newest version that says so; None where unknown."""
    if class_named(name):
        return name
    owner, _, method = name.rpartition(".")
    for surface in map(Surface.load, reversed(VERSIONS)):
        for signature in surface.signatures(owner, method) if owner in surface.classes else ():
            if found := surface.class_of(split_signature(signature)[1]):
                return found
    return None


def _inside(tree: ast.AST) -> Iterable[ast.AST]:
    """Nodes in reading order; a function is there, what is inside it is not."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, ast.FunctionDef):
            yield from _inside(node)


def _own_members(tree: ast.Module) -> dict[str, set[str]]:
    """Methods and attributes (`self.x = ...`) of every class, by its name in lower case."""
    found: dict[str, set[str]] = {}
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        members = {node.name for node in cls.body if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(cls):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                members.add(node.attr)
        found[cls.name.lower()] = members
    return found


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _covering(entries: Names, name: str) -> list[str]:
    return [version for entry, version in entries.items() if name == entry or name.startswith(entry + ".")]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
