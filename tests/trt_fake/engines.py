"""Stand-ins for what running an engine uses: runtime, engine, context. Read guard.py first.

An engine knows the ONNX graph it was built from, so that the shapes of its outputs follow from those of its inputs.
What it computes is the business of Recorder.execute, if a test gives one (execution.py has one for host memory).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .fakes import PLAN
from .guard import Field
from .parsing import TYPES

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Bound:
    """A tensor of one execution. `dtype` is the member's name of trt.DataType."""

    address: int
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Execution:
    """What execute_async_v3 was asked to do. `model` has no external weights; they lie beside `source`."""

    model: Any
    source: str | None
    inputs: dict[str, Bound]
    outputs: dict[str, Bound]
    stream: int


class Runtime:
    engine_host_code_allowed = Field(False)
    temporary_directory = Field("")
    max_threads = Field(1)
    DLA_core = Field(-1)
    error_recorder = Field()
    gpu_allocator = Field()

    def _begin(self, logger: Any) -> None:
        self._logger = self._trt._logger = logger

    @property
    def logger(self) -> Any:
        return self._logger

    def get_plugin_registry(self) -> Any:
        return self._trt._registry

    def deserialize_cuda_engine(self, *source: Any, **named: Any) -> Any:
        """None (and a line to the logger) for what is no plan, and for another version's."""
        data = bytes([*source, *named.values()][0])
        if not data.startswith(PLAN):
            self._trt._error("Serialization assertion magicTagRead == kMAGIC_TAG failed")
            return None
        header, _, model = data.removeprefix(PLAN).partition(b"\n")
        about = json.loads(header)
        if about["version"] != self._trt.__version__ and not self._may_differ(about):
            expected = f"expecting library version {self._trt.__version__} got {about['version']}"
            self._trt._error(f"The engine plan file is not compatible with this version of TensorRT, {expected}")
            return None
        return self._trt._make("ICudaEngine", about, model)

    def _may_differ(self, about: dict[str, Any]) -> bool:
        """A version compatible plan, for a newer runtime of the same major version that may run its host code."""
        theirs = tuple(int(part) for part in about["version"].split(".")[:2])
        ours = self._trt._numbers
        compatible = "VERSION_COMPATIBLE" in about["flags"] and self.engine_host_code_allowed
        return compatible and theirs[0] == ours[0] and theirs <= ours


class Engine:
    error_recorder = Field()
    weight_streaming_budget_v2 = Field(0)

    def _begin(self, about: dict[str, Any], model: bytes) -> None:
        import onnx

        self._about, self._bytes = about, model
        self._model = onnx.load_model_from_string(model)
        stored = {i.name for i in self._model.graph.initializer}
        self._inputs = {v.name: _described(v) for v in self._model.graph.input if v.name not in stored}
        self._outputs = {v.name: _described(v) for v in self._model.graph.output}

    @property
    def _tensors(self) -> dict[str, tuple[str, Shape]]:
        return self._inputs | self._outputs

    @property
    def name(self) -> str:
        return "Unnamed Network 0"

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_layers(self) -> int:
        return len(self._model.graph.node)

    @property
    def num_optimization_profiles(self) -> int:
        return max(len(self._about["profiles"]), 1)

    @property
    def refittable(self) -> bool:
        return "REFIT" in self._about["flags"]

    @property
    def device_memory_size(self) -> int:
        return self._trt.engine_memory

    @property
    def device_memory_size_v2(self) -> int:
        return self._trt.engine_memory

    @property
    def streamable_weights_size(self) -> int:
        return 0

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        return self._trt.engine_memory

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._trt.engine_memory

    def __getitem__(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._trt.TensorIOMode
        return modes.INPUT if name in self._inputs else modes.OUTPUT if name in self._outputs else modes.NONE

    def get_tensor_dtype(self, name: str) -> Any:
        """FLOAT for a tensor that there is not, as TensorRT answers."""
        return self._trt.DataType[self._tensors.get(name, ("FLOAT", ()))[0]]

    def get_tensor_shape(self, name: str) -> Any:
        return self._trt._make("Dims", self._tensors[name][1] if name in self._tensors else [])

    def get_tensor_location(self, name: str) -> Any:
        return self._trt.TensorLocation.DEVICE

    def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:
        return self._trt.TensorFormat.LINEAR

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        profiles = self._about["profiles"]
        given = profiles[profile_index].get(name) if profile_index < len(profiles) else None
        shape = list(self._tensors[name][1])
        return [self._trt._make("Dims", sizes) for sizes in given or [shape] * 3]

    def serialize(self) -> Any:
        return self._trt._host_memory(PLAN + json.dumps(self._about).encode() + b"\n" + self._bytes)

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> Any:
        return self._trt._make("IExecutionContext", self, strategy)

    def create_execution_context_without_device_memory(self) -> Any:
        return self._trt._make("IExecutionContext", self, self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)


def _described(value: Any) -> tuple[str, Shape]:
    import onnx

    tensor = value.type.tensor_type
    sizes = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    return TYPES[onnx.TensorProto.DataType.Name(tensor.elem_type)], sizes


class Context:
    name = Field("")
    profiler = Field()
    debug_sync = Field(False)
    enqueue_emits_profile = Field(True)
    nvtx_verbosity = Field()
    persistent_cache_limit = Field(0)
    device_memory = Field(0)
    error_recorder = Field()

    def _begin(self, engine: Any, strategy: Any) -> None:
        self._engine, self._strategy, self._profile = engine, strategy, 0
        self._addresses: dict[str, int] = {}
        self._forget_shapes()

    def _forget_shapes(self) -> None:
        self._shapes = {name: shape for name, (_, shape) in self._engine._inputs.items() if -1 not in shape}

    @property
    def engine(self) -> Any:
        return self._engine

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self._unspecified()

    def _unspecified(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Input shapes are to be set again afterwards."""
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            raise RuntimeError("Error in set optimization profile async.")
        self._profile = profile_index
        self._forget_shapes()
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        """False for an unknown input, another rank or size, and sizes outside the profile."""
        sizes = tuple(int(size) for size in shape)
        if name not in self._engine._inputs or not self._in_profile(name, sizes):
            self._trt._error(f"input shape {sizes} of {name} is not within profile {self._profile}")
            return False
        self._shapes[name] = sizes
        return True

    def _in_profile(self, name: str, sizes: Shape) -> bool:
        low, _, high = (tuple(dims) for dims in self._engine.get_tensor_profile_shape(name, self._profile))
        return len(sizes) == len(low) and all(a <= s <= b for a, s, b in zip(low, sizes, high, strict=True))

    def infer_shapes(self) -> list[str]:
        return self._unspecified()

    def get_tensor_shape(self, name: str) -> Any:
        """-1 where it depends on an input whose shape is not set."""
        known = self._shapes.get(name)
        if known is None and name in self._engine._outputs and not self._unspecified():
            known = self._output_shapes()[name]
        return self._trt._make("Dims", known or self._engine._tensors.get(name, ("", ()))[1])

    def _output_shapes(self) -> dict[str, Shape]:
        """By ONNX's shape inference; a dimension behind a plugin by its name, if an input has one of that name."""
        from onnx import ModelProto, shape_inference

        model = ModelProto()
        model.CopyFrom(self._engine._model)
        del model.graph.value_info[:]
        named: dict[str, int] = {}
        for value in model.graph.input:
            for dim, size in zip(value.type.tensor_type.shape.dim, self._shapes.get(value.name, ()), strict=False):
                named[dim.dim_param] = size
                dim.dim_value = size
        names = {v.name: [d.dim_param for d in v.type.tensor_type.shape.dim] for v in model.graph.output}
        for value in model.graph.output:
            for dim in value.type.tensor_type.shape.dim:
                if dim.HasField("dim_param"):
                    dim.ClearField("dim_param")
        inferred = shape_inference.infer_shapes(model, data_prop=True)
        found = {value.name: _described(value)[1] for value in inferred.graph.output}
        return {
            name: tuple(named.get(n, -1) if size == -1 else size for n, size in zip(names[name], shape, strict=True))
            for name, shape in found.items()
        }

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors:
            self._trt._error(f"there is no tensor {name}")
            return False
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        if size < self._engine.device_memory_size_v2:
            self._trt._error(f"{size} bytes of device memory are too few")
            return
        self._fields["device_memory"] = memory

    def update_device_memory_size_for_shapes(self) -> int:
        return self._trt.engine_memory

    def execute_async_v3(self, stream_handle: int) -> bool:
        """False (and a line to the logger) while a shape, an address or the context's memory is missing."""
        if missing := self._missing():
            self._trt._error(missing)
            return False
        if self._trt.execute is not None:
            engine, outputs = self._engine, self._output_shapes()
            inputs = {name: self._bound(name, self._shapes[name]) for name in engine._inputs}
            bound = {name: self._bound(name, outputs[name]) for name in engine._outputs}
            self._trt.execute(Execution(engine._model, engine._about["source"], inputs, bound, stream_handle))
        return True

    def _bound(self, name: str, shape: Shape) -> Bound:
        return Bound(self._addresses[name], shape, self._engine._tensors[name][0])

    def _missing(self) -> str:
        if names := self._unspecified():
            return f"input shapes are not set: {names}"
        if names := [name for name in self._engine._tensors if not self._addresses.get(name)]:
            return f"addresses are not set: {names}"
        managed = self._strategy == self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return "device memory is not set" if managed and not self.device_memory else ""
