"""What tests of quantised bundles share: the weights in their files, and running their decoders."""

from __future__ import annotations

import shutil
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import split_shard, write_shard

from sfexport.artifacts.bundle import Bundle
from sfexport.dtypes import Precision
from sfexport.engines import onnxruntime_backend
from sfexport.engines.interface import DecoderStep
from sfexport.engines.onnxruntime_backend import OnnxRuntimeBackend
from sfexport.exporting.rounding import dequantize, unpack_int4

FILE = "weights.safetensors"
ORT = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])


def stored_weights(bundle: Bundle, name: str) -> np.ndarray:
    """What a quantised bundle's file holds for a rounded matrix, as float32 [out, in]; read with its header alone."""
    header, data = split_shard(bundle.path / FILE)

    def read(key: str) -> np.ndarray:
        (begin, end), dtype = header[key]["data_offsets"], header[key]["dtype"]
        codes = {"U8": np.uint8, "I8": np.int8}
        array = codes.get(dtype) or Precision.from_safetensors(dtype).numpy
        return np.frombuffer(data[begin:end], array).reshape(header[key]["shape"])

    scales = read(f"{name}.scale").astype(np.float32)
    if f"{name}.int8" in header:
        return dequantize(read(f"{name}.int8"), scales).T
    codes = unpack_int4(read(f"{name}.int4"))
    if f"{name}.zero" in header:
        zeros = unpack_int4(read(f"{name}.zero")) & 15
        codes = (codes & 15) - np.repeat(zeros, len(codes) // len(zeros), axis=0)
    return dequantize(codes, scales).T


def as_dtype(checkpoint: Path, out: Path, dtype: str) -> Path:
    """A copy of a bf16 checkpoint with its weights stored as `dtype`, values as they were."""
    shutil.copytree(checkpoint, out)
    for shard in out.glob("*.safetensors"):
        header, data = split_shard(shard)
        chunks, offset = [], 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            values = Precision.BF16.to_float32(np.frombuffer(data[begin:end], np.uint16))
            chunk = Precision.from_safetensors(dtype).from_float32(values).tobytes()
            entry |= {"dtype": dtype, "data_offsets": [offset, offset + len(chunk)]}
            chunks.append(chunk)
            offset += len(chunk)
        write_shard(shard, header, b"".join(chunks))
    return out


def with_weights_of(bundle: Bundle, checkpoint: Path, out: Path) -> Path:
    """A float32 copy of a bf16 checkpoint with a quantised bundle's matrices, dequantised, in the places of its own."""
    as_dtype(checkpoint, out, "F32")
    for shard in out.glob("*.safetensors"):
        header, data = split_shard(shard)
        changed = bytearray(data)
        for name in header.keys() & bundle.quantization["matrices"].keys():
            begin, end = header[name]["data_offsets"]
            changed[begin:end] = stored_weights(bundle, name).astype(np.float32).tobytes()
        write_shard(shard, header, bytes(changed))
    return out


def optimized(bundle: Bundle, folder: Path) -> Counter[str]:
    """Operators of the decoder as ONNX Runtime runs it on the CPU."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(bundle.graph_file("decoder")), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node)


Run = namedtuple("Run", "logits presents")


def run(bundle: Bundle, tokens: int = 5, steps: int = 2) -> Run:
    """Logits after a prompt and after each of some more tokens, and the last K/V; the same input for every bundle."""
    backend = OnnxRuntimeBackend(bundle.path, bundle.weights_directory, bundle.config)
    width, rng = bundle.config.text.hidden_size, np.random.default_rng(0)
    slow = backend.compress(rng.standard_normal((8, 4, width), dtype=np.float32))[1]
    embeds = rng.standard_normal((1, tokens + steps, width), dtype=np.float32)
    logits, pieces, start = [], [], 0
    for length in (tokens, *[1] * steps):
        part = embeds[:, start : start + length]
        prefix = backend.join(pieces) if pieces else None
        found, new = backend.decode(DecoderStep(part, np.ones(length, dtype=bool), prefix, slow=slow))
        logits.append(found[0])
        pieces.append(new)
        start += length
    return Run(np.stack(logits), backend.to_numpy(backend.join(pieces)))


def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime without fusions: weights are dequantised and multiplied in float32."""

    def session(graph: Path, weights_directory: Path) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime_backend, "open_session", session)


def assert_same(found: Run, wanted: Run) -> None:
    """Within what float32 sums in another order give."""
    for a, b in zip((found.logits, *found.presents), (wanted.logits, *wanted.presents), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
