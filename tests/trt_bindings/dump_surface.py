"""Prints the public surface of the TensorRT that this Python imports, as JSON: names, kinds and signatures.

Runs inside an environment with the bindings. Standard library and `tensorrt` only.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import types
from typing import Any

from trt_bindings.signatures import from_docstring, shorten, split_signature

DUNDERS = ("__init__", "__bool__", "__len__", "__getitem__", "__setitem__", "__iter__", "__eq__", "__add__")
LEFTOVERS = ("common_enter", "common_exit")  # helpers that the module forgets to delete


def main() -> None:
    print(json.dumps(surface()))


def surface() -> dict[str, Any]:
    """Sections: version, enums, classes, functions, constants (aliases of enum members), plugin (its own module)."""
    trt = importlib.import_module("tensorrt")
    found: dict[str, Any] = {"version": trt.__version__, "enums": {}, "classes": {}, "functions": {}, "constants": {}}
    for name, value in _public(trt):
        _describe(found, name, value)
    found["plugin"] = _plugin_module()
    return found


def _public(owner: Any) -> list[tuple[str, Any]]:
    names = {name for name in vars(owner) if not name.startswith("_") or name in DUNDERS}
    return [(name, getattr(owner, name)) for name in sorted(names)]


def _describe(found: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, types.ModuleType) or name in LEFTOVERS:
        return
    if isinstance(value, type):
        if _is_enum(value):
            found["enums"][name] = {member: int(v) for member, v in value.__members__.items()}
        found["classes"][name] = _class(found, name, value)
    elif callable(value):
        found["functions"][name] = _signatures(value, name.rpartition(".")[2])
    elif _is_enum(type(value)):
        found["constants"][name] = str(value)


def _is_enum(cls: type) -> bool:
    return not issubclass(cls, enum.Enum) and isinstance(getattr(cls, "__members__", None), dict)


def _class(found: dict[str, Any], name: str, cls: type) -> dict[str, Any]:
    described: dict[str, Any] = {"bases": [b.__name__ for b in cls.__bases__ if "pybind11" not in b.__name__]}
    described["bases"] = [base for base in described["bases"] if base != "object"]
    members = getattr(cls, "__members__", {})
    for member, value in _public(cls):
        if member in members or (_is_enum(cls) and member in ("name", "value", *DUNDERS)):
            continue
        raw = inspect.getattr_static(cls, member)
        if isinstance(value, type):
            _describe(found, f"{name}.{member}", value)
        elif isinstance(raw, property):
            kind = "properties" if raw.fset else "readonly"
            described.setdefault(kind, {})[member] = _property_type(raw)
        elif _is_enum(type(value)):
            described.setdefault("constants", {})[member] = str(value)
        elif callable(value):
            if member == "__init__" and "pybind11" not in type(raw).__name__ and not _signatures(value, member):
                continue  # object's own: the class has no constructor
            described.setdefault("methods", {})[member] = _signatures(value, member)
    return {key: value for key, value in described.items() if value}


def _property_type(value: property) -> str:
    for accessor in (value.fget, value.fset):
        for signature in from_docstring(getattr(accessor, "__doc__", None), ""):
            if accessor is value.fget:
                return split_signature(signature)[1]
            return signature.rpartition(": ")[2].partition(")")[0]
    return ""


def _signatures(value: Any, name: str) -> list[str]:
    found = from_docstring(value.__doc__, name)
    if found or not inspect.isfunction(value):
        return found
    return [_plain_signature(value)]


def _plain_signature(value: Any) -> str:
    parts = [
        parameter.name + ("" if parameter.default is inspect.Parameter.empty else " = ...")
        for parameter in inspect.signature(value).parameters.values()
        if parameter.name not in ("self", "this")
    ]
    return shorten(f"({', '.join(parts)})")


def _plugin_module() -> dict[str, list[str]] | None:
    """Names of tensorrt.plugin with their signatures; None where this version has no such module."""
    try:
        module = importlib.import_module("tensorrt.plugin")
    except ImportError:
        return None
    described = {}
    for name in sorted(module.__all__):
        value = getattr(module, name)
        described[name] = [_plain_signature(value)] if inspect.isfunction(value) else []
        if inspect.isclass(value):
            described |= {f"{name}.{member}": [] for member in _members(value) if not member.startswith("_")}
    return described


def _members(cls: type) -> list[str]:
    """Attributes that a constructor sets count too, where it takes no arguments."""
    try:
        return sorted(dir(cls()))
    except TypeError:
        return sorted(dir(cls))


if __name__ == "__main__":
    main()
