"""Run engines with ONNX Runtime: the default, on any laptop's CPU and, where a driver is present, on CUDA.

The only file that imports onnxruntime.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sfexport.artifacts.bundle import GRAPHS
from sfexport.checkpoint.config import ModelConfig
from sfexport.dtypes import Precision
from sfexport.engines.interface import Backend, Cache, DecoderStep, KeyValues, compressor_feeds, decoder_feeds
from sfexport.errors import InputError, MissingDependency, SfexportError
from sfexport.graphs import names
from sfexport.versions import FIRST_WEIGHTS_FOLDER, is_older

RUNTIME = "onnxruntime"
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
_BLOCK_SIZE = "session.qdq_matmulnbits_block_size"


def _library() -> Any:
    try:
        import onnxruntime
    except Exception as error:
        install = "pip install onnxruntime"
        raise MissingDependency("onnxruntime", "The onnxruntime backend", install, failure=error) from None
    # Fatal only: what it raises is said in our own paragraph, not twice.
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def runtime_version() -> str:
    """Return the installed version, without importing the library; raises MissingDependency where there is none."""
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(_library().__version__)


def providers() -> list[str]:
    """List execution providers: CUDA if the build has it and a driver is loaded (else it only warns), then the CPU."""
    driver = any(Path(p).exists() for p in ("/proc/driver/nvidia/version", "/dev/nvhost-gpu"))
    has_cuda = driver and "CUDAExecutionProvider" in _library().get_available_providers()
    return ["CUDAExecutionProvider", "CPUExecutionProvider"] if has_cuda else ["CPUExecutionProvider"]


def check_precision(precision: str) -> None:
    """Refuse bfloat16 graphs before anything is written or loaded.

    Raises:
        InputError: ONNX Runtime's CPU provider has neither Gemm, MatMul nor Add for it (1.31), and NumPy no such type.
    """
    if precision == Precision.BF16:
        raise InputError(
            "ONNX Runtime cannot run bf16 graphs: it has no bfloat16 matrix product for the CPU.",
            "Export with --precision fp16 or fp32, or build with --backend tensorrt.",
        )


def open_session(graph: Path, weights_directory: Path) -> Any:
    """Open a session on a graph whose external data lies in `weights_directory`.

    The graph is handed over as bytes: read by path, ONNX Runtime would search the file's own directory only.

    Raises:
        SfexportError: ONNX Runtime refuses the graph or its weights.
    """
    ort, weights = _library(), weights_directory.resolve()
    try:
        if is_older(ort.__version__, FIRST_WEIGHTS_FOLDER):
            return _open_beside_links(ort, graph, weights)
        options = ort.SessionOptions()
        options.add_session_config_entry(_EXTERNAL_FOLDER, str(weights))
        # An INT8 head has one scale per output, which its product repeats for every block: of 32 inputs if not told.
        options.add_session_config_entry(_BLOCK_SIZE, "128")
        return ort.InferenceSession(graph.read_bytes(), options, providers=providers())
    except SfexportError:
        raise
    except Exception as error:  # its exceptions share no base class
        raise SfexportError(f"ONNX Runtime cannot load {graph}: {_first_line(error)}") from error


def _open_beside_links(ort: Any, graph: Path, weights: Path) -> Any:
    """Open a graph beside links to its weights: ONNX Runtime 1.20 ignores the folder option and follows links."""
    with TemporaryDirectory() as folder:
        try:
            for file in weights.iterdir():
                if file.name != graph.name:
                    (Path(folder) / file.name).symlink_to(file)
            copied = shutil.copy(graph, folder)
        except OSError as error:
            problem = f"The temporary directory {folder} cannot be written: {error.strerror or error}."
            raise InputError(problem, "Name another in the environment variable TMPDIR.") from None
        return ort.InferenceSession(copied, providers=providers())


def _float32(value: Any) -> np.ndarray:
    array: np.ndarray = value.numpy()
    return array.astype(np.float32, copy=False)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class _Cache(Cache):
    """A cache in NumPy's memory, which ONNX Runtime's CPU provider reads in place."""

    def __init__(self, arrays: list[np.ndarray], lengths: np.ndarray, make_value: Callable[[np.ndarray], Any]) -> None:
        self._arrays, self.lengths, self._make_value = arrays, lengths, make_value
        self.capacity = arrays[0].shape[2]
        self.values = [make_value(array) for array in arrays]

    def append(self, new: KeyValues, row: int | None = None) -> None:
        rows = range(len(self.lengths)) if row is None else [row]
        for array, value in zip(self._arrays, new.tensors, strict=True):
            added = value.numpy()
            for i, at in enumerate(rows):
                start = self.lengths[at]
                array[at, :, start : start + new.length] = added[i]
        self.lengths[list(rows)] += new.length

    def resize(self, rows: Sequence[int], capacity: int) -> Cache:
        kept = min(capacity, self.capacity)
        arrays = []
        for array in self._arrays:
            larger = np.zeros((len(rows), array.shape[1], capacity, array.shape[3]), array.dtype)
            larger[:, :, :kept] = array[list(rows), :, :kept]
            arrays.append(larger)
        return _Cache(arrays, self.lengths[list(rows)], self._make_value)


class OnnxRuntimeBackend(Backend):
    """Runs the three graphs in ONNX Runtime.

    Args:
        graphs: directory of the three .onnx files.
        weights_directory: directory of the shards that they point into.

    K/V stay in the graphs' type, float32 or float16; all else is float32 outside.
    """

    name = RUNTIME

    def __init__(self, graphs: Path, weights_directory: Path, config: ModelConfig) -> None:
        self._ort = _library()
        self.config = config
        self._sessions = {name: open_session(graphs / f"{name}.onnx", weights_directory) for name in GRAPHS}
        self._slow_names, self._new_names = names.slow_names(config), names.new_names(config)
        self._prefix_names, self._past_names = names.prefix_names(config), names.past_names(config)
        types = {i.name: i.type for i in self._sessions["decoder"].get_inputs()}
        precision = Precision.from_onnxruntime(types[names.EMBEDS])
        assert precision is not None, "sfexport gives every decoder embeddings in a Precision"
        self._dtype = precision.numpy
        self._empty = self._float(np.zeros((1, config.text.num_kv_heads, 0, config.text.head_dim)))

    def encode_frames(self, pixel_values: np.ndarray, single_image: bool) -> np.ndarray:
        output = names.PROJECTED if single_image else names.SLOW_TOKENS
        (tokens,) = self._run("vision_encoder", [output], {names.PIXELS: self._float(pixel_values)})
        return _float32(tokens)

    def compress(self, slow_tokens: np.ndarray) -> tuple[np.ndarray, KeyValues | None]:
        frames, cells, _ = slow_tokens.shape
        feeds = self._values(compressor_feeds(slow_tokens, self.config.slow_fast.fast))
        fast_tokens, *slow = self._run("compressor", [names.FAST_TOKENS, *self._slow_names], feeds)
        return _float32(fast_tokens), KeyValues(tuple(slow), frames * cells) if slow else None

    def decode(self, step: DecoderStep) -> tuple[np.ndarray, KeyValues]:
        feeds = self._values(decoder_feeds(step, self.config))
        feeds |= self._key_values(self._prefix_names, step.prefix) | self._key_values(self._slow_names, step.slow)
        feeds |= zip(self._past_names, self._past(step), strict=True)
        logits, *new = self._run("decoder", [names.LOGITS, *self._new_names], feeds)
        return logits.numpy(), KeyValues(tuple(new), step.inputs_embeds.shape[1])

    def join(self, parts: Sequence[KeyValues]) -> KeyValues:
        arrays = [[value.numpy() for value in part.tensors] for part in parts]
        joined = [np.concatenate(pieces, axis=2) for pieces in zip(*arrays, strict=True)]
        return KeyValues(tuple(map(self._value, joined)), sum(part.length for part in parts))

    def new_cache(self, rows: int, capacity: int) -> Cache:
        text = self.config.text
        shape = (rows, text.num_kv_heads, capacity, text.head_dim)
        return _Cache([np.zeros(shape, self._dtype) for _ in self._past_names], np.zeros(rows, np.int64), self._value)

    def to_numpy(self, tensors: KeyValues) -> list[np.ndarray]:
        # Copies: of a value in NumPy's own memory, numpy() gives a view that does not keep that memory alive.
        return [np.array(value.numpy()) for value in tensors.tensors]

    def from_numpy(self, arrays: list[np.ndarray]) -> KeyValues:
        return KeyValues(tuple(self._float(a) for a in arrays), arrays[0].shape[2])

    def _values(self, feeds: dict[str, np.ndarray]) -> dict[str, Any]:
        """Make a graph's inputs: frame and cell weights stay float32, other floats get the graphs' own type."""
        plain = (names.FRAME_WEIGHTS, names.CELL_WEIGHTS)
        return {
            name: self._float(array) if array.dtype == np.float32 and name not in plain else self._value(array)
            for name, array in feeds.items()
        }

    def _float(self, array: np.ndarray) -> Any:
        """Make a value in the graphs' own type."""
        return self._value(array.astype(self._dtype, copy=False))

    def _value(self, array: np.ndarray) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def _past(self, step: DecoderStep) -> list[Any]:
        if isinstance(step.cache, _Cache):
            return step.cache.values
        text = self.config.text
        empty = self._float(np.zeros((step.rows, text.num_kv_heads, 0, text.head_dim)))
        return [empty] * len(self._past_names)

    def _key_values(self, keys: Sequence[str], values: KeyValues | None) -> dict[str, Any]:
        tensors = values.tensors if values else [self._empty] * len(keys)
        return dict(zip(keys, tensors, strict=True))

    def _run(self, graph: str, outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
        try:
            found: list[Any] = self._sessions[graph].run_with_ort_values(outputs, feeds)
            return found
        except Exception as error:  # its exceptions share no base class
            raise SfexportError(f"ONNX Runtime failed in the {graph}: {_first_line(error)}") from error
