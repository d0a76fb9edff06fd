"""`python -m trt_bindings.probe NAME...` prints, as JSON, the dotted names that the real bindings do not have.

Runs inside an environment (venvs.py). A name like 'plugin.register' belongs to tensorrt.plugin.
"""

from __future__ import annotations

import importlib
import json
import sys


def missing(names: list[str]) -> list[str]:
    return [name for name in names if not _has(name)]


def _has(name: str) -> bool:
    owner = importlib.import_module("tensorrt")
    for part in name.split("."):
        if name.startswith("plugin.") and part == "plugin" and not hasattr(owner, "plugin"):
            try:
                importlib.import_module("tensorrt.plugin")
            except ImportError:
                return False
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


if __name__ == "__main__":
    print(json.dumps(missing(sys.argv[1:])))
