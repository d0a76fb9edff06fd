"""Run one deserialised TensorRT engine: bind tensors, enqueue, replay as a CUDA graph what was run before."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sfexport.dtypes import from_tensorrt
from sfexport.engines.tensorrt.buffers import DeviceTensor
from sfexport.engines.tensorrt.cuda import Buffer, Graph, Stream
from sfexport.errors import BundleError, InputError, SfexportError
from sfexport.graphs import names

_LIMITS = {
    names.PIXELS: "--frames",
    names.SLOW_TOKENS: "--frames",
    names.EMBEDS: "--max-question-tokens",
    "prefix_key_values": "--frames",
    "past_key_values": "--max-new-tokens",
}


MakeContext = Callable[[Any, bool], Any]


def numpy_type(tensorrt_type: Any) -> np.dtype:
    """Return NumPy's type for a tensor's; bfloat16 is ml_dtypes'."""
    return from_tensorrt(tensorrt_type.name).numpy


@dataclass
class _State:
    """An execution context of one profile, and what it is bound to.

    Attributes:
        shapes: of the inputs.
        pointers: of all tensors.
        graph: replays the last run; None: there is none yet.
        captures: the stream's capture has not failed.
    """

    context: Any
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    pointers: dict[str, int] = field(default_factory=dict)
    graph: Graph | None = None
    captures: bool = True


class Engine:
    """Runs an engine, with one execution context per profile."""

    def __init__(
        self, trt: Any, runtime: Any, file: Path, logger: Any, make_context: MakeContext | None = None
    ) -> None:
        """Deserialise an engine file.

        Args:
            make_context: makes a context for an engine, whose shapes are few (True) or many; None: TensorRT's own way.

        Raises:
            BundleError: TensorRT does not take the file.
        """
        self._trt, self.name, self._make_context = trt, file.stem, make_context or self._plain_context
        with file.open("rb") as stream:
            # Mapped: the file is as large as the model, and TensorRT copies what it needs to the GPU.
            engine = runtime.deserialize_cuda_engine(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        if engine is None:
            reason = logger.errors[-1] if logger.errors else "it gives no reason"
            raise BundleError(f"TensorRT cannot load {file}: {reason}", "Build the engines again on this machine.")
        self.engine = engine
        self._states: dict[int, _State] = {}
        self._scratch: Buffer | None = None
        self.types: dict[str, np.dtype] = {}
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        # By input: the min and max shape of each profile.
        self._ranges: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            self.types[name] = numpy_type(engine.get_tensor_dtype(name))
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs).append(name)
            if is_input:
                shapes = [engine.get_tensor_profile_shape(name, p) for p in range(engine.num_optimization_profiles)]
                self._ranges[name] = [(tuple(smallest), tuple(largest)) for smallest, _, largest in shapes]

    @property
    def scratch_size(self) -> int:
        """Bytes of scratch memory that any profile takes."""
        return int(self.engine.device_memory_size_v2)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, -1 where it depends on an input's."""
        return tuple(self.engine.get_tensor_shape(name))

    def prepare(self, scratch: Buffer) -> None:
        """Take the scratch memory that the contexts of all engines share: nothing runs beside another."""
        self._scratch = scratch

    def max_shape(self, name: str, profile: int) -> tuple[int, ...]:
        """Return the largest shape of an input in a profile."""
        return self._ranges[name][profile][1]

    def max_shapes(self, name: str) -> list[tuple[int, ...]]:
        """Return the largest shape of an input in each profile; nothing for an output."""
        return [largest for _, largest in self._ranges.get(name, [])]

    def profile_for(self, name: str, shape: tuple[int, ...]) -> int:
        """Return the first profile that takes `shape` for an input; 0 where none does (running it says why)."""
        return next((i for i in range(len(self._ranges[name])) if self._takes(name, shape, i)), 0)

    def _takes(self, name: str, shape: tuple[int, ...], profile: int) -> bool:
        smallest, largest = self._ranges[name][profile]
        return len(shape) == len(largest) and all(a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True))

    def run(self, tensors: Mapping[str, DeviceTensor], stream: Stream, profile: int = 0, repeats: bool = False) -> None:
        """Enqueue the engine. Every input and output needs an entry; inputs' shapes are checked against the profile.

        Args:
            repeats: the same shapes and addresses are likely to come again: the second run of them is captured as a
                CUDA graph, and further ones replay it. Plain runs of the profile must not come between them.

        Raises:
            InputError: a shape the engine was not built for. SfexportError: TensorRT fails; with the tensor's name.
        """
        state = self._state(profile, stream, repeats)
        if self._bind(state, tensors, profile):
            state.graph = None
        elif repeats and state.graph is None and state.captures:
            self._capture(state, stream)
        if repeats and state.graph is not None:
            stream.launch(state.graph)
        elif not state.context.execute_async_v3(stream.handle):
            raise SfexportError(f"TensorRT failed in the {self.name}.")

    def _plain_context(self, engine: Any, fixed_shapes: bool) -> Any:
        return engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def _state(self, profile: int, stream: Stream, fixed_shapes: bool) -> _State:
        """Return the profile's context; made when it is first asked for."""
        if profile not in self._states:
            context = self._make_context(self.engine, fixed_shapes)
            if context is None or self._scratch is None:
                raise SfexportError(f"TensorRT cannot make a context for the {self.name}; memory may be full.")
            context.set_device_memory(self._scratch.pointer, self._scratch.size)
            if profile and not context.set_optimization_profile_async(profile, stream.handle):
                raise SfexportError(f"TensorRT cannot switch the {self.name} to profile {profile}.")
            self._states[profile] = _State(context)
        return self._states[profile]

    def _bind(self, state: _State, tensors: Mapping[str, DeviceTensor], profile: int) -> bool:
        """Set the shapes and addresses that differ from the last run's; return whether any does."""
        reshaped = [name for name in self.inputs if state.shapes.get(name) != tensors[name].shape]
        for name in reshaped:
            self._check_shape(name, tensors[name].shape, profile)
            if not state.context.set_input_shape(name, tensors[name].shape):
                raise SfexportError(f"TensorRT refuses shape {tensors[name].shape} for {name} of the {self.name}.")
            state.shapes[name] = tensors[name].shape
        if reshaped and (missing := state.context.infer_shapes()):
            raise SfexportError(f"TensorRT lacks {', '.join(missing)} to run the {self.name}.")
        both = (*self.inputs, *self.outputs)
        moved = [name for name in both if state.pointers.get(name) != tensors[name].pointer]
        for name in moved:
            if not state.context.set_tensor_address(name, tensors[name].pointer):
                raise SfexportError(f"TensorRT refuses the address of {name} of the {self.name}.")
            state.pointers[name] = tensors[name].pointer
        return bool(reshaped or moved)

    def _capture(self, state: _State, stream: Stream) -> None:
        """Capture a run as a graph; an engine that cannot be captured is run plainly from then on."""
        try:
            with stream.capture() as captured:
                enqueued = state.context.execute_async_v3(stream.handle)
            state.graph = captured.graph if enqueued else None
        except SfexportError:
            state.graph = None
        state.captures = state.graph is not None

    def _check_shape(self, name: str, shape: tuple[int, ...], profile: int) -> None:
        if self._takes(name, shape, profile):
            return
        smallest, largest = self._ranges[name][profile]
        option = next((o for prefix, o in _LIMITS.items() if name.startswith(prefix)), None)
        hint = f"Build the engines again with a larger {option}." if option else "Build the engines again."
        raise InputError(
            f"{name} of shape {list(shape)} does not fit the {self.name} engine, which takes {list(smallest)} to "
            f"{list(largest)}.",
            hint,
        )
