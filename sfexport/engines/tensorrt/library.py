"""Find the tensorrt module, its version and its log. Every use of it starts with `library()`.

`trt.Runtime` without a driver returns a broken object that crashes when used, and `trt.Builder` raises a TypeError:
so `check_driver()` comes before either.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from sfexport.errors import MissingDependency, SfexportError
from sfexport.progress import OnStep
from sfexport.versions import OLDEST, OLDEST_JETPACK, is_older, version_text

INSTALL = (
    "on a Jetson with sudo apt install python3-libnvinfer python3-libnvinfer-dev, in a virtual environment made with "
    "--system-site-packages; elsewhere with pip install tensorrt. `sfexport doctor` shows what is missing"
)
# TensorRT's errors after which there is no engine; each ends in a message that names its cause.
_MOST_KEPT = 20


def library() -> Any:
    """Import the module, at least as new as versions.py asks for.

    Raises:
        MissingDependency: not installed, or its libraries do not load. SfexportError: too old.
    """
    try:
        import tensorrt
    except Exception as error:
        raise MissingDependency("tensorrt", "The tensorrt backend", INSTALL, failure=error) from None
    version = getattr(tensorrt, "__version__", None)
    if version is None:
        raise MissingDependency("tensorrt", "The tensorrt backend", INSTALL)
    if is_older(version, OLDEST["tensorrt"]):
        raise SfexportError(
            f"TensorRT {version} is too old: sfexport needs {version_text(OLDEST['tensorrt'])} or later.",
            f"On a Jetson update to JetPack {version_text(OLDEST_JETPACK)} or later.",
        )
    return tensorrt


def runtime_version() -> str:
    """Return the installed version, from the package's metadata where it has any (importing takes seconds)."""
    for name in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(library().__version__)


def check_driver() -> None:
    """Check the driver. Raises SfexportError where there is no driver or GPU, MissingDependency without cuda-python."""
    from sfexport.engines.tensorrt.cuda import initialise

    initialise()


def make_logger(trt: Any, on_step: OnStep) -> Any:
    """Make a logger that keeps errors (in `.errors`) and hands warnings to `on_step`; the rest is dropped."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors = [*self.errors, msg][-_MOST_KEPT:]
            elif severity == trt.ILogger.WARNING:
                on_step(f"TensorRT: {msg}")

    return Logger()
