"""Load TensorRT for RTX: its Python bindings, and the libraries in ONNX Runtime's package of it.

The libraries are loaded by their paths before the bindings are imported, which then find them by name: no environment
variable and no link is needed. There are no plugins: graphs are built from plain nodes.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
from functools import cache
from pathlib import Path
from typing import Any

from sfexport.errors import MissingDependency, SfexportError
from sfexport.versions import TENSORRT_RTX, version_numbers, version_text

RUNTIME = "tensorrt-rtx"
BINDINGS = "tensorrt-rtx-cu12-bindings"
LIBRARIES = "onnxruntime-ep-nv-tensorrt-rtx-cu12"
INSTALL = "pip install 'sfexport[rtx]' (x86-64 Linux only)"
_FILES = ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so")


@cache
def library() -> Any:
    """Import the bindings, of the one version that sfexport is tested with.

    Raises:
        MissingDependency: the packages are not installed, or do not load. SfexportError: another version.
    """
    version = runtime_version()
    if version_numbers(version) != TENSORRT_RTX:
        raise SfexportError(
            f"TensorRT for RTX {version} is installed; sfexport is made for {version_text(TENSORRT_RTX)}.",
            f"Install it: {INSTALL}",
        )
    try:
        for name in _FILES:
            # Not RTLD_GLOBAL: TensorRT's libraries have functions of the same names.
            ctypes.CDLL(str(_library_file(f"{name}.{version_text(TENSORRT_RTX[:3])}")))
        import tensorrt_rtx_bindings
    except Exception as error:
        raise MissingDependency(BINDINGS, f"The {RUNTIME} backend", INSTALL, failure=error) from None
    return tensorrt_rtx_bindings


def _library_file(name: str) -> Path:
    """Find a library by its name, which ends in its version. Raises FileNotFoundError."""
    distribution = importlib.metadata.distribution(LIBRARIES)
    for file in distribution.files or ():
        if file.name == name:
            return Path(str(distribution.locate_file(file)))
    raise FileNotFoundError(f"the package {LIBRARIES} {distribution.version} has no {name}")


def runtime_version() -> str:
    """Return the version of the installed bindings. Raises MissingDependency where they or the libraries are not."""
    for package in (LIBRARIES, BINDINGS):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            purpose = f"The {RUNTIME} backend"
            if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
                purpose += f" runs on x86-64 Linux alone; on this {platform.system()} {platform.machine()} it"
            raise MissingDependency(package, purpose, INSTALL) from None
    return version
