"""Run engines with TensorRT: three engines, one scratch buffer, K/V that stay on the GPU. No torch.

A session's prefix is read by every step and never copied. A step's new K/V are copied behind each row's own ones, on
the GPU. Buffers come from pools of a few sizes and return there when nothing refers to them any more, so that memory
does not grow with questions.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sfexport.artifacts.bundle import GRAPHS
from sfexport.checkpoint.config import ModelConfig
from sfexport.dtypes import from_tensorrt
from sfexport.engines.interface import Backend, Cache, DecoderStep, KeyValues, compressor_feeds, decoder_feeds
from sfexport.engines.profiles import DECODE, PREFILL
from sfexport.engines.tensorrt.buffers import DeviceTensor, OwnedBuffer, Pool
from sfexport.engines.tensorrt.cuda import Buffer, Rows, Stream
from sfexport.engines.tensorrt.library import make_logger
from sfexport.errors import BundleError, InputError, SfexportError
from sfexport.graphs import names

RUNTIME = "tensorrt"
_PROFILES = (PREFILL, DECODE)  # of the decoder, in resolve_profiles' order
_LIMITS = {
    names.PIXELS: "--frames",
    names.SLOW_TOKENS: "--frames",
    names.EMBEDS: "--max-question-tokens",
    "prefix_key_values": "--frames",
    "past_key_values": "--max-new-tokens",
}


def numpy_type(tensorrt_type: Any) -> np.dtype:
    """Return NumPy's type for a tensor's; bfloat16 is ml_dtypes'."""
    return from_tensorrt(tensorrt_type.name).numpy


class Engine:
    """Run one deserialised engine with one execution context."""

    def __init__(self, trt: Any, runtime: Any, file: Path, logger: Any) -> None:
        """Deserialise an engine file. Raises BundleError where TensorRT does not take it."""
        self._trt, self.name = trt, file.stem
        with file.open("rb") as stream:
            # Mapped: the file is as large as the model, and TensorRT copies what it needs to the GPU.
            engine = runtime.deserialize_cuda_engine(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        if engine is None:
            reason = logger.errors[-1] if logger.errors else "it gives no reason"
            raise BundleError(f"TensorRT cannot load {file}: {reason}", "Build the engines again on this machine.")
        self.engine = engine
        self.context: Any = None
        self._profile = 0
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

    def prepare(self, scratch: Buffer) -> None:
        """Make the execution context, with scratch memory that all engines share."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.context = self.engine.create_execution_context(strategy)
        if self.context is None:
            raise SfexportError(f"TensorRT cannot make a context for the {self.name}; memory may be full.")
        self.context.set_device_memory(scratch.pointer, scratch.size)

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

    def run(self, tensors: Mapping[str, DeviceTensor], stream: Stream, profile: int = 0) -> None:
        """Enqueue the engine. Every input and output needs an entry; inputs' shapes are checked against the profile.

        Raises:
            InputError: a shape the engine was not built for. SfexportError: TensorRT fails; with the tensor's name.
        """
        if profile != self._profile:
            if not self.context.set_optimization_profile_async(profile, stream.handle):
                raise SfexportError(f"TensorRT cannot switch the {self.name} to profile {profile}.")
            self._profile = profile
        for name in self.inputs:
            self._check_shape(name, tensors[name].shape, profile)
            if not self.context.set_input_shape(name, tensors[name].shape):
                raise SfexportError(f"TensorRT refuses shape {tensors[name].shape} for {name} of the {self.name}.")
        missing = self.context.infer_shapes()
        if missing:
            raise SfexportError(f"TensorRT lacks {', '.join(missing)} to run the {self.name}.")
        for name in (*self.inputs, *self.outputs):
            if not self.context.set_tensor_address(name, tensors[name].pointer):
                raise SfexportError(f"TensorRT refuses the address of {name} of the {self.name}.")
        if not self.context.execute_async_v3(stream.handle):
            raise SfexportError(f"TensorRT failed in the {self.name}.")

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


class _Cache(Cache):
    """A cache in the GPU's memory."""

    def __init__(self, backend: TensorRTBackend, tensors: tuple[DeviceTensor, ...], lengths: np.ndarray) -> None:
        self._backend, self.tensors, self.lengths = backend, tensors, lengths
        self.capacity = tensors[0].shape[2]

    def append(self, new: KeyValues, row: int | None = None) -> None:
        rows = range(len(self.lengths)) if row is None else [row]
        for tensor, added in zip(self.tensors, new.tensors, strict=True):
            for i, at in enumerate(rows):
                self._backend.copy_positions(tensor, at, int(self.lengths[at]), added, i, new.length)
        self.lengths[list(rows)] += new.length

    def resize(self, rows: Sequence[int], capacity: int) -> Cache:
        tensors = self._backend.key_values(len(rows), capacity)
        for to, source in zip(tensors, self.tensors, strict=True):
            for i, row in enumerate(rows):
                self._backend.copy_positions(to, i, 0, source, row, int(self.lengths[row]))
        return _Cache(self._backend, tensors, self.lengths[list(rows)])


class TensorRTBackend(Backend):
    """Run the three graphs with TensorRT.

    Args:
        trt: the tensorrt module, with the plugins registered; or that of TensorRT for RTX.
        directory: directory that holds one .engine file per graph.
        config: the model's.
        name: the backend's.
    """

    def __init__(self, trt: Any, directory: Path, config: ModelConfig, name: str = RUNTIME) -> None:
        self.name, self.config, self._trt = name, config, trt
        self._logger = make_logger(trt, lambda line: None)
        self._runtime = trt.Runtime(self._logger)
        self._engines = {g: Engine(trt, self._runtime, directory / f"{g}.engine", self._logger) for g in GRAPHS}
        self._scratch = OwnedBuffer(max(e.engine.device_memory_size_v2 for e in self._engines.values()))
        for engine in self._engines.values():
            engine.prepare(self._scratch)
        self._stream = Stream()
        self._decoder = self._engines["decoder"]
        self._slow_names, self._new_names = names.slow_names(config), names.new_names(config)
        self._prefix_names, self._past_names = names.prefix_names(config), names.past_names(config)
        self._kv_type = self._decoder.types[self._past_names[0]]
        self.max_rows, _, self._longest, _ = self._decoder.max_shape(self._past_names[0], _PROFILES.index(DECODE))
        self._pools: dict[int, Pool] = {}
        self._nothing = OwnedBuffer(1)  # an address for tensors without elements
        self._no_slow: KeyValues | None = None
        # Inputs and small outputs by graph and name, as large as they have been: a call ends synchronised.
        self._buffers: dict[tuple[str, str], OwnedBuffer] = {}

    def encode_frames(self, pixel_values: np.ndarray, single_image: bool) -> np.ndarray:
        engine = self._engines["vision_encoder"]
        frames = len(pixel_values)
        tensors = {names.PIXELS: self._upload(engine, names.PIXELS, pixel_values)}
        for name in engine.outputs:
            tensors[name] = self._reuse(engine, name, (frames, *engine.engine.get_tensor_shape(name)[1:]))
        engine.run(tensors, self._stream)
        return self._download(tensors[names.PROJECTED if single_image else names.SLOW_TOKENS])

    def compress(self, slow_tokens: np.ndarray) -> tuple[np.ndarray, KeyValues | None]:
        engine, text = self._engines["compressor"], self.config.text
        frames, cells, hidden = slow_tokens.shape
        feeds = compressor_feeds(slow_tokens, self.config.slow_fast.fast)
        fast_frames = len(feeds[names.FRAME_WEIGHTS])
        fast_cells = len(feeds[names.CELL_WEIGHTS]) if names.CELL_WEIGHTS in feeds else cells
        tensors = {name: self._upload(engine, name, array) for name, array in feeds.items()}
        tensors[names.FAST_TOKENS] = self._reuse(engine, names.FAST_TOKENS, (fast_frames * fast_cells, hidden))
        shape = (1, text.num_kv_heads, frames * cells, text.head_dim)
        slow = tuple(self._allocate(engine, name, shape) for name in self._slow_names)
        tensors |= zip(self._slow_names, slow, strict=True)
        engine.run(tensors, self._stream, engine.profile_for(names.SLOW_TOKENS, slow_tokens.shape))
        return self._download(tensors[names.FAST_TOKENS]), KeyValues(slow, frames * cells) if slow else None

    def decode(self, step: DecoderStep) -> tuple[np.ndarray, KeyValues]:
        engine, count = self._decoder, step.inputs_embeds.shape[1]
        feeds = decoder_feeds(step, self.config)
        tensors = {name: self._upload(engine, name, array) for name, array in feeds.items()}
        if self._slow_names:
            slow = step.slow or self._absent_slow()
            tensors |= zip(self._slow_names, slow.tensors, strict=True)
        prefix = step.prefix.tensors if step.prefix else [self._key_value(1, 0)] * len(self._prefix_names)
        own = step.cache
        past = own.tensors if isinstance(own, _Cache) else [self._key_value(step.rows, 0)] * len(self._past_names)
        tensors |= zip(self._prefix_names, prefix, strict=True)
        tensors |= zip(self._past_names, past, strict=True)
        new = self.key_values(step.rows, count)
        tensors |= zip(self._new_names, new, strict=True)
        tensors[names.LOGITS] = self._reuse(engine, names.LOGITS, (step.rows, self.config.text.vocab_size))
        profile = DECODE if own is not None and count == 1 else PREFILL
        engine.run(tensors, self._stream, _PROFILES.index(profile))
        return self._download(tensors[names.LOGITS]), KeyValues(new, count)

    def join(self, parts: Sequence[KeyValues]) -> KeyValues:
        length, at = sum(part.length for part in parts), 0
        joined = self.key_values(1, length)
        for part in parts:
            for to, source in zip(joined, part.tensors, strict=True):
                self.copy_positions(to, 0, at, source, 0, part.length)
            at += part.length
        self._stream.synchronize()
        return KeyValues(joined, length)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        return _Cache(self, self.key_values(rows, capacity), np.zeros(rows, dtype=np.int64))

    def capacity_for(self, length: int) -> int:
        if length > self._longest:
            raise InputError(
                f"Question and answer reach {length} tokens; these engines are built for {self._longest}.",
                "Build the engines again with larger --max-question-tokens or --max-new-tokens.",
            )
        return min(super().capacity_for(length), self._longest)

    def copy_positions(
        self, to: DeviceTensor, row: int, at: int, source: DeviceTensor, source_row: int, count: int
    ) -> None:
        """Enqueue a copy of the first `count` positions of a row of K or V to position `at` of another tensor's row."""
        heads, width = to.shape[1], to.shape[3] * to.dtype.itemsize
        pitches = [tensor.shape[2] * width for tensor in (to, source)]
        target = Rows(to.pointer + row * heads * pitches[0] + at * width, pitches[0])
        origin = Rows(source.pointer + source_row * heads * pitches[1], pitches[1])
        self._stream.copy_rows(target, origin, heads, count * width)

    def to_numpy(self, tensors: KeyValues) -> list[np.ndarray]:
        return [self._download(t) for t in tensors.tensors]

    def from_numpy(self, arrays: list[np.ndarray]) -> KeyValues:
        hosts = [np.ascontiguousarray(a.astype(self._kv_type)) for a in arrays]
        buffers = [OwnedBuffer(host.nbytes) for host in hosts]
        for buffer, host in zip(buffers, hosts, strict=True):
            self._stream.to_device(buffer.pointer, host)
        self._stream.synchronize()
        tensors = (DeviceTensor(b.pointer, h.shape, self._kv_type, b) for b, h in zip(buffers, hosts, strict=True))
        return KeyValues(tuple(tensors), arrays[0].shape[2])

    def key_values(self, rows: int, length: int) -> tuple[DeviceTensor, ...]:
        """Make K/V for `length` positions of some rows, in one buffer of a pool, with contents left over."""
        tensor = self._key_value(rows, length)
        # Pools have few sizes: with room for a power of two of positions.
        size = self._key_value(rows, max(16, 1 << (length - 1).bit_length())).size * len(self._past_names)
        lease = self._pools.setdefault(size, Pool(size)).lend()
        start = lease.buffer.pointer
        return tuple(
            replace(tensor, pointer=start + i * tensor.size, owner=lease) for i in range(len(self._past_names))
        )

    def _key_value(self, rows: int, length: int) -> DeviceTensor:
        text = self.config.text
        shape = (rows, text.num_kv_heads, length, text.head_dim)
        return DeviceTensor(self._nothing.pointer, shape, self._kv_type, self._nothing)

    def _absent_slow(self) -> KeyValues:
        """Return K/V of one token that no position attends to: an engine takes no empty tensor here."""
        if self._no_slow is None:
            text = self.config.text
            zero = np.zeros((1, text.num_kv_heads, 1, text.head_dim), dtype=self._kv_type)
            self._no_slow = self.from_numpy([zero] * len(self._slow_names))
        return self._no_slow

    def _allocate(self, engine: Engine, name: str, shape: tuple[int, ...]) -> DeviceTensor:
        """Allocate memory of its own, for a tensor that outlives the call."""
        dtype = engine.types[name]
        buffer = OwnedBuffer(int(np.prod(shape)) * dtype.itemsize)
        return DeviceTensor(buffer.pointer, tuple(shape), dtype, buffer)

    def _reuse(self, engine: Engine, name: str, shape: tuple[int, ...]) -> DeviceTensor:
        """Return memory that the next call reuses; an input's has the engine's largest size, so it never grows."""
        dtype, key = engine.types[name], (engine.name, name)
        size = max(int(np.prod(s)) for s in (shape, *engine.max_shapes(name))) * dtype.itemsize
        if key not in self._buffers or self._buffers[key].size < size:
            self._buffers[key] = OwnedBuffer(size)
        return DeviceTensor(self._buffers[key].pointer, tuple(shape), dtype, self._buffers[key])

    def _upload(self, engine: Engine, name: str, array: np.ndarray) -> DeviceTensor:
        array = np.ascontiguousarray(array.astype(engine.types[name], copy=False))
        tensor = self._reuse(engine, name, array.shape)
        self._stream.to_device(tensor.pointer, array)
        # The copy may read the array until the call ends.
        return replace(tensor, owner=(tensor.owner, array))

    def _download(self, tensor: DeviceTensor) -> np.ndarray:
        """Copy a tensor to the host, floats as float32."""
        out = np.empty(tensor.shape, dtype=tensor.dtype)
        self._stream.to_host(out, tensor.pointer)
        self._stream.synchronize()
        return out.astype(np.float32) if out.dtype.itemsize == 2 else out
