"""Build TensorRT engine files from a bundle: check first, register the plugin or fall back, build one engine per graph.

TensorRT itself is driven in sfexport/engines/tensorrt/builder.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import onnx

from sfexport.artifacts.bundle import Bundle
from sfexport.dtypes import Precision
from sfexport.engines.memory import MemoryEstimate, estimate_memory, with_decoder_parts
from sfexport.engines.profiles import Limits, Profile, resolve_profiles
from sfexport.engines.tensorrt import cuda
from sfexport.engines.tensorrt.allocator import chunked_allocator
from sfexport.engines.tensorrt.builder import BuildOptions, build_engine, timing_cache_file
from sfexport.engines.tensorrt.graph_file import engine_graphs
from sfexport.engines.tensorrt.library import check_driver, library
from sfexport.engines.tensorrt.plugin import choose_plugin, register_plugins
from sfexport.engines.tensorrt.plugin_operations import KernelSource
from sfexport.engines.weight_check import check_weights
from sfexport.errors import InputError, MissingDependency, SfexportError
from sfexport.graphs.plugin_nodes import PluginSettings, count_cross_attention, with_plugin_nodes
from sfexport.kernels.compile import Kernel, compile_kernels
from sfexport.kernels.store import StoredKernels, save_kernels
from sfexport.machines.machine import Gpu, Machine, detect_machine
from sfexport.machines.targets import Target, kernel_ptx_isa, match_machine
from sfexport.printable import sizes_text
from sfexport.progress import OnProgress, OnStep
from sfexport.values import whole_number
from sfexport.versions import maps_weights


@dataclass(frozen=True)
class TensorRTOptions:
    """Options of `sfexport build --backend tensorrt`.

    Attributes:
        target: the machine to build for; None: this one, whatever it is.
        question_tokens, new_tokens, rows, frames: see Limits; frames None: the bundle's own.
        split_decoder: number of engines that the decoder is split into; None: the target's, which is 1 for most.
        kernels: directory of compiled kernels; None: compile them with Triton.
        optimization_level: TensorRT's, 0 to 5; None: its default.
    """

    target: Target | None = None
    frames: int | None = None
    question_tokens: int | None = None
    new_tokens: int | None = None
    rows: int | None = None
    split_decoder: int | None = None
    kernels: Path | None = None
    optimization_level: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers, whatever is built in the end. Raises InputError for one without meaning."""
        self._limits(1)
        if self.split_decoder is not None:
            whole_number(self.split_decoder, "--split-decoder")
        if self.optimization_level is not None:
            whole_number(self.optimization_level, "--optimization-level", minimum=0, maximum=5)

    def decoder_parts(self, bundle: Bundle, here: Target | None = None) -> int:
        """Return the number of engines that a bundle's decoder is split into.

        Args:
            here: this machine, where it is in the table: it decides where neither an option nor a target was given.
        """
        if self.split_decoder is not None:
            return self.split_decoder
        target = self.target or here
        return min(target.split_decoder, bundle.config.text.num_layers) if target else 1

    def limits(self, bundle: Bundle) -> Limits:
        return self._limits(bundle.frames)

    def _limits(self, frames: int) -> Limits:
        given = {"question_tokens": self.question_tokens, "new_tokens": self.new_tokens, "rows": self.rows}
        frames = frames if self.frames is None else self.frames
        return Limits(frames, **{k: v for k, v in given.items() if v is not None})

    def kernel_source(self) -> KernelSource:
        return compile_kernels if self.kernels is None else StoredKernels(self.kernels)


def build_tensorrt(
    bundle: Bundle,
    directory: Path,
    options: TensorRTOptions,
    on_step: OnStep,
    on_progress: OnProgress,
    force: bool,
) -> dict[str, Any]:
    """Write one .engine per graph into `directory`; returns what engine.json says of them.

    Raises:
        MissingDependency, SfexportError: TensorRT, driver, GPU or memory are not there; a graph does not build.
        InputError: the target is not this machine.
    """
    trt, machine, gpu = check_machine(options)
    limits = options.limits(bundle)
    profiles, parts = resolve_profiles(bundle, limits), options.decoder_parts(bundle, match_machine(machine))
    if not force:
        check_build_memory(bundle, profiles, parts, machine, gpu, trt.__version__)
    weights_read = check_weights(bundle, on_step)
    kind, kernels = _prepare_plugin(trt, bundle, gpu, options, on_step)
    timings = timing_cache_file(gpu.name, trt.__version__)
    tf32, allocator = bundle.precision != Precision.FP32, chunked_allocator(trt)
    build = BuildOptions(options.optimization_level, timing_cache=timings, tf32=tf32, allocator=allocator)
    for graph in engine_graphs(bundle, profiles, parts, on_step):
        on_step(f"building {graph.name} with TensorRT {trt.__version__} for {gpu.name}")
        source, file = directory / f"{graph.name}.onnx", directory / f"{graph.name}.engine"
        onnx.save(_with_plugin(bundle, graph.model, gpu) if kind else graph.model, source)
        build_engine(trt, source, bundle.weights_directory, file, graph.profiles, build, on_progress, on_step)
        source.unlink()
    if kind == "python":
        save_kernels(directory, kernels)
    here = match_machine(machine)
    return {
        "target": here.name if here else f"sm{gpu.sm}",
        "gpu": {"name": gpu.name, "sm": gpu.sm},
        "plugin": kind,
        "weights_read": weights_read,
        "limits": asdict(limits),
        "split_decoder": parts,
        "cuda": {"driver": machine.cuda.driver, "newest": machine.cuda.cuda},
    }


def check_machine(options: TensorRTOptions) -> tuple[Any, Machine, Gpu]:
    """Check all that can be refused before there is a bundle; return the tensorrt module, this machine and its GPU.

    Raises:
        MissingDependency, SfexportError: TensorRT, cuda-python, the driver or a GPU are not there.
        InputError: the target is not this machine, its GPU has no kernels, the directory of kernels holds none.
    """
    trt = library()
    check_driver()
    machine = detect_machine()
    gpu = _this_gpu(machine)
    _check_target(options.target, gpu)
    kernel_ptx_isa(gpu.sm)
    if options.kernels is not None:
        options.kernel_source()
    return trt, machine, gpu


def _this_gpu(machine: Machine) -> Gpu:
    if not machine.gpus:
        raise SfexportError("There is no NVIDIA GPU on this machine.", cuda.NO_DRIVER)
    return machine.gpus[0]


def _check_target(target: Target | None, gpu: Gpu) -> None:
    if target is not None and target.sm != gpu.sm:
        raise InputError(
            f"Engines for {target.name} (SM {target.sm / 10:.1f}) cannot be built on this machine's {gpu.name} "
            f"(SM {gpu.sm / 10:.1f}).",
            "Build on the target itself; sfexport build --check works on any machine.",
        )


def check_build_memory(
    bundle: Bundle, profiles: dict[str, list[Profile]], parts: int, machine: Machine, gpu: Gpu, tensorrt_version: str
) -> None:
    """Refuse a build that the estimate says will not fit, before time is lost.

    Args:
        parts: engines that the decoder is split into.

    Raises:
        SfexportError: naming both sizes.
    """
    mapped = maps_weights(tensorrt_version)
    estimate = with_decoder_parts(estimate_memory(bundle, profiles, mapped), parts, mapped)
    for what, needs, has in memory_needs(estimate, machine.jetson_model is not None, gpu.memory_gb, machine.memory_gb):
        if has is not None and needs > has:
            takes, there = sizes_text(1e9 * needs, 1e9 * has)
            raise SfexportError(
                f"{what} takes about {takes} (estimated) and there are {there}.",
                "Export with --precision fp16, use fewer --frames, or --force if you know better (swap, for instance).",
            )


def memory_needs(
    estimate: MemoryEstimate, shared: bool, device_gb: float | None, host_gb: float | None
) -> list[tuple[str, float, float | None]]:
    """List (what, needed, available) in 10^9 bytes. `shared`: CPU and GPU share one memory, of `host_gb`."""
    if shared:
        total = host_gb if host_gb is not None else device_gb
        return [("Building", estimate.build / 1e9, total), ("Answering", estimate.run / 1e9, total)]
    return [
        ("Building, on the GPU,", estimate.build_device / 1e9, device_gb),
        ("Building, on the host,", estimate.build_host / 1e9, host_gb),
        ("Answering, on the GPU,", estimate.run / 1e9, device_gb),
    ]


def _prepare_plugin(
    trt: Any, bundle: Bundle, gpu: Gpu, options: TensorRTOptions, on_step: OnStep
) -> tuple[str | None, tuple[Kernel, ...]]:
    """Register the plugins; return their kind and kernels, or None where the graph's own nodes are built instead.

    That is without Triton, and for a GPU or a head size that no kernel is made for.

    Raises:
        InputError: the directory of kernels that was named lacks them. SfexportError: a kernel does not compile.
    """
    if not bundle.config.slow_fast.hybrid_layers:
        return None, ()
    try:
        source = options.kernel_source()
        # Once now, so that a kernel that cannot be compiled is found before the build.
        kernels = source(bundle.precision, bundle.config.text.head_dim, gpu.sm, kernel_ptx_isa(gpu.sm))
        kind = choose_plugin(trt.__version__, package_version("numpy"))
        register_plugins(trt, kind, source)
    except (MissingDependency, InputError) as error:
        if isinstance(error, InputError) and options.kernels is not None:
            raise
        on_step(
            f"warning: building without the cross-attention plugin. {error} Answers are the same, but slower and with "
            f"more memory: plain nodes keep the scores of all positions and slow tokens. {error.hint}"
        )
        return None, ()
    return kind, kernels


def plugin_settings(bundle: Bundle, sm: int, multiprocessors: int) -> PluginSettings:
    return PluginSettings(sm, kernel_ptx_isa(sm), multiprocessors, bundle.config.text.head_dim)


def _with_plugin(bundle: Bundle, model: onnx.ModelProto, gpu: Gpu) -> onnx.ModelProto:
    """Return the graph with plugin nodes in the place of its cross-attention, if it has any."""
    if not count_cross_attention(model):
        return model
    return with_plugin_nodes(model, plugin_settings(bundle, gpu.sm, gpu.multiprocessors))
