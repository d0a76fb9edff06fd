"""Bundle -> engine directory, and opening one. Knows the backends by name and imports each only when asked for."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

from sfexport.atomic import new_directory
from sfexport.engines.interface import Backend
from sfexport.errors import InputError, SfexportError
from sfexport.manifest import (
    BUNDLE_FILE,
    ENGINE_FILE,
    GRAPHS,
    Bundle,
    Engines,
    describe_files,
    file_sha256,
    place,
    write_manifest,
)

BACKENDS = ("onnxruntime", "torch")
Report = Callable[[str], None]


def choose_backend(name: str) -> str:
    """'auto' is ONNX Runtime: the TensorRT backend does not exist yet.

    Raises:
        InputError: an unknown name.
    """
    if name == "auto":
        return "onnxruntime"
    if name not in BACKENDS:
        raise InputError(f"Unknown backend {name!r}; choose one of auto, {', '.join(BACKENDS)}.")
    return name


def runtime_version(backend: str) -> str:
    """The installed version of a backend's library; MissingDependency where it is not installed."""
    if backend == "torch":
        from sfexport.engines import torch_backend

        return torch_backend.runtime_version()
    from sfexport.engines import onnxruntime_backend

    return onnxruntime_backend.runtime_version()


def engine_name(backend: str) -> str:
    """Directory name of an engine set: <target>-<runtime>-<version>."""
    return f"cpu-{backend}-{runtime_version(backend)}"


def build(
    bundle: Bundle, out: Path, backend: str = "auto", report: Report = lambda line: None, force: bool = False
) -> Engines:
    """Write an engine directory; it appears whole or not at all.

    For ONNX Runtime an engine is the graph itself: building loads each once, so that a graph or weights that
    this runtime refuses are found now.

    Args:
        force: build even if the memory estimate says that it will not fit.

    Raises:
        SfexportError: the runtime refuses a graph, or the weights do not fit into memory.
        InputError: the output cannot be written or holds something else.
    """
    backend = choose_backend(backend)
    version = runtime_version(backend)
    if not force:
        check_memory(bundle)
    with new_directory(out, ENGINE_FILE) as directory:
        names: list[str] = []
        if backend == "onnxruntime":
            names = _build_onnxruntime(bundle, directory, report)
        content = {
            "backend": backend,
            "target": "cpu",
            "machine": platform.machine(),
            "runtime": {"name": backend, "version": version},
            "bundle": {**place(bundle.path, out), "sha256": file_sha256(bundle.path / BUNDLE_FILE)},
            "files": describe_files(directory, names),
        }
        write_manifest(directory / ENGINE_FILE, content)
    return Engines.open(out)


def check_memory(bundle: Bundle) -> None:
    """Refuse what the machine's memory cannot hold, before a long load ends in a kill.

    Both backends compute in float32 and hold the weights so, whatever type they are stored in.

    Raises:
        SfexportError: naming both sizes.
    """
    needed, available = 4 * bundle.content["weights"]["parameters"], _physical_memory()
    if available is not None and needed > available:
        raise SfexportError(
            f"The weights take {needed / 1e9:.1f} GB in float32; this machine has {available / 1e9:.1f} GB of memory.",
            "Use a machine with more, or --force if you know better (swap, for instance).",
        )


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system says
        return None


def _build_onnxruntime(bundle: Bundle, directory: Path, report: Report) -> list[str]:
    from sfexport.engines.onnxruntime_backend import open_session

    for name in GRAPHS:
        report(f"loading {name} in ONNX Runtime")
        session = open_session(bundle.graph_file(name), bundle.weights_directory)
        _check_inputs(bundle, name, [i.name for i in session.get_inputs()])
        shutil.copyfile(bundle.graph_file(name), directory / f"{name}.onnx")
    return [f"{name}.onnx" for name in GRAPHS]


def _check_inputs(bundle: Bundle, graph: str, found: list[str]) -> None:
    promised = [i["name"] for i in bundle.content["graphs"][graph]["inputs"]]
    if found != promised:
        raise SfexportError(f"The runtime sees other inputs in the {graph} than the bundle promises: {found}.")


def check_runtime(engines: Engines) -> None:
    """Refuse engines for a backend, or a version of its runtime, that is not the one installed.

    Raises:
        BundleError, InputError: saying both versions and how to build again.
    """
    backend = engines.content.get("backend")
    if backend not in BACKENDS:
        raise InputError(f"The engines in {engines.path} are for the backend {backend!r}, which is unknown here.")
    engines.check_runtime(backend, runtime_version(backend))


def open_backend(engines: Engines) -> Backend:
    """Load the backend an engine directory was built for; checks the runtime first."""
    check_runtime(engines)
    if engines.content["backend"] == "torch":
        from sfexport.engines.torch_backend import TorchBackend

        return TorchBackend(engines.bundle.checkpoint_path)
    from sfexport.engines.onnxruntime_backend import OnnxRuntimeBackend

    bundle = engines.bundle
    return OnnxRuntimeBackend(engines.path, bundle.weights_directory, bundle.facts)
