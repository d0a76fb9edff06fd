"""What a version of TensorRT's Python module offers, from surface_<version>.json. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
VERSIONS = ("10.3", "10.16", "11.4")
ENUM_MEMBER = ("name", "value")


def file_of(version: str) -> Path:
    return FOLDER / f"surface_{version}.json"


def write(version: str, content: dict[str, Any]) -> Path:
    """One entry per line, sorted: a change of version shows as a small difference."""
    lines = []
    for section, entries in content.items():
        if isinstance(entries, dict):
            body = ",\n".join(f"{json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries))
            lines.append(f"{json.dumps(section)}: {{\n{body}\n}}")
        else:
            lines.append(f"{json.dumps(section)}: {json.dumps(entries)}")
    file_of(version).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return file_of(version)


class Surface:
    """Names are dotted, without the module: 'Builder.create_network', 'BuilderFlag.TF32', 'plugin.register'."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.version: str = content["version"]
        self.enums: dict[str, dict[str, int]] = content["enums"]
        self.classes: dict[str, dict[str, Any]] = content["classes"]
        self.functions: dict[str, list[str]] = content["functions"]
        self.constants: dict[str, str] = content["constants"]
        self.plugin: dict[str, list[str]] | None = content["plugin"]

    @classmethod
    @lru_cache
    def load(cls, version: str) -> Surface:
        return cls(json.loads(file_of(version).read_text(encoding="utf-8")))

    @cached_property
    def _names(self) -> set[str]:
        names = {"__version__", *self.classes, *self.functions, *self.constants}
        for enum, members in self.enums.items():
            names |= {f"{enum}.{member}" for member in members}
        for cls in self.classes:
            names |= {f"{cls}.{member}" for member in self.members(cls)}
        if self.plugin is not None:
            names |= {"plugin", *(f"plugin.{name}" for name in self.plugin)}
        return names

    def members(self, cls: str) -> dict[str, str]:
        """Name to kind ('methods', 'properties', 'readonly', 'constants'), inherited ones too."""
        described = self.classes[cls]
        found: dict[str, str] = {}
        for base in described.get("bases", ()):
            found |= self.members(base)
        for kind in ("methods", "properties", "readonly", "constants"):
            found |= dict.fromkeys(described.get(kind, ()), kind)
        return found

    def signatures(self, cls: str, method: str) -> list[str]:
        """Of a method, inherited or its own; [] where the bindings say nothing about arguments."""
        described = self.classes[cls]
        if method in described.get("methods", {}):
            return described["methods"][method]
        for base in described.get("bases", ()):
            if found := self.signatures(base, method):
                return found
        return []

    def has(self, name: str) -> bool:
        """Also through a property: 'IExecutionContext.engine.num_io_tensors'."""
        if name in self._names:
            return True
        owner, _, last = name.rpartition(".")
        held = self._held(owner) if owner else None
        return held is not None and (last in self.members(held) or (held in self.enums and last in ENUM_MEMBER))

    def missing(self, names: Iterable[str]) -> list[str]:
        return sorted({name for name in names if not self.has(name)})

    def class_of(self, annotation: str) -> str | None:
        """The class that a signature's type means, however the bindings spell it: 'CudaEngine' is ICudaEngine."""
        spelt = annotation.rstrip("_")
        return next((name for name in (spelt, f"I{spelt}", spelt[1:]) if name in self.classes), None)

    def property_type(self, cls: str, name: str) -> str:
        described = self.classes[cls]
        for kind in ("properties", "readonly"):
            if name in described.get(kind, {}):
                return described[kind][name]
        return next((found for base in described.get("bases", ()) if (found := self.property_type(base, name))), "")

    def _held(self, name: str) -> str | None:
        """Class of the object that a dotted name leads to, where it is an enum's member or a property."""
        owner, _, last = name.rpartition(".")
        if last in self.enums.get(owner, ()):
            return owner
        cls = owner if owner in self.classes else self._held(owner) if owner else None
        return None if cls is None else self.class_of(self.property_type(cls, last))
