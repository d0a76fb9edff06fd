"""Build a serialised TensorRT engine from an ONNX graph, with profiles, timing cache and progress.

Uses the part of TensorRT's API that is the same from 10.3 to 11.4; what came later is asked for by name (hasattr).
Networks are strongly typed: precision is the graph's own.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from sfexport.artifacts.atomic import write_bytes
from sfexport.engines.profiles import Profile
from sfexport.engines.tensorrt.library import make_logger
from sfexport.errors import SfexportError
from sfexport.progress import OnProgress, OnStep, no_progress, no_step


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build.

    Attributes:
        optimization_level: 0 (fastest build) to 5 (fastest engine); None: TensorRT's default.
        timing_cache: file of timings of earlier builds, read and written; None: none.
        allocator: gives the builder memory of the GPU; None: TensorRT's own.
        configure: sets what this module does not know on the builder's configuration; None: nothing.
        tf32: let float32 products drop to TF32: right for the float32 islands of a 16-bit graph, wrong for a graph
            that was exported in float32 for its accuracy.
    """

    optimization_level: int | None = None
    timing_cache: Path | None = None
    tf32: bool = True
    allocator: Any = None
    configure: Callable[[Any], None] | None = None


def build_engine(
    trt: Any,
    graph: Path,
    weights_directory: Path,
    out: Path,
    profiles: Sequence[Profile],
    options: BuildOptions,
    on_progress: OnProgress = no_progress,
    on_step: OnStep = no_step,
) -> None:
    """Write the serialised engine of `graph`, whose external data lies in `weights_directory`, to `out`.

    Raises:
        SfexportError: TensorRT refuses the graph or finds no implementation; with its own words.
        KeyboardInterrupt: the build was interrupted.
    """
    logger = make_logger(trt, on_step)
    builder = trt.Builder(logger)
    if options.allocator is not None:
        builder.gpu_allocator = options.allocator
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    with _Weights(parser, graph, weights_directory) as weights:
        if not weights.parse():
            raise SfexportError(_parser_problem(parser, graph, logger))
        builder_config = builder.create_builder_config()
        _configure(trt, builder_config, options)
        for profile in profiles:
            builder_config.add_optimization_profile(_make_profile(builder, network, profile))
        monitor = _make_monitor(trt, on_progress)
        builder_config.progress_monitor = monitor
        serialized = builder.build_serialized_network(network, builder_config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if serialized is None:
        raise SfexportError(
            f"TensorRT cannot build the {graph.stem}: {_last(logger.errors)}",
            "If memory ran out, close other programs or build with fewer --frames.",
        )
    out.write_bytes(memoryview(serialized))
    _keep_timings(builder_config, options)


def _network_flags(trt: Any) -> int:
    names = trt.NetworkDefinitionCreationFlag
    flags = 1 << int(names.STRONGLY_TYPED)
    if hasattr(names, "PREFER_AOT_PYTHON_PLUGINS"):
        flags |= 1 << int(names.PREFER_AOT_PYTHON_PLUGINS)
    return flags


class _Weights:
    """Gives the parser a graph's weights: mapped where it takes pointers (10.13), else through links in one folder.

    The mapping must outlive the build.
    """

    def __init__(self, parser: Any, graph: Path, directory: Path) -> None:
        self._parser, self._graph, self._directory = parser, graph, directory
        self._maps: dict[str, mmap.mmap] = {}
        self._folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *error: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()
        # Closing a map that TensorRT still points into is refused; then it goes with the process.
        self._maps.clear()

    def parse(self) -> bool:
        if hasattr(self._parser, "load_model_proto"):
            return self._parse_mapped()
        return self._parse_linked()

    def _parse_mapped(self) -> bool:
        parser = self._parser
        model = onnx.load(self._graph, load_external_data=False)
        external = {t.name: t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        if not parser.load_model_proto(self._graph.read_bytes(), str(self._directory / self._graph.name)):
            return False
        for name, tensor in external.items():
            entries = {e.key: e.value for e in tensor.external_data}
            offset, length = int(entries.get("offset", 0)), int(entries["length"])
            if not parser.load_initializer(name, self._address(entries["location"]) + offset, length):
                return False
        return bool(parser.parse_model_proto())

    def _address(self, location: str) -> int:
        if location not in self._maps:
            with (self._directory / location).open("rb") as file:
                # Copy on write: ctypes takes addresses of writable memory only, and nothing is written.
                self._maps[location] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return _address_of(self._maps[location])

    def _parse_linked(self) -> bool:
        self._folder = TemporaryDirectory()
        folder = Path(self._folder.name)
        for file in self._directory.iterdir():
            if file.name != self._graph.name:
                (folder / file.name).symlink_to(file.resolve())
        return bool(self._parser.parse_from_file(str(shutil.copy(self._graph, folder))))


def _address_of(memory: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _parser_problem(parser: Any, graph: Path, logger: Any) -> str:
    """Return the parser's first error as one paragraph, with its node; without a node, also the log's reason."""
    if parser.num_errors == 0:
        return f"TensorRT cannot read {graph}: {_last(logger.errors)}"
    error = parser.get_error(0)
    problem, place, reason = error.desc(), "", ""
    if error.node() >= 0:
        place = f" at node {error.node_name() or f'number {error.node()}'} ({error.node_operator()})"
    else:
        reason = next((line for line in logger.errors if problem not in line), "")
    return " ".join(f"TensorRT cannot read {graph}{place}: {problem} {reason}".split())


def _last(errors: list[str]) -> str:
    return errors[-1] if errors else "it gives no reason"


def _configure(trt: Any, builder_config: Any, options: BuildOptions) -> None:
    if options.optimization_level is not None:
        builder_config.builder_optimization_level = options.optimization_level
    if not options.tf32:
        builder_config.clear_flag(trt.BuilderFlag.TF32)
    if options.configure is not None:
        options.configure(builder_config)
    builder_config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the engine keeps its nodes' names
    if options.timing_cache is not None:
        file = options.timing_cache
        cache = builder_config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
        builder_config.set_timing_cache(cache, False)


def _keep_timings(builder_config: Any, options: BuildOptions) -> None:
    file = options.timing_cache
    cache = builder_config.get_timing_cache() if file is not None else None
    if file is not None and cache is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, bytes(memoryview(cache.serialize())))


def _make_profile(builder: Any, network: Any, wanted: Profile) -> Any:
    """Make an optimisation profile. Raises SfexportError where the network's inputs are not those of the profile."""
    profile = builder.create_optimization_profile()
    found = {network.get_input(i).name for i in range(network.num_inputs)}
    for tensor in wanted.inputs():
        if tensor.name not in found:
            raise SfexportError(f"TensorRT's network has no input {tensor.name}.", "Export again.")
        profile.set_shape(tensor.name, tensor.min, tensor.opt, tensor.max)
    return profile


def _make_monitor(trt: Any, on_progress: OnProgress) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Hands progress on; Ctrl-C ends the build at the next step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._pass_on(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            self._pass_on(phase_name, self._steps.pop(phase_name, 0))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._pass_on(phase_name, step + 1)
            return not self.interrupted

        def _pass_on(self, phase: str, done: int) -> None:
            try:
                on_progress(phase, done, self._steps.get(phase, done))
            except KeyboardInterrupt:
                self.interrupted = True

    return Monitor()


def timing_cache_file(gpu: str, version: str) -> Path:
    """Return the file that timings are kept in: one per GPU model and TensorRT version."""
    name = "-".join(gpu.lower().split())
    return cache_directory() / f"timings-{name}-tensorrt-{version}.cache"


def cache_directory() -> Path:
    """Return the directory for what is only kept to save time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfexport"
