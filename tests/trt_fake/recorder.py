"""A stand-in for the module `tensorrt` at one version: builds and runs nothing, records every call.

    recorder = Recorder("10.3")
    with recorder.installed():          # `import tensorrt` finds it
        build(...)
    assert recorder.arguments("IBuilderConfig.set_memory_pool_limit") == [...]

It offers what the real Python bindings of that version offer and nothing else (trt_bindings/surface_*.json, written
from the real bindings and compared with them in trt_bindings), checks arguments against their signatures,
and raises NotRecorded for what exists but is not played here. The parser reads real ONNX files; a build refuses what
TensorRT refuses (None, and a line to the logger).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

from trt_bindings.surface import Surface

from trt_fake import engines, fakes, parsing, plugins
from trt_fake.guard import NotRecorded, fits, make_enum, set_up, versioned

# The newest ONNX operator set that each version's parser takes.
OPSETS = {"10.3": 20, "10.16": 24, "11.4": 24}
PLAYED: dict[str, type] = {
    "ILogger": plugins.Open,
    "Logger": fakes.Logger,
    "Dims": fakes.Dims,
    "IHostMemory": fakes.HostMemory,
    "ITensor": fakes.TensorStandIn,
    "INetworkDefinition": fakes.Network,
    "IOptimizationProfile": fakes.Profile,
    "ITimingCache": fakes.TimingCache,
    "IBuilderConfig": fakes.Config,
    "Builder": fakes.Builder,
    "IPluginRegistry": plugins.Registry,
    "PluginField": plugins.PluginField,
    "PluginFieldCollection": plugins.PluginFields,
    "ParserError": parsing.ParserError,
    "OnnxParser": parsing.Parser,
    "Runtime": engines.Runtime,
    "ICudaEngine": engines.Engine,
    "IExecutionContext": engines.Context,
}
# Interfaces that Python classes derive from: nothing to play.
OPEN = (
    "IProgressMonitor",
    "IProfiler",
    "IErrorRecorder",
    "IGpuAllocator",
    "IVersionedInterface",
    "IPluginCapability",
    "IPluginV3",
    "IPluginV3OneCore",
    "IPluginV3OneBuild",
    "IPluginV3OneBuildV2",
    "IPluginV3OneRuntime",
    "IPluginCreatorInterface",
    "IPluginCreatorV3One",
    "IPluginCreatorV3Quick",
)


class Call(NamedTuple):
    """`name` is dotted ('IBuilderConfig.set_flag'; a constructor is its class, a setting its property).

    `arguments` by name: numbers, texts and lists of them as they are, a shape as a tuple, an enumeration's member as
    'BuilderFlag.TF32', bytes as '<12 bytes>', any other object as its class's name."""

    name: str
    arguments: dict[str, Any]


class Recorder(ModuleType):
    """Args:
    version: one of VERSIONS in trt_bindings/surface.py.
    operators: ONNX operators that the parser knows; by default all of the newest set that this version takes.
    execute: what execute_async_v3 does (trt_fake/engines.py: Execution); None: nothing.
    fail_build: a reason for which build_serialized_network fails.

    Attributes:
        calls: every call and setting, in order.
        log: lines given to the logger, as (severity, text).
        chosen: for an operator with a plugin or a function body, which of the two the parser took.
        device_memory, engine_memory: what the device has, and what an engine says it needs, in bytes.
    """

    def __init__(
        self,
        version: str,
        operators: Collection[str] | None = None,
        execute: Callable[[engines.Execution], None] | None = None,
        fail_build: str = "",
    ) -> None:
        super().__init__("tensorrt", self.__doc__)
        self.__spec__ = ModuleSpec("tensorrt", None)
        self._surface = Surface.load(version)
        self.__version__ = self._surface.version
        self._numbers = tuple(int(part) for part in self.__version__.split(".")[:2])
        self._operators, self._opset = operators, OPSETS[version]
        self.execute, self.fail_build = execute, fail_build
        self.calls: list[Call] = []
        self.log: list[tuple[str, str]] = []
        self.chosen: dict[str, str] = {}
        self.device_memory, self.engine_memory = 16 << 30, 1 << 20
        self._logger: Any = None
        self._playing = 0
        self._enums = {name: make_enum(name, members) for name, members in self._surface.enums.items()}
        self._classes: dict[str, type] = {}
        for name in self._surface.classes:
            self._define(name)
        self._registry = self._make("IPluginRegistry")
        offered = self._surface.plugin
        self._quick = None if offered is None else plugins.QuickModule(self, offered)

    # What a test asks.

    def names(self) -> list[str]:
        return [call.name for call in self.calls]

    def arguments(self, name: str) -> list[dict[str, Any]]:
        return [call.arguments for call in self.calls if call.name == name]

    @contextmanager
    def installed(self) -> Iterator[Recorder]:
        """`import tensorrt` gives this recorder meanwhile."""
        before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "tensorrt"}
        sys.modules["tensorrt"] = self
        if self._quick is not None:
            sys.modules["tensorrt.plugin"] = self._quick
        try:
            yield self
        finally:
            for name in ("tensorrt", "tensorrt.plugin"):
                sys.modules.pop(name, None)
            sys.modules.update(before)

    # What the module offers.

    def __getattr__(self, name: str) -> Any:
        """Only called for what is not an attribute of the recorder itself."""
        surface = self.__dict__.get("_surface")
        if surface is None or name.startswith("_") or not surface.has(name):
            raise AttributeError(f"module 'tensorrt' has no attribute '{name}'")
        if name in surface.constants:
            enum, _, member = surface.constants[name].rpartition(".")
            return self._class(enum)[member]  # type: ignore[index]
        found = self._enums.get(name) or self._classes.get(name)
        if found is not None:
            return found
        if name == "plugin":
            return self._quick
        if name in ("volume", "nptype", "get_plugin_registry", "init_libnvinfer_plugins"):
            return getattr(self, f"_{name}")
        raise NotRecorded(f"the recorder does not play tensorrt.{name}")

    def _volume(self, iterable: Any) -> int:
        result = 1
        for size in iterable:
            result *= size
        return result

    def _nptype(self, trt_type: Any) -> Any:
        import numpy as np

        names = {"FLOAT": "float32", "HALF": "float16", "BOOL": "bool"}
        if trt_type.name not in (*names, "INT8", "INT32", "INT64", "UINT8"):
            raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
        return np.dtype(names.get(trt_type.name, trt_type.name.lower())).type

    def _get_plugin_registry(self) -> Any:
        return self._registry

    def _init_libnvinfer_plugins(self, logger: Any, namespace: str) -> bool:
        self._record("init_libnvinfer_plugins", {"namespace": namespace})
        return True

    # What the stand-ins use.

    def _class(self, annotation: str) -> type | None:
        name = self._surface.class_of(annotation)
        if name is None:
            name = next((n for n in self._enums if n.endswith(f".{annotation}")), None)
        return None if name is None else self._enums.get(name) or self._classes.get(name)  # type: ignore[return-value]

    def _define(self, name: str) -> type | None:
        """The class of a name, after those it derives from; None for one that is not played."""
        played = PLAYED.get(name) or (plugins.Open if name in OPEN else None)
        if name in self._classes or name in self._enums or played is None:
            return self._classes.get(name)
        described = self._surface.classes[name]
        bases = tuple(base for b in described.get("bases", ()) if (base := self._define(b)) is not None)
        if name == "IHostMemory":
            bases = (bytes,)
        made = self._classes[name] = versioned(played, name, self._surface, self, bases)
        for constant, value in described.get("constants", {}).items():
            setattr(made, constant, self._class("Severity")[value.rpartition(".")[2]])  # type: ignore[index]
        if f"{name}.Severity" in self._enums:
            made.Severity = self._class("Severity")  # type: ignore[attr-defined]
        return made

    def _make(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """An object that only TensorRT can make."""
        cls = self._classes[name]
        made = cls.__new__(cls)
        set_up(made, cls, *args, **kwargs)
        return made

    def _host_memory(self, data: bytes) -> Any:
        return bytes.__new__(self._classes["IHostMemory"], data)  # type: ignore[type-var]

    def _check(self, name: str, signatures: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if fits(self, signatures, args, kwargs) is None:
            listed = "\n".join(f"    {i}. {text}" for i, text in enumerate(signatures, 1))
            given = ", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())])
            short = name.rpartition(".")[2]
            raise TypeError(
                f"{short}(): incompatible function arguments. Supported:\n{listed}\n\nInvoked with: {given}"
            )

    def _note(self, name: str, signatures: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._playing:
            return
        bound = fits(self, signatures, args, kwargs) or {}
        self._record(name, {key: self._short(value) for key, value in bound.items()})

    @contextmanager
    def _unnoted(self) -> Iterator[None]:
        """What stand-ins ask of one another is no call of the program's."""
        self._playing += 1
        try:
            yield
        finally:
            self._playing -= 1

    def _record(self, name: str, arguments: dict[str, Any]) -> None:
        self.calls.append(Call(name, arguments))

    def _short(self, value: Any) -> Any:
        if value is None or isinstance(value, int | float | str):
            return value
        if type(value) in self._enums.values():
            return f"{type(value).__name__}.{value.name}"
        if isinstance(value, bytes | bytearray | memoryview):
            return f"<{memoryview(value).nbytes} bytes>"
        if isinstance(value, tuple | list | self._classes["Dims"]):  # type: ignore[operator]
            return tuple(self._short(item) for item in value)
        return type(value).__name__

    def _error(self, text: str) -> None:
        self.log.append(("ERROR", text))
        if self._logger is not None:
            self._logger.log(self._class("Severity").ERROR, text)  # type: ignore[union-attr]

    def _knows_operator(self, op_type: str, domain: str) -> bool:
        if domain not in ("", "ai.onnx"):
            return False
        if self._operators is not None:
            return op_type in self._operators
        return _first_version(op_type) <= self._opset


@lru_cache
def _first_version(op_type: str) -> int:
    """The ONNX operator set that brought an operator; a large number for none."""
    import onnx

    schemas = onnx.defs.get_all_schemas_with_history()
    return min((s.since_version for s in schemas if s.name == op_type and not s.domain), default=1000)
