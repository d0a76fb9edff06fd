"""Stand-ins for plugins: the registry, fields, interfaces to derive from, `tensorrt.plugin`. Read guard.py first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from .guard import Field, NotRecorded


class Open:
    """An interface that plugins and callbacks derive from: its properties are plain attributes."""

    _open = True


class Registry:
    """Plugins by name, version and namespace; there are no built-in ones."""

    parent_search_enabled = Field(True)

    def _begin(self) -> None:
        self._creators: dict[tuple[str, str, str], Any] = {}

    @property
    def all_creators(self) -> list[Any]:
        return list(self._creators.values())

    @property
    def all_creators_recursive(self) -> list[Any]:
        return self.all_creators

    def register_creator(self, creator: Any, plugin_namespace: str = "") -> bool:
        """False for a name that is taken."""
        key = (creator.name, creator.plugin_version, plugin_namespace)
        return self._creators.setdefault(key, creator) is creator

    def deregister_creator(self, creator: Any) -> bool:
        found = [key for key, value in self._creators.items() if value is creator]
        return bool([self._creators.pop(key) for key in found])

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:
        return self._creators.get((type, version, plugin_namespace))

    def load_library(self, plugin_path: str) -> Any:
        """A handle; None (and a line to the logger) where no file lies."""
        if not Path(plugin_path).is_file():
            self._trt._error(f"could not open library {plugin_path}")
            return None
        return object()


class PluginField:
    name = Field("")
    data = Field()
    type = Field()

    def _begin(self, name: str = "", data: Any = b"", type: Any = None) -> None:
        self._fields.update(name=name, data=data, type=type or self._trt.PluginFieldType.UNKNOWN)

    @property
    def size(self) -> int:
        return len(self._fields["data"])


class PluginFields:
    """trt.PluginFieldCollection."""

    def _begin(self, arg0: Any = ()) -> None:
        self._items = list(arg0)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __iter__(self) -> Any:
        return iter(self._items)

    def append(self, x: Any) -> None:
        self._items.append(x)


class QuickModule(ModuleType):
    """`tensorrt.plugin`: decorators register and are recorded; its classes serve as annotations only.

    What the decorated functions do is a matter for the real bindings (expressions.py: drive_quick).
    """

    def __init__(self, recorder: Any, offered: dict[str, list[str]]) -> None:
        super().__init__("tensorrt.plugin")
        self._recorder, self._offered = recorder, offered
        self._registered: set[str] = set()
        for name, signatures in offered.items():
            if not signatures and name[0].isupper() and "." not in name:
                setattr(self, name, type(name, (), {}))

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_offered", ()):
            raise NotRecorded(f"the recorder does not play tensorrt.plugin.{name}")
        raise AttributeError(f"module 'tensorrt.plugin' has no attribute '{name}'")

    def register(self, plugin_id: str, lazy_register: bool = False) -> Callable[[Any], Any]:
        namespace, name = plugin_id.split("::")

        def keep(function: Any) -> Any:
            self._recorder._record("plugin.register", {"plugin_id": plugin_id})
            self._registered.add(plugin_id)
            if not lazy_register:
                creator = SimpleNamespace(name=name, plugin_version="1", plugin_namespace=namespace)
                self._recorder._registry._creators[name, "1", namespace] = creator
            return function

        return keep

    def impl(self, plugin_id: str) -> Callable[[Any], Any]:
        return self._implement("impl", plugin_id)

    def aot_impl(self, plugin_id: str) -> Callable[[Any], Any]:
        return self._implement("aot_impl", plugin_id)

    def autotune(self, plugin_id: str) -> Callable[[Any], Any]:
        return self._implement("autotune", plugin_id)

    def _implement(self, kind: str, plugin_id: str) -> Callable[[Any], Any]:
        def keep(function: Any) -> Any:
            if plugin_id not in self._registered:
                raise ValueError(f"Plugin {plugin_id} is not registered.")
            self._recorder._record(f"plugin.{kind}", {"plugin_id": plugin_id})
            return function

        return keep
