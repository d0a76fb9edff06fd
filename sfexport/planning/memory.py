"""Estimate memory for every Storage: engines of TensorRT, and ONNX Runtime on a CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sfexport.artifacts.bundle import Bundle
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.dtypes import Precision
from sfexport.engines.interface import VISION_CHUNK
from sfexport.engines.memory import MemoryEstimate, estimate_memory, sum_up
from sfexport.engines.profiles import Profile
from sfexport.planning.flops import Storage, weight_bytes

Profiles = Mapping[str, Sequence[Profile]]
GRAPH_PARTS = {
    "vision_encoder": ("tower", "projector"),
    "compressor": ("compressor",),
    "decoder": ("decoder", "head"),
}
# ONNX Runtime on a CPU. Everything below was measured with version 1.31 on x86-64: benchmarks/plan_memory.py.
CPU_STORAGES = (
    Storage("fp32", 4, 32, 32),
    Storage("fp16", 4, 32, 32),  # ONNX Runtime holds fp16 weights in fp32 and computes in fp32; K/V have 16 bits
    Storage("int4+fp16", 4, 4, 32),
    Storage("int4+int8", 4, 4, 8),
)
_PROCESS = 115_000_000  # bytes of Python, the libraries and the video's decoder
_PACKED = {"decoder": 1.2, "head": 1.2}  # growth of quantised matrices when they are repacked for the product
# Memory freed while loading that the process keeps: 25 % of the weights, at most 130 MB.
_RETAINED, _RETAINED_SHARE = 130_000_000, 0.25
# Bytes per weight that is converted to fp16 and then to fp32, by the checkpoint's dtype.
_CONVERTED = {Precision.BF16.safetensors: 1.6, Precision.FP32.safetensors: 2.7}
# Bytes that ONNX Runtime's arena takes per byte alive; _MEMORY_PATTERN more when an input shape is repeated, as it
# then allocates that shape's memory pattern beside the memory of the first call.
_ARENA = {"vision_encoder": 1.3, "compressor": 1.3, "decoder": 1.8}
_MEMORY_PATTERN = 1.2
_HOST_COPIES = 3  # of pixels and slow tokens: as read, as prepared, as passed to ONNX Runtime


def with_quantized(estimate: MemoryEstimate, weights: Mapping[str, int], mapped_weights: bool) -> MemoryEstimate:
    """Estimate memory for the same graphs with a quantised decoder.

    Args:
        weights: bytes by part.
        mapped_weights: TensorRT's parser reads weights from the mapped file (TensorRT 10.13 and later).
    """
    held = {g.name: _graph_weights(g.name, weights) for g in estimate.graphs}
    graphs = [replace(g, weights=held[g.name], stored=held[g.name]) for g in estimate.graphs]
    graphs = [replace(g, converted=True) if g.name == "decoder" else g for g in graphs]
    return sum_up(graphs, estimate.text_key_values, estimate.slow_key_values, mapped_weights)


def _graph_weights(name: str, weights: Mapping[str, int]) -> int:
    """Add up the weight bytes of the parts in the graph `name`."""
    return sum(weights[part] for part in GRAPH_PARTS[name])


def cpu_weight_bytes(checkpoint: Checkpoint, storage: Storage) -> dict[str, int]:
    """Count the weight bytes that ONNX Runtime holds on a CPU, by part."""
    weights = weight_bytes(checkpoint.config, checkpoint.tower, storage)
    bits = {"decoder": storage.body_bits, "head": storage.head_bits}
    return {part: round(n * (_PACKED[part] if bits.get(part, 32) < 32 else 1)) for part, n in weights.items()}


def cpu_memory(
    checkpoint: Checkpoint, bundle: Bundle, profiles: Profiles, storage: Storage, frames: int
) -> MemoryEstimate:
    """Estimate the memory of one process that loads the graphs in ONNX Runtime on a CPU and answers.

    Of the result, `run` is the peak of the process and `build_host` the peak of loading alone.

    Args:
        bundle: the checkpoint's bundle in fp32.
        profiles: the bundle's, for these frames and the longest question and answer.
    """
    weights = cpu_weight_bytes(checkpoint, storage)
    estimate = estimate_memory(bundle, _with_opt_shapes(profiles), mapped_weights=True, for_tensorrt=False)
    graphs = tuple(replace(g, weights=_graph_weights(g.name, weights)) for g in estimate.graphs)
    held = sum(g.weights for g in graphs)
    held += min(_RETAINED, round(_RETAINED_SHARE * held)) + _PROCESS
    loading = held + _largest_tensor(checkpoint, storage, weights) + _converted(checkpoint, storage)
    width = 2 if storage.name == "fp16" else 4
    text, slow = (n * width // 4 for n in (estimate.text_key_values, estimate.slow_key_values))
    arenas = sum(g.activations * _arena(g.name, frames) for g in graphs)
    running = held + round(arenas) + text + slow + _HOST_COPIES * _host_arrays(bundle, frames)
    return MemoryEstimate(graphs, text, slow, max(loading, running), 0, loading)


def _with_opt_shapes(profiles: Profiles) -> dict[str, list[Profile]]:
    """Replace the max shapes by the opt shapes: on a CPU nothing is reserved for the largest."""
    return {
        name: [Profile(p.name, tuple(replace(t, max=t.opt) for t in p.tensors)) for p in found]
        for name, found in profiles.items()
    }


def _arena(graph: str, frames: int) -> float:
    """Return the bytes that the arena takes per byte alive; from two full chunks on, vision repeats a shape."""
    repeated = graph == "vision_encoder" and frames >= 2 * VISION_CHUNK
    return _ARENA[graph] + (_MEMORY_PATTERN if repeated else 0)


def _largest_tensor(checkpoint: Checkpoint, storage: Storage, weights: Mapping[str, int]) -> int:
    """Count the bytes of the largest tensor, which loading holds twice while converting or repacking it.

    The embedding is left out; in a quantised model only the tower's tensors and the head count.
    """
    names = checkpoint.tower.expected_tensors() if storage.quantised else checkpoint.expected_tensors()
    others = max(math.prod(shape) for name, shape in names.items() if "embed_tokens" not in name)
    return max(weights["head"], storage.width * others)


def _converted(checkpoint: Checkpoint, storage: Storage) -> int:
    """Count the bytes of weights of another dtype that an fp16 graph converts to fp16, then to fp32."""
    if storage.name != "fp16":
        return 0
    tensors = (checkpoint.tensors[name] for name in checkpoint.expected_tensors())
    return round(sum(_CONVERTED.get(t.dtype, 0) * math.prod(t.shape) for t in tensors))


def _host_arrays(bundle: Bundle, frames: int) -> int:
    """Count the bytes of float32 arrays: pixels of one vision call and slow tokens of all frames."""
    cells = bundle.tokens_per_frame(single_image=frames == 1)
    pixels = min(frames, VISION_CHUNK) * 3 * bundle.image.crop**2
    return 4 * (pixels + frames * cells * bundle.config.text.hidden_size)
