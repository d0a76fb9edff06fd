"""Classes that offer exactly what one version of TensorRT offers, filled with stand-ins' behaviour.

A stand-in is an ordinary class with methods, properties and `Field`s. `versioned` makes of it the class of one version:
- a name that this version has and the stand-in has not raises NotRecorded (so that a dry run cannot go past it);
- a name that this version does not have is not there: AttributeError, as on a machine with that version;
- arguments must fit one of the signatures that the bindings state, values their types; calls and settings are recorded.
Stand-ins must not use `super()`: their functions are moved into another class.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from trt_bindings.signatures import bind, parameters
from trt_bindings.surface import Surface

INTERNAL = ("__module__", "__dict__", "__weakref__", "__doc__", "__qualname__")


class NotRecorded(NotImplementedError):
    """The real class has this; the recorder does not play it yet."""


class Field:
    """A plain attribute of a stand-in, with a default that is a value or makes one."""

    def __init__(self, default: Any = None) -> None:
        self.default = default


class Guard(type):
    """Like pybind11: a Python subclass must call the constructor of every TensorRT class it derives from."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        bindings = [c for c in cls.__mro__ if "_version" in vars(c)]
        leaves = [c for c in bindings if not any(d is not c and issubclass(d, c) for d in bindings)]
        for leaf in leaves:
            if leaf.__name__ not in made.__dict__.get("_constructed", ()):
                name = f"tensorrt.tensorrt.{leaf.__name__}"
                raise TypeError(f"{name}.__init__() must be called when overriding __init__")
        return made


class Root(metaclass=Guard):
    """What every versioned class shares: a namespace of its own, and no attributes beyond those it offers."""

    def __setattr__(self, name: str, value: Any) -> None:
        plain = "_version" in vars(type(self))
        if plain and not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"'tensorrt.tensorrt.{type(self).__name__}' object has no attribute '{name}'")
        object.__setattr__(self, name, value)


def make_enum(name: str, members: dict[str, int]) -> type[enum.Enum]:
    """A pybind11 enumeration: converts to an integer and is not equal to one."""
    return _Enumeration(name.rpartition(".")[2], members)  # type: ignore[return-value]


class _Enumeration(enum.Enum):
    def __int__(self) -> int:
        return self.value

    def __index__(self) -> int:
        return self.value


def versioned(stand_in: type, name: str, surface: Surface, recorder: Any, bases: tuple[type, ...]) -> type:
    """The class `name` of one version. `recorder` notes calls and knows classes by name (Recorder)."""
    offered = {k: v for k, v in vars(stand_in).items() if k not in INTERNAL}
    own = {kind: surface.classes[name].get(kind, {}) for kind in ("methods", "properties", "readonly")}
    namespace = {k: v for k, v in offered.items() if k.startswith("_")}
    namespace |= {"_version": surface.version, "_trt": recorder, "__doc__": stand_in.__doc__}
    for method, signatures in own["methods"].items():
        if method == "__init__":
            continue
        if method in offered:
            namespace[method] = _method(f"{name}.{method}", offered[method], signatures)
        elif not method.startswith("__"):
            namespace[method] = _unplayed(f"{name}.{method}")
    for kind in ("properties", "readonly"):
        for attribute, type_text in own[kind].items():
            played = offered.get(attribute, Field() if "_open" in offered else None)
            namespace[attribute] = _attribute(f"{name}.{attribute}", played, type_text, kind == "properties")
    namespace["__init__"] = _constructor(name, own["methods"].get("__init__"))
    return Guard(name, bases or (Root,), namespace)


def _constructor(name: str, signatures: list[str] | None) -> Callable[..., None]:
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        if signatures is None:
            raise TypeError(f"tensorrt.tensorrt.{name}: No constructor defined!")
        self._trt._check(f"{name}.__init__", signatures, args, kwargs)
        self._trt._note(name, signatures, args, kwargs)
        set_up(self, self._trt._classes[name], *args, **kwargs)

    return construct


def set_up(made: Any, cls: type, *args: Any, **kwargs: Any) -> None:
    """What the constructor of `cls` does, also for objects that only TensorRT makes."""
    made.__dict__.setdefault("_constructed", set()).add(cls.__name__)
    made.__dict__.setdefault("_fields", {})
    begin = vars(cls).get("_begin")
    if begin is not None:
        begin(made, *args, **kwargs)


def _method(name: str, play: Any, signatures: list[str]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._trt._check(name, signatures, args, kwargs)
        if not name.rpartition(".")[2].startswith("__"):
            self._trt._note(name, signatures, args, kwargs)
        with self._trt._unnoted():
            return play(self, *args, **kwargs)

    call.__name__, call.__doc__ = name.rpartition(".")[2], play.__doc__
    call.plays = play  # type: ignore[attr-defined]
    return call


def _unplayed(name: str) -> property:
    def refuse(self: Any, *value: Any) -> Any:
        raise NotRecorded(f"the recorder does not play {name}")

    return property(refuse, refuse)


def _attribute(name: str, played: Any, type_text: str, writable: bool) -> property:
    if played is None:
        return _unplayed(name)
    key = name.rpartition(".")[2]

    def get(self: Any) -> Any:
        if isinstance(played, property):
            return played.fget(self)  # type: ignore[misc]
        fields = self.__dict__.setdefault("_fields", {})
        if key not in fields:
            fields[key] = played.default() if callable(played.default) else played.default
        return fields[key]

    def put(self: Any, value: Any) -> None:
        signature = [f"(value: {type_text}) -> None"]
        self._trt._check(name, signature, (value,), {})
        self._trt._note(name, signature, (value,), {})
        if isinstance(played, property):
            played.fset(self, value)  # type: ignore[misc]
        else:
            self.__dict__.setdefault("_fields", {})[key] = value

    return property(get, put if writable else None)


def fits(recorder: Any, signatures: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments by name under the first signature that takes them; None where there is none."""
    for signature in signatures:
        bound = bind(signature, args, kwargs)
        types = {p.name: p.type for p in parameters(signature)}
        if bound is not None and all(accepts(recorder, types[name], value) for name, value in bound.items()):
            return bound
    return None


def accepts(recorder: Any, type_text: str, value: Any) -> bool:
    """Whether the bindings would convert a value to a parameter's type; True where that is not known here."""
    if type_text == "int":
        return hasattr(value, "__index__")
    if type_text == "float":
        return hasattr(value, "__index__") or hasattr(value, "__float__")
    if type_text in ("str", "FallbackString"):
        return isinstance(value, str | bytes) or value is None
    if type_text in ("tuple", "list"):
        return isinstance(value, tuple if type_text == "tuple" else list)
    if type_text == "Buffer":
        return _is_buffer(value)
    if type_text.startswith("list["):
        listed = not isinstance(value, str | bytes) and hasattr(value, "__iter__") and hasattr(value, "__len__")
        return listed and all(accepts(recorder, type_text[5:-1], item) for item in value)
    cls = recorder._class(type_text)
    if cls is None or value is None or isinstance(value, cls):
        return True
    return cls.__name__ == "Dims" and isinstance(value, tuple | list) and all(hasattr(v, "__index__") for v in value)


def _is_buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True
