"""Stand-ins for what a build uses: logger, builder, network, profiles, timing cache. Read guard.py first.

`self._trt` is the Recorder, through which enumerations and other classes are reached. What a build refuses, it refuses
the way TensorRT does: a line to the logger and None.
"""

from __future__ import annotations

import json
from typing import Any

from .guard import Field

PLAN = b"recorder plan\n"
CACHE = b"recorder timing cache "
# Builder flags that a strongly typed network refuses.
PRECISIONS = ("FP16", "BF16", "INT8", "FP8", "INT4", "FP4", "OBEY_PRECISION_CONSTRAINTS")


class Logger:
    min_severity = Field()

    def _begin(self, min_severity: Any = None) -> None:
        self._fields["min_severity"] = min_severity or self._trt.ILogger.Severity.WARNING

    def log(self, severity: Any, msg: str) -> None:
        """Kept in Recorder.log by whoever writes; nothing is printed."""


class Dims:
    """A shape. Compares with tuples and lists, and with its own kind not at all: TypeError, as the real one."""

    def _begin(self, shape: Any = ()) -> None:
        self._sizes = [int(size) for size in shape]

    @property
    def MAX_DIMS(self) -> int:
        return 8

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: Any) -> Any:
        found = self._sizes[index]
        return tuple(found) if isinstance(index, slice) else found

    def __setitem__(self, index: Any, value: Any) -> None:
        self._sizes[index] = value

    def __eq__(self, other: Any) -> bool:
        return tuple(self._sizes) == tuple(other)

    def __repr__(self) -> str:
        return repr(tuple(self._sizes))

    __hash__ = None  # type: ignore[assignment]


class HostMemory:
    """Bytes that TensorRT owns: the buffer protocol and a size, nothing else."""

    @property
    def nbytes(self) -> int:
        return bytes.__len__(self)

    @property
    def dtype(self) -> Any:
        return self._trt.DataType.INT8

    def __len__(self) -> int:
        raise TypeError("object of type 'tensorrt.tensorrt.IHostMemory' has no len()")

    __iter__ = __getitem__ = __contains__ = __add__ = None  # what bytes could do and this cannot

    def __getattribute__(self, name: str) -> Any:
        if name in vars(bytes) and not name.startswith("_"):
            raise AttributeError(f"'tensorrt.tensorrt.IHostMemory' object has no attribute '{name}'")
        return object.__getattribute__(self, name)


class TensorStandIn:
    """A network's input or output: name, type and shape (-1 where dynamic), from the ONNX file."""

    name = Field()
    dtype = Field()
    shape = Field()
    location = Field()
    allowed_formats = Field(1)

    def _begin(self, name: str, dtype: Any, shape: list[int], dimension_names: list[str], is_input: bool) -> None:
        self._fields.update(name=name, dtype=dtype, shape=self._trt._make("Dims", shape))
        self._dimension_names, self._is_input = dimension_names, is_input

    @property
    def is_network_input(self) -> bool:
        return self._is_input

    @property
    def is_network_output(self) -> bool:
        return not self._is_input

    @property
    def is_execution_tensor(self) -> bool:
        return True

    @property
    def is_shape_tensor(self) -> bool:
        return False

    def get_dimension_name(self, index: int) -> str:
        return self._dimension_names[index]


class Network:
    """Filled by the parser."""

    name = Field("Unnamed Network 0")

    def _begin(self, flags: int = 0) -> None:
        self._flags = flags
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._model: Any = None  # onnx.ModelProto without its external weights
        self._source: str | None = None  # the .onnx file

    @property
    def flags(self) -> int:
        return self._flags

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags & 1 << int(flag))

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    @property
    def num_layers(self) -> int:
        return len(self._model.graph.node) if self._model else 0

    def get_input(self, index: int) -> Any:
        return self._inputs[index] if index < len(self._inputs) else None

    def get_output(self, index: int) -> Any:
        return self._outputs[index] if index < len(self._outputs) else None


class Profile:
    extra_memory_target = Field(1.0)

    def _begin(self) -> None:
        self._shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        shapes = [list(sizes) for sizes in (min, opt, max)]
        for which, shape in zip(("opt", "max"), shapes[1:], strict=True):
            if len(shape) != len(shapes[0]):
                raise RuntimeError(f"Shape provided for {which} is inconsistent with other shapes.")
        self._shapes[input] = shapes

    def get_shape(self, input: str) -> list[Any]:
        return [self._trt._make("Dims", shape) for shape in self._shapes.get(input, [])]

    def __bool__(self) -> bool:
        return not self._wrong()

    def _wrong(self) -> str:
        for name, (low, best, high) in self._shapes.items():
            if not all(0 <= a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
                return f"profile of {name}: min {low}, opt {best}, max {high} are not in order"
        return ""


class TimingCache:
    def _begin(self, content: dict[str, Any]) -> None:
        self._content = content

    def serialize(self) -> Any:
        header = CACHE + self._trt.__version__.encode() + b"\n"
        return self._trt._host_memory(header + json.dumps(self._content).encode())

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        self._content["layers"] = max(self._content["layers"], input_cache._content["layers"])
        return True

    def reset(self) -> bool:
        self._content["layers"] = 0
        return True


class Config:
    avg_timing_iterations = Field(1)
    builder_optimization_level = Field(3)
    max_aux_streams = Field(-1)
    max_num_tactics = Field(-1)
    plugins_to_serialize = Field(list)
    profiling_verbosity = Field()
    hardware_compatibility_level = Field()
    engine_capability = Field()
    progress_monitor = Field()
    tiling_optimization_level = Field()
    l2_limit_for_tiling = Field(-1)
    runtime_platform = Field()
    flags = Field(0)

    def _begin(self) -> None:
        trt = self._trt
        self._fields.update(
            flags=1 << int(trt.BuilderFlag.TF32),
            profiling_verbosity=trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
            hardware_compatibility_level=trt.HardwareCompatibilityLevel.NONE,
            engine_capability=trt.EngineCapability.STANDARD,
        )
        self._profiles: list[Any] = []
        self._pools: dict[Any, int] = {}
        self._cache: Any = None
        self._previews: set[Any] = set()

    def set_flag(self, flag: Any) -> None:
        self._fields["flags"] |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self._fields["flags"] &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self._fields["flags"] & 1 << int(flag))

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool] = pool_size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools.get(pool, self._trt.device_memory)

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        (self._previews.add if enable else self._previews.discard)(feature)

    def get_preview_feature(self, feature: Any) -> bool:
        return feature in self._previews

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        """None for bytes that are no cache; an empty one for no bytes."""
        data = bytes(serialized_timing_cache)
        header, _, content = data.partition(b"\n")
        if data and not header.startswith(CACHE):
            return None
        made = self._trt._make("ITimingCache", json.loads(content) if data else {"layers": 0})
        made._writer = header.removeprefix(CACHE).decode() if data else self._trt.__version__
        return made

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        """Refused when another version of TensorRT wrote it."""
        if cache._writer != self._trt.__version__:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache

    def add_optimization_profile(self, profile: Any) -> int:
        """-1 for a profile whose shapes are not in order."""
        if profile._wrong():
            self._trt._error(profile._wrong())
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)


class Builder:
    max_threads = Field(1)
    gpu_allocator = Field()

    def _begin(self, logger: Any) -> None:
        self._logger = self._trt._logger = logger

    @property
    def logger(self) -> Any:
        return self._logger

    def create_network(self, flags: int = 0) -> Any:
        """None for a flag that this version does not know."""
        known = sum(1 << int(flag) for flag in self._trt.NetworkDefinitionCreationFlag)
        if flags & ~known:
            self._trt._error(f"unknown network flags {flags & ~known}")
            return None
        return self._trt._make("INetworkDefinition", flags)

    def create_builder_config(self) -> Any:
        return self._trt._make("IBuilderConfig")

    def create_optimization_profile(self) -> Any:
        return self._trt._make("IOptimizationProfile")

    def get_plugin_registry(self) -> Any:
        return self._trt._registry

    def is_network_supported(self, network: Any, config: Any) -> bool:
        return not self._refusal(network, config)

    def build_serialized_network(self, network: Any, config: Any, kernel_text: Any = None) -> Any:
        refusal = self._trt.fail_build or self._refusal(network, config)
        if refusal:
            self._trt._error(refusal)
            return None
        if not self._report_progress(config.progress_monitor, max(network.num_layers, 1)):
            self._trt._error("build cancelled by the progress monitor")
            return None
        if config._cache is not None:
            config._cache._content["layers"] += network.num_layers
        return self._trt._host_memory(self._plan(network, config))

    def _plan(self, network: Any, config: Any) -> bytes:
        header = {
            "version": self._trt.__version__,
            "flags": [flag.name for flag in self._trt.BuilderFlag if config.get_flag(flag)],
            "profiles": [profile._shapes for profile in config._profiles],
            "source": network._source,
        }
        return PLAN + json.dumps(header).encode() + b"\n" + network._model.SerializeToString()

    def _report_progress(self, monitor: Any, layers: int) -> bool:
        """The phases of a real build, shortened; False when the monitor asks to stop."""
        if monitor is None:
            return True
        phases = (("Building engine from ONNX", None, 2), ("Tactic selection", "Building engine from ONNX", layers))
        going, opened = True, []
        for name, parent, steps in phases:
            monitor.phase_start(name, parent, steps)
            opened.append((name, steps))
        for name, steps in reversed(opened):
            going = going and all(monitor.step_complete(name, step) for step in range(steps))
            monitor.phase_finish(name)
        return going

    def _refusal(self, network: Any, config: Any) -> str:
        if network._model is None or not network.num_outputs:
            return "network must have at least one output"
        strong = network.get_flag(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        asked = [flag.name for flag in self._trt.BuilderFlag if flag.name in PRECISIONS and config.get_flag(flag)]
        if strong and asked:
            return f"precision flags {asked} are not allowed for a strongly typed network"
        dynamic = [t for t in network._inputs if -1 in tuple(t.shape)]
        if dynamic and not config._profiles:
            return "network has dynamic inputs, but no optimization profile has been defined"
        wrong = (_profile_refusal(p, t) for p in config._profiles for t in network._inputs)
        return next((text for text in wrong if text), "")


def _profile_refusal(profile: Any, tensor: Any) -> str:
    shape, wrong = tuple(tensor.shape), profile._wrong()
    if wrong:
        return wrong
    if tensor.name not in profile._shapes:
        return f"dynamic input {tensor.name} is missing dimensions in the profile" if -1 in shape else ""
    for given in profile._shapes[tensor.name]:
        if len(given) != len(shape):
            return f"input {tensor.name} has {len(shape)} dimensions, its profile {len(given)}"
        if any(size not in (-1, have) for size, have in zip(shape, given, strict=True)):
            return f"static dimension mismatch of input {tensor.name}: {shape} in the network, {given} in its profile"
    return ""
