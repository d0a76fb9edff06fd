"""Run engines with TensorRT: three engines, one scratch buffer, K/V that stay on the GPU. No torch.

A session's prefix is read by every step and never copied. A step's new K/V are copied behind each row's own ones, on
the GPU. Buffers come from pools of a few sizes and return there when nothing refers to them any more, so that memory
does not grow with questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfexport.artifacts.bundle import GRAPHS
from sfexport.artifacts.engines import decoder_files
from sfexport.checkpoint.config import ModelConfig
from sfexport.engines.interface import Backend, Cache, DecoderStep, KeyValues, Logits, compressor_feeds, decoder_feeds
from sfexport.engines.profiles import DECODE, PREFILL
from sfexport.engines.tensorrt.allocator import chunked_allocator
from sfexport.engines.tensorrt.buffers import DeviceTensor, OwnedBuffer, Pool, block_stride, lay_out
from sfexport.engines.tensorrt.cuda import Place, Stream
from sfexport.engines.tensorrt.engine import Engine, MakeContext
from sfexport.engines.tensorrt.library import make_logger
from sfexport.engines.tensorrt.transfers import Transfers
from sfexport.errors import InputError
from sfexport.graphs import names

RUNTIME = "tensorrt"
_PROFILES = (PREFILL, DECODE)  # of the decoder, in resolve_profiles' order


class _Cache(Cache):
    """A cache in the GPU's memory."""

    def __init__(self, backend: TensorRTBackend, tensors: tuple[DeviceTensor, ...], lengths: np.ndarray) -> None:
        self._backend, self.tensors, self.lengths = backend, tensors, lengths
        self.capacity = tensors[0].shape[2]

    def append(self, new: KeyValues, row: int | None = None) -> None:
        rows = range(len(self.lengths)) if row is None else [row]
        for i, at in enumerate(rows):
            self._backend.copy_positions(self.tensors, at, int(self.lengths[at]), new.tensors, i, new.length)
        self.lengths[list(rows)] += new.length

    def resize(self, rows: Sequence[int], capacity: int) -> Cache:
        tensors = self._backend.key_values(len(rows), capacity)
        for i, row in enumerate(rows):
            self._backend.copy_positions(tensors, i, 0, self.tensors, row, int(self.lengths[row]))
        return _Cache(self._backend, tensors, self.lengths[list(rows)])


class _DeviceLogits(Logits):
    """Logits in the GPU's memory: 152,064 numbers per row, of which greedy decoding needs none on the host."""

    def __init__(self, backend: TensorRTBackend, outputs: dict[str, DeviceTensor]) -> None:
        self._backend, self._outputs = backend, outputs

    def best(self) -> np.ndarray | None:
        if names.BEST_TOKENS not in self._outputs:
            return None
        best, sums = self._backend.download_outputs(self._outputs, names.BEST_TOKENS, names.LOGIT_SUMS)
        return best if np.isfinite(sums).all() else None

    def values(self) -> np.ndarray:
        return self._backend.download_outputs(self._outputs, names.LOGITS)[0]


class TensorRTBackend(Backend):
    """Run the three graphs with TensorRT.

    Args:
        trt: the tensorrt module, with the plugins registered; or that of TensorRT for RTX.
        directory: directory that holds one .engine file per graph.
        config: the model's.
        name: the backend's.
        parts: number of engines that the decoder is split into.
        make_context: as Engine takes it.

    Attributes:
        replays: decode steps are replayed as CUDA graphs; False is for comparison.
    """

    def __init__(
        self,
        trt: Any,
        directory: Path,
        config: ModelConfig,
        name: str = RUNTIME,
        parts: int = 1,
        make_context: MakeContext | None = None,
    ) -> None:
        self.name, self.config, self._trt, self.replays = name, config, trt, True
        self._logger = make_logger(trt, lambda line: None)
        self._runtime = trt.Runtime(self._logger)
        self._allocator = chunked_allocator(trt)
        if self._allocator is not None:
            self._runtime.gpu_allocator = self._allocator
        files = [*(graph for graph in GRAPHS if graph != "decoder"), *decoder_files(parts)]
        self._engines = {
            f: Engine(trt, self._runtime, directory / f"{f}.engine", self._logger, make_context) for f in files
        }
        self._scratch = OwnedBuffer(max(e.scratch_size for e in self._engines.values()))
        for engine in self._engines.values():
            engine.prepare(self._scratch)
        self._stream = Stream()
        self._transfers = Transfers(self._stream)
        self._parts = [self._engines[file] for file in decoder_files(parts)]
        self._slow_names, self._new_names = names.slow_names(config), names.new_names(config)
        self._prefix_names, self._past_names = names.prefix_names(config), names.past_names(config)
        first = self._parts[0]
        self._kv_type = first.types[self._past_names[0]]
        self.max_rows, _, self._longest, _ = first.max_shape(self._past_names[0], _PROFILES.index(DECODE))
        self._pools: dict[int, Pool] = {}
        self._nothing = OwnedBuffer(1)  # an address for tensors without elements
        self._no_slow: KeyValues | None = None

    def encode_frames(self, pixel_values: np.ndarray, single_image: bool) -> np.ndarray:
        engine = self._engines["vision_encoder"]
        frames = len(pixel_values)
        tensors = {names.PIXELS: self._transfers.upload(engine, names.PIXELS, pixel_values)}
        for name in engine.outputs:
            tensors[name] = self._transfers.reuse(engine, name, (frames, *engine.shape(name)[1:]))
        engine.run(tensors, self._stream)
        return self._transfers.download(tensors[names.PROJECTED if single_image else names.SLOW_TOKENS])

    def compress(self, slow_tokens: np.ndarray) -> tuple[np.ndarray, KeyValues | None]:
        engine, text = self._engines["compressor"], self.config.text
        frames, cells, hidden = slow_tokens.shape
        feeds = compressor_feeds(slow_tokens, self.config.slow_fast.fast)
        fast_frames = len(feeds[names.FRAME_WEIGHTS])
        fast_cells = len(feeds[names.CELL_WEIGHTS]) if names.CELL_WEIGHTS in feeds else cells
        tensors = {name: self._transfers.upload(engine, name, array) for name, array in feeds.items()}
        tensors[names.FAST_TOKENS] = self._transfers.reuse(
            engine, names.FAST_TOKENS, (fast_frames * fast_cells, hidden)
        )
        shape = (1, text.num_kv_heads, frames * cells, text.head_dim)
        slow = tuple(self._allocate(engine, name, shape) for name in self._slow_names)
        tensors |= zip(self._slow_names, slow, strict=True)
        engine.run(tensors, self._stream, engine.profile_for(names.SLOW_TOKENS, slow_tokens.shape))
        return self._transfers.download(tensors[names.FAST_TOKENS]), KeyValues(slow, frames * cells) if slow else None

    def decode(self, step: DecoderStep) -> tuple[np.ndarray, KeyValues]:
        logits, new = self.decode_later(step)
        return logits.values(), new

    def decode_later(self, step: DecoderStep) -> tuple[Logits, KeyValues]:
        count, tensors = step.inputs_embeds.shape[1], dict[str, DeviceTensor]()
        for name, array in decoder_feeds(step, self.config).items():
            taker = next(part for part in self._parts if name in part.types)
            tensors[name] = self._transfers.upload(taker, name, array)
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
        decodes = own is not None and count == 1
        for part in self._parts:
            outputs = self._outputs(part, step.rows, count)
            tensors |= outputs
            part.run(
                tensors, self._stream, _PROFILES.index(DECODE if decodes else PREFILL), repeats=decodes and self.replays
            )
        return _DeviceLogits(self, outputs), KeyValues(new, count)

    def _outputs(self, part: Engine, rows: int, count: int) -> dict[str, DeviceTensor]:
        """Return memory for what a part returns beside K and V: its hidden states, or the logits."""
        text = self.config.text
        shapes = {names.LOGITS: (rows, text.vocab_size), names.BEST_TOKENS: (rows,), names.LOGIT_SUMS: (rows,)}
        hidden = (rows, count, text.hidden_size)
        wanted = [name for name in part.outputs if not name.startswith(names.NEW_KEY_VALUES)]
        return {name: self._transfers.reuse(part, name, shapes.get(name, hidden)) for name in wanted}

    def download_outputs(self, outputs: dict[str, DeviceTensor], *wanted: str) -> list[np.ndarray]:
        """Copy some of the decoder's small outputs to the host."""
        return self._transfers.download_small(self._parts[-1], {name: outputs[name] for name in wanted})

    def join(self, parts: Sequence[KeyValues]) -> KeyValues:
        length, at = sum(part.length for part in parts), 0
        joined = self.key_values(1, length)
        for part in parts:
            self.copy_positions(joined, 0, at, part.tensors, 0, part.length)
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
        self,
        to: Sequence[DeviceTensor],
        row: int,
        at: int,
        source: Sequence[DeviceTensor],
        source_row: int,
        count: int,
    ) -> None:
        """Enqueue one copy of the first `count` positions of a row of all K and V to position `at` of another row.

        The tensors of each side are of one block, as lay_out places them.
        """
        _, heads, _, width = to[0].shape
        size = width * to[0].dtype.itemsize

        def place(first: DeviceTensor, row: int, at: int) -> Place:
            pitch = first.shape[2] * size
            return Place(first.pointer + row * heads * pitch + at * size, pitch, block_stride(first) // pitch)

        target, origin = place(to[0], row, at), place(source[0], source_row, 0)
        self._stream.copy_pieces(target, origin, count * size, heads, len(to))

    def to_numpy(self, tensors: KeyValues) -> list[np.ndarray]:
        return [self._transfers.download(t) for t in tensors.tensors]

    def from_numpy(self, arrays: list[np.ndarray]) -> KeyValues:
        hosts = [np.ascontiguousarray(a.astype(self._kv_type)) for a in arrays]
        one = DeviceTensor(0, hosts[0].shape, self._kv_type, None)
        buffer = OwnedBuffer(block_stride(one) * len(hosts))
        tensors = lay_out(one, buffer.pointer, len(hosts), buffer)
        for tensor, host in zip(tensors, hosts, strict=True):
            self._stream.to_device(tensor.pointer, host)
        self._stream.synchronize()
        return KeyValues(tensors, arrays[0].shape[2])

    def key_values(self, rows: int, length: int) -> tuple[DeviceTensor, ...]:
        """Make K/V for `length` positions of some rows, in one buffer of a pool, with contents left over."""
        tensor = self._key_value(rows, length)
        # Pools have few sizes: with room for a power of two of positions.
        count, room = len(self._past_names), self._key_value(rows, max(16, 1 << (length - 1).bit_length()))
        size = max(block_stride(tensor), block_stride(room)) * count
        lease = self._pools.setdefault(size, Pool(size)).lend()
        return lay_out(tensor, lease.buffer.pointer, count, lease)

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
