"""Run engines with TensorRT: three engines, one scratch buffer, K/V that stay on the GPU. No torch.

K/V of a session's prefix are kept while answers are generated, so a step never writes where it reads: it takes a
set of buffers from a pool, and a set returns there when its K/V are no longer referred to. All have the size of the
longest prompt and answer, so that memory does not grow with questions.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sfexport.artifacts.bundle import GRAPHS
from sfexport.checkpoint.config import ModelConfig
from sfexport.dtypes import from_tensorrt
from sfexport.engines.interface import Backend, DecoderStep, KeyValues, compressor_feeds, decoder_feeds
from sfexport.engines.profiles import DECODE, PREFILL
from sfexport.engines.tensorrt.cuda import Buffer, Stream
from sfexport.engines.tensorrt.library import make_logger
from sfexport.errors import BundleError, InputError, SfexportError
from sfexport.graphs import names

RUNTIME = "tensorrt"
_PROFILES = (PREFILL, DECODE)  # of the decoder, in resolve_profiles' order
_LIMITS = {
    names.PIXELS: "--frames",
    names.SLOW_TOKENS: "--frames",
    names.EMBEDS: "--max-question-tokens",
    names.MASK: "--max-new-tokens",
}


def numpy_type(tensorrt_type: Any) -> np.dtype:
    """NumPy's type for a tensor's; bfloat16 is ml_dtypes'."""
    return from_tensorrt(tensorrt_type.name).numpy


@dataclass(frozen=True)
class DeviceTensor:
    """Describe a dense part of a buffer; `owner` keeps the memory alive."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype
    owner: Any

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class _Owned(Buffer):
    """Own device memory and free it with the last reference."""

    def __del__(self) -> None:
        # At interpreter exit CUDA may already be shut down; ignore the error.
        with contextlib.suppress(SfexportError):
            if hasattr(self, "pointer"):
                self.free()


class _Pool:
    """Lend buffers of one size and take them back."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[Buffer] = []

    def lend(self) -> _Lease:
        return _Lease(self, self._free.pop() if self._free else _Owned(self.size))

    def take_back(self, buffer: Buffer) -> None:
        self._free.append(buffer)


class _Lease:
    """Hold a buffer of a pool and return it there with the last reference."""

    def __init__(self, pool: _Pool, buffer: Buffer) -> None:
        self._pool, self.buffer = pool, buffer

    def __del__(self) -> None:
        self._pool.take_back(self.buffer)


class Engine:
    """Run one deserialised engine with one execution context."""

    def __init__(self, trt: Any, runtime: Any, file: Path, logger: Any) -> None:
        """Raises BundleError where TensorRT does not take the file."""
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


class TensorRTBackend(Backend):
    """Run the three graphs with TensorRT.

    Args:
        trt: the tensorrt module, with the plugins registered.
        directory: directory that holds one .engine file per graph.
        config: the model's.
    """

    name = RUNTIME

    def __init__(self, trt: Any, directory: Path, config: ModelConfig) -> None:
        self.config, self._trt = config, trt
        self._logger = make_logger(trt, lambda line: None)
        self._runtime = trt.Runtime(self._logger)
        self._engines = {g: Engine(trt, self._runtime, directory / f"{g}.engine", self._logger) for g in GRAPHS}
        self._scratch = _Owned(max(e.engine.device_memory_size_v2 for e in self._engines.values()))
        for engine in self._engines.values():
            engine.prepare(self._scratch)
        self._stream = Stream()
        self._decoder = self._engines["decoder"]
        self._slow_names, self._past_names = names.slow_names(config), names.past_names(config)
        self._present_names = names.present_names(config)
        self._kv_type = self._decoder.types[self._past_names[0]]
        self._longest = self._decoder.max_shape(names.MASK, _PROFILES.index(DECODE))[1]
        text = config.text
        self._kv_size = text.num_kv_heads * text.head_dim * self._kv_type.itemsize  # bytes per position and tensor
        self._pool = _Pool(self._kv_size * self._longest * len(self._past_names))
        self._no_slow: KeyValues | None = None
        # Inputs and small outputs by graph and name, as large as they have been: a call ends synchronised.
        self._buffers: dict[tuple[str, str], _Owned] = {}

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
        engine, total = self._decoder, step.end
        if total > self._longest:
            raise InputError(
                f"Prompt and answer reach {total} tokens; these engines are built for {self._longest}.",
                "Build the engines again with larger --max-question-tokens, --max-new-tokens or --frames.",
            )
        feeds = decoder_feeds(step, self.config)
        tensors = {name: self._upload(engine, name, array) for name, array in feeds.items()}
        if self._slow_names:
            slow = step.slow or self._absent_slow()
            tensors |= zip(self._slow_names, slow.tensors, strict=True)
        past = step.past.tensors if step.past else self._key_values(0)
        tensors |= zip(self._past_names, past, strict=True)
        present = self._key_values(total)
        tensors |= zip(self._present_names, present, strict=True)
        tensors[names.LOGITS] = self._reuse(engine, names.LOGITS, (1, self.config.text.vocab_size))
        is_decode = total == step.start + 1 and step.start > 0
        engine.run(tensors, self._stream, _PROFILES.index(DECODE if is_decode else PREFILL))
        return self._download(tensors[names.LOGITS])[0], KeyValues(present, total)

    def to_numpy(self, tensors: KeyValues) -> list[np.ndarray]:
        return [self._download(t) for t in tensors.tensors]

    def from_numpy(self, arrays: list[np.ndarray]) -> KeyValues:
        hosts = [np.ascontiguousarray(a.astype(self._kv_type)) for a in arrays]
        buffers = [_Owned(host.nbytes) for host in hosts]
        for buffer, host in zip(buffers, hosts, strict=True):
            self._stream.to_device(buffer.pointer, host)
        self._stream.synchronize()
        tensors = (DeviceTensor(b.pointer, h.shape, self._kv_type, b) for b, h in zip(buffers, hosts, strict=True))
        return KeyValues(tuple(tensors), arrays[0].shape[2])

    def _key_values(self, length: int) -> tuple[DeviceTensor, ...]:
        """Make a set of K/V for `length` positions in a buffer of the pool."""
        lease, text = self._pool.lend(), self.config.text
        step = self._kv_size * self._longest
        shape = (1, text.num_kv_heads, length, text.head_dim)
        start = lease.buffer.pointer
        return tuple(DeviceTensor(start + i * step, shape, self._kv_type, lease) for i in range(len(self._past_names)))

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
        buffer = _Owned(int(np.prod(shape)) * dtype.itemsize)
        return DeviceTensor(buffer.pointer, tuple(shape), dtype, buffer)

    def _reuse(self, engine: Engine, name: str, shape: tuple[int, ...]) -> DeviceTensor:
        """Return memory that the next call reuses; an input's has the engine's largest size, so it never grows."""
        dtype, key = engine.types[name], (engine.name, name)
        size = max(int(np.prod(s)) for s in (shape, *engine.max_shapes(name))) * dtype.itemsize
        if key not in self._buffers or self._buffers[key].size < size:
            self._buffers[key] = _Owned(size)
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
