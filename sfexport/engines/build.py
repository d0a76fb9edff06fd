"""Build an engine directory from a bundle, and open one. Backends are imported by name, when they are asked for."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfexport.artifacts.atomic import new_directory
from sfexport.artifacts.bundle import GRAPHS, Bundle
from sfexport.artifacts.engines import Engines
from sfexport.artifacts.identity import full_sha256
from sfexport.artifacts.manifest_fields import AGAIN
from sfexport.artifacts.manifest_files import BUNDLE_FILE, ENGINE_FILE, describe_files, place, write_manifest
from sfexport.engines.interface import Backend
from sfexport.errors import BundleError, InputError, SfexportError
from sfexport.progress import OnProgress, OnStep, no_progress, no_step
from sfexport.values import as_output, one_of

if TYPE_CHECKING:
    from sfexport.engines.tensorrt.build import TensorRTOptions

BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx", "torch")


def choose_backend(name: str) -> str:
    """Return a backend's name: for 'auto' TensorRT where it is installed beside an NVIDIA driver, else ONNX Runtime.

    Raises:
        InputError: an unknown name.
    """
    if name == "auto":
        return "tensorrt" if _has_tensorrt() else "onnxruntime"
    return one_of(name, "backend", BACKENDS)


def _has_tensorrt() -> bool:
    from sfexport.engines.tensorrt.library import check_driver, library

    try:
        library()
        check_driver()
    except SfexportError:
        return False
    return True


def check_backend(backend: str, precision: str = "auto", tensorrt: TensorRTOptions | None = None) -> None:
    """Refuse a build that cannot end well on this machine before a checkpoint is exported for it.

    Args:
        backend: name, as choose_backend returns it.
        precision: 'auto', or the precision that the export is asked for.

    Raises:
        MissingDependency, SfexportError: the backend's library, a driver or a GPU is not there.
        InputError: the backend cannot run that precision; the target is not this machine.
    """
    runtime_version(backend)
    if backend == "onnxruntime":
        from sfexport.engines.onnxruntime_backend import check_precision

        check_precision(precision)
    if backend == "tensorrt":
        from sfexport.engines.tensorrt.build import TensorRTOptions, check_machine

        check_machine(tensorrt or TensorRTOptions())
    if backend == "tensorrt-rtx":
        from sfexport.engines.tensorrt.build import TensorRTOptions
        from sfexport.engines.tensorrt.rtx_build import check_options
        from sfexport.engines.tensorrt.rtx_library import library

        check_options(library(), tensorrt or TensorRTOptions())


def runtime_version(backend: str) -> str:
    """Return the installed version of a backend's library; raises MissingDependency where it is not installed."""
    if backend == "torch":
        from sfexport.engines import torch_backend

        return torch_backend.runtime_version()
    if backend == "tensorrt":
        from sfexport.engines.tensorrt import library as tensorrt_library

        return tensorrt_library.runtime_version()
    if backend == "tensorrt-rtx":
        from sfexport.engines.tensorrt import rtx_library

        return rtx_library.runtime_version()
    from sfexport.engines import onnxruntime_backend

    return onnxruntime_backend.runtime_version()


def engine_name(backend: str, target: str | None = None) -> str:
    """Return an engine directory's name: <target>-<runtime>-<version>. TensorRT's default target is this machine."""
    if backend == "tensorrt" and target is None:
        from sfexport.machines.machine import detect_machine
        from sfexport.machines.targets import match_machine

        here = match_machine(detect_machine())
        target = here.name if here else "gpu"
    return f"{target or ('rtx' if backend == 'tensorrt-rtx' else 'cpu')}-{backend}-{runtime_version(backend)}"


def build(
    bundle: Bundle,
    out: Path,
    backend: str = "auto",
    on_step: OnStep = no_step,
    force: bool = False,
    tensorrt: TensorRTOptions | None = None,
    on_progress: OnProgress = no_progress,
) -> Engines:
    """Write an engine directory; it appears whole or not at all.

    For ONNX Runtime an engine is the graph itself: building loads each once, so that a graph or weights that
    this runtime refuses are found now.

    Args:
        force: build even if the memory estimate says that it will not fit.
        tensorrt: options of a TensorRT build; other backends ignore them.
        on_progress: called with TensorRT's phase, its steps done and its steps in all.

    Raises:
        SfexportError: the runtime refuses a graph, or the weights do not fit into memory.
        CheckpointError: a weight is not finite, or leaves float16's range in a float16 graph.
        InputError: the output cannot be written or holds something else.
    """
    backend, out = choose_backend(backend), as_output(out)
    version = runtime_version(backend)
    with new_directory(out, ENGINE_FILE) as directory:
        _check_graphs(bundle)
        if backend in ("tensorrt", "tensorrt-rtx"):
            about = _build_tensorrt(backend, bundle, directory, on_step, force, tensorrt, on_progress)
        else:
            about = _build_on_cpu(bundle, directory, backend, on_step, force)
        content = {
            "backend": backend,
            "machine": platform.machine(),
            "runtime": {"name": backend, "version": version},
            "bundle": {**place(bundle.path, out), "sha256": full_sha256(bundle.path / BUNDLE_FILE)},
            "files": describe_files(directory, sorted(file.name for file in directory.iterdir())),
        }
        write_manifest(directory / ENGINE_FILE, content | about)
        Engines.open(directory)  # as the next command will, while earlier engines still stand
    return Engines.open(out)


def _check_graphs(bundle: Bundle) -> None:
    """Refuse graphs that are not what the manifest says: its shapes decide what engines are built for.

    A file that is no graph at all is the runtime's to refuse.
    """
    from google.protobuf.message import DecodeError

    from sfexport.exporting.description import describe_graph

    for name in GRAPHS:
        try:
            found = describe_graph(bundle.graph_file(name))
        except DecodeError:
            continue
        except (KeyError, StopIteration, ValueError):
            found = None
        if found != bundle.content["graphs"][name]:
            raise BundleError(f"{bundle.graph_file(name)} is not the graph that the manifest describes.", AGAIN)


def _build_tensorrt(
    backend: str,
    bundle: Bundle,
    directory: Path,
    on_step: OnStep,
    force: bool,
    options: TensorRTOptions | None,
    on_progress: OnProgress,
) -> dict[str, Any]:
    from sfexport.engines.tensorrt.build import TensorRTOptions, build_tensorrt

    if backend == "tensorrt-rtx":
        from sfexport.engines.tensorrt.rtx_build import build_rtx

        return build_rtx(bundle, directory, options or TensorRTOptions(), on_step, on_progress, force)
    return build_tensorrt(bundle, directory, options or TensorRTOptions(), on_step, on_progress, force)


def _build_on_cpu(bundle: Bundle, directory: Path, backend: str, on_step: OnStep, force: bool) -> dict[str, Any]:
    from sfexport.engines.memory import check_weights_fit
    from sfexport.engines.weight_check import check_weights

    if backend == "onnxruntime":
        from sfexport.engines.onnxruntime_backend import check_precision

        check_precision(bundle.precision)
    if not force:
        check_weights_fit(bundle, backend)
    weights_read = check_weights(bundle, on_step)
    if backend == "onnxruntime":
        _build_onnxruntime(bundle, directory, on_step)
    return {"target": "cpu", "weights_read": weights_read}


def _build_onnxruntime(bundle: Bundle, directory: Path, on_step: OnStep) -> None:
    from sfexport.engines.onnxruntime_backend import open_session

    for name in GRAPHS:
        on_step(f"loading {name} in ONNX Runtime")
        session = open_session(bundle.graph_file(name), bundle.weights_directory)
        _check_inputs(bundle, name, [i.name for i in session.get_inputs()])
        shutil.copyfile(bundle.graph_file(name), directory / f"{name}.onnx")


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
    """Load the backend an engine directory was built for; checks the runtime first, then the weights.

    Raises:
        BundleError: another runtime or version; weights that have changed since the build.
    """
    check_runtime(engines)
    engines.check_weights()
    bundle = engines.bundle
    if engines.content["backend"] == "torch":
        from sfexport.engines.torch_backend import TorchBackend

        return TorchBackend(bundle.checkpoint_path)
    if engines.content["backend"] == "tensorrt":
        return _open_tensorrt(engines)
    if engines.content["backend"] == "tensorrt-rtx":
        return _open_rtx(engines)
    from sfexport.engines.external_data import stored_tensors
    from sfexport.engines.onnxruntime_backend import OnnxRuntimeBackend

    for name in GRAPHS:
        # ONNX Runtime opens whatever a graph names: nothing but the bundle's weights, then.
        stored_tensors(engines.path / f"{name}.onnx", bundle)
    return OnnxRuntimeBackend(engines.path, bundle.weights_directory, bundle.config)


def _open_tensorrt(engines: Engines) -> Backend:
    """Load TensorRT engines. Raises BundleError for those of another GPU, SfexportError where there is no driver."""
    from sfexport.engines.tensorrt.backend import TensorRTBackend
    from sfexport.engines.tensorrt.cuda import device_sm
    from sfexport.engines.tensorrt.library import check_driver, library
    from sfexport.engines.tensorrt.plugin import register_plugins
    from sfexport.kernels.store import StoredKernels

    trt = library()
    check_driver()
    gpu = engines.content["gpu"]
    if gpu["sm"] != device_sm():
        raise BundleError(
            f"The engines in {engines.path} were built on {gpu['name']} (SM {gpu['sm'] / 10:.1f}); this machine's GPU "
            f"is of SM {device_sm() / 10:.1f}.",
            f"Build again: sfexport build {engines.bundle.path} -o {engines.path}",
        )
    if engines.content["plugin"] == "python":
        # The class must be there before an engine that uses it is read; its PTX lies beside the engine.
        register_plugins(trt, "python", StoredKernels(engines.path))
    parts = engines.content.get("split_decoder", 1)
    return TensorRTBackend(trt, engines.path, engines.bundle.config, parts=parts)


def _open_rtx(engines: Engines) -> Backend:
    """Load engines of TensorRT for RTX. Raises BundleError for another GPU, SfexportError where there is no driver."""
    from sfexport.engines.tensorrt.backend import TensorRTBackend
    from sfexport.engines.tensorrt.cuda import device_sm
    from sfexport.engines.tensorrt.library import check_driver
    from sfexport.engines.tensorrt.rtx_build import default_capabilities
    from sfexport.engines.tensorrt.rtx_library import RUNTIME, library
    from sfexport.engines.tensorrt.rtx_runtime import RtxContexts, runtime_cache_file

    trt = library()
    check_driver()
    built = engines.content["compute_capabilities"] or default_capabilities(trt)
    if f"SM{device_sm()}" not in built:
        raise BundleError(
            f"The engines in {engines.path} were built for {', '.join(built)}; this machine's GPU is of "
            f"SM{device_sm()}.",
            f"Build again: sfexport build {engines.bundle.path} -o {engines.path} --backend tensorrt-rtx",
        )
    parts = engines.content.get("split_decoder", 1)
    contexts = RtxContexts(trt, runtime_cache_file(device_sm()))
    return TensorRTBackend(trt, engines.path, engines.bundle.config, RUNTIME, parts, contexts)
