"""Build engine files with TensorRT for RTX, on any x86-64 Linux machine: no GPU is needed.

The engines hold portable code; the GPU's own kernels are compiled on the GPU at first use. The driver of the build is
sfexport/engines/tensorrt/builder.py, as for TensorRT.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner

from sfexport.artifacts.bundle import Bundle
from sfexport.engines.memory import MEASURED_WITH, estimate_memory, physical_memory, with_decoder_parts
from sfexport.engines.profiles import Profile, resolve_profiles
from sfexport.engines.tensorrt.build import TensorRTOptions
from sfexport.engines.tensorrt.builder import BuildOptions, build_engine
from sfexport.engines.tensorrt.graph_file import engine_graphs
from sfexport.engines.tensorrt.rtx_library import library
from sfexport.engines.weight_check import check_weights
from sfexport.errors import InputError, SfexportError
from sfexport.machines.targets import Target
from sfexport.printable import sizes_text
from sfexport.progress import OnProgress, OnStep

# Peak resident memory of a build: per byte of the graph's weights, and beside them. Measured with TensorRT for RTX
# 1.7.1 on two and four decoder layers at the 7 B model's width and the whole tower (docs/benchmarks/full_width.md):
# 3.03 in the graph's own type, 3.68 with weights of another one, 3.77 in INT4; of these one is the mapped file.
HOST_COPIES, HOST_COPIES_CONVERTED, HOST_BASE = 3.1, 3.8, 400_000_000


def build_rtx(
    bundle: Bundle,
    directory: Path,
    options: TensorRTOptions,
    on_step: OnStep,
    on_progress: OnProgress,
    force: bool,
) -> dict[str, Any]:
    """Write one .engine per graph into `directory`; return what engine.json says of them.

    Raises:
        MissingDependency: TensorRT for RTX is not installed.
        SfexportError: a graph does not build, or this machine's memory is too small.
        InputError: an option that TensorRT for RTX has no use for.
    """
    trt = library()
    check_options(trt, options)
    limits = options.limits(bundle)
    profiles, parts = resolve_profiles(bundle, limits), options.decoder_parts(bundle)
    if not force:
        _check_memory(bundle, profiles, parts)
    weights_read = check_weights(bundle, on_step)
    capabilities = () if options.target is None else (_capability(options.target),)

    def configure(builder_config: Any) -> None:
        builder_config.num_compute_capabilities = len(capabilities)
        for i, name in enumerate(capabilities):
            builder_config.set_compute_capability(getattr(trt.ComputeCapability, name), i)

    tf32 = bundle.precision != "fp32"
    build = BuildOptions(options.optimization_level, tf32=tf32, configure=configure if capabilities else None)
    for graph in engine_graphs(bundle, profiles, parts, on_step):
        on_step(f"building {graph.name} with TensorRT for RTX {trt.__version__}")
        source, file = directory / f"{graph.name}.onnx", directory / f"{graph.name}.engine"
        # Nodes of a function's body would have the same names at every call.
        onnx.save(onnx.inliner.inline_local_functions(graph.model), source)
        build_engine(trt, source, bundle.weights_directory, file, graph.profiles, build, on_progress, on_step)
        source.unlink()
    return {
        "target": options.target.name if options.target else "rtx",
        "compute_capabilities": list(capabilities),
        "weights_read": weights_read,
        "limits": asdict(limits),
        "split_decoder": parts,
    }


def check_options(trt: Any, options: TensorRTOptions) -> None:
    """Refuse what TensorRT for RTX has no use for. Raises InputError."""
    if options.kernels is not None:
        raise InputError("TensorRT for RTX has no plugins, so --kernels has no use.", "Leave --kernels out.")
    if options.target is not None and not hasattr(trt.ComputeCapability, _capability(options.target)):
        known = ", ".join(sorted(name for name in dir(trt.ComputeCapability) if name.startswith("SM")))
        raise InputError(
            f"TensorRT for RTX {trt.__version__} builds nothing for {options.target.name} "
            f"({_capability(options.target)}).",
            f"It builds for {known}; without --target for all of them.",
        )


def default_capabilities(trt: Any) -> list[str]:
    """List the compute capabilities of an engine without a target: all but Turing's, which has to be asked for."""
    return [name for name in trt.ComputeCapability.__members__ if name.startswith("SM") and name != "SM75"]


def _capability(target: Target) -> str:
    return f"SM{target.sm}"


def build_memory(bundle: Bundle, profiles: dict[str, list[Profile]], parts: int = 1) -> int:
    """Estimate the peak resident memory of building the bundle's largest graph.

    Args:
        parts: engines that the decoder is split into.
    """
    estimate = estimate_memory(bundle, profiles, mapped_weights=True, plugin=False)
    graphs = with_decoder_parts(estimate, parts, mapped_weights=True).graphs
    copies = (g.weights / g.parts * (HOST_COPIES_CONVERTED if g.converted else HOST_COPIES) for g in graphs)
    return round(max(copies)) + HOST_BASE


def _check_memory(bundle: Bundle, profiles: dict[str, list[Profile]], parts: int) -> None:
    needed, available = build_memory(bundle, profiles, parts), physical_memory()
    if available is not None and needed > available:
        needs, has = sizes_text(needed, available)
        raise SfexportError(
            f"Building takes about {needs} (estimated from builds with {MEASURED_WITH}); this machine has {has} of "
            "memory.",
            "Export with --quantize int4, use a machine with more, or --force (with swap, for instance).",
        )
