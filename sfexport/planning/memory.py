"""Memory per way of storing the weights, for TensorRT and for ONNX Runtime's CPU, from the graphs and flops."""

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
    Storage("fp16", 4, 32, 32),  # it computes in fp32 and has the weights so; K/V are 16 bits wide
    Storage("int4+fp16", 4, 4, 32),
    Storage("int4+int8", 4, 4, 8),
)
_PROCESS = 115_000_000  # Python, the libraries, the video's decoder
_PACKED = {"decoder": 1.2, "head": 1.2}  # rounded matrices, rearranged for the product
_LEFT_OVER, _LEFT_OVER_SHARE = 130_000_000, 0.25  # freed while loading and not given back: at most, and of the weights
# Bytes for a weight that becomes fp16 and then fp32, by what it is stored as.
_CONVERTED = {Precision.BF16.safetensors: 1.6, Precision.FP32.safetensors: 2.7}
# What an arena takes for a byte alive. It plans a shape that it meets again anew, beside what it had.
_ARENA = {"vision_encoder": 1.3, "compressor": 1.3, "decoder": 1.8}
_PLANNED_AGAIN = 1.2
_HOST_COPIES = 3  # of pixels and of slow tokens: read, prepared, handed over


def with_weights(estimate: MemoryEstimate, weights: Mapping[str, int], mapped_weights: bool) -> MemoryEstimate:
    """Estimate memory for the same graphs with other weights. Args: `weights`: bytes by part."""
    graphs = tuple(replace(g, weights=_of_graph(g.name, weights)) for g in estimate.graphs)
    return sum_up(graphs, estimate.text_key_values, estimate.slow_key_values, mapped_weights)


def _of_graph(name: str, weights: Mapping[str, int]) -> int:
    return sum(weights[part] for part in GRAPH_PARTS[name])


def cpu_weight_bytes(checkpoint: Checkpoint, storage: Storage) -> dict[str, int]:
    """What ONNX Runtime's CPU holds, by part."""
    weights = weight_bytes(checkpoint.config, checkpoint.tower, storage)
    bits = {"decoder": storage.body_bits, "head": storage.head_bits}
    return {part: round(n * (_PACKED[part] if bits.get(part, 32) < 32 else 1)) for part, n in weights.items()}


def cpu_memory(
    checkpoint: Checkpoint, bundle: Bundle, profiles: Profiles, storage: Storage, frames: int
) -> MemoryEstimate:
    """Of one process that loads the graphs and answers; `run` is its peak, `build_host` that of loading alone.

    Args:
        bundle: exported in fp32. profiles: for these frames and the longest question and answer.
    """
    weights = cpu_weight_bytes(checkpoint, storage)
    estimate = estimate_memory(bundle, _as_called(profiles), mapped_weights=True)
    graphs = tuple(replace(g, weights=_of_graph(g.name, weights)) for g in estimate.graphs)
    held = sum(g.weights for g in graphs)
    held += min(_LEFT_OVER, round(_LEFT_OVER_SHARE * held)) + _PROCESS
    loading = held + _largest_tensor(checkpoint, storage, weights) + _converted(checkpoint, storage)
    width = 2 if storage.name == "fp16" else 4
    text, slow = (n * width // 4 for n in (estimate.text_key_values, estimate.slow_key_values))
    arenas = sum(g.activations * _arena(g.name, frames) for g in graphs)
    running = held + round(arenas) + text + slow + _HOST_COPIES * _host_arrays(bundle, frames)
    return MemoryEstimate(graphs, text, slow, max(loading, running), 0, loading)


def _as_called(profiles: Profiles) -> dict[str, list[Profile]]:
    """Profiles whose max shapes are the opt ones: nothing is reserved on a CPU."""
    return {
        name: [Profile(p.name, tuple(replace(t, max=t.opt) for t in p.tensors)) for p in found]
        for name, found in profiles.items()
    }


def _arena(graph: str, frames: int) -> float:
    again = graph == "vision_encoder" and frames >= 2 * VISION_CHUNK
    return _ARENA[graph] + (_PLANNED_AGAIN if again else 0)


def _largest_tensor(checkpoint: Checkpoint, storage: Storage, weights: Mapping[str, int]) -> int:
    """Held twice while it is converted or rearranged."""
    names = checkpoint.tower.expected_tensors() if storage.quantised else checkpoint.expected_tensors()
    others = max(math.prod(shape) for name, shape in names.items() if "embed_tokens" not in name)
    return max(weights["head"], storage.width * others)


def _converted(checkpoint: Checkpoint, storage: Storage) -> int:
    """An fp16 graph of weights stored otherwise has them in fp16 too, on their way to fp32."""
    if storage.name != "fp16":
        return 0
    tensors = (checkpoint.tensors[name] for name in checkpoint.expected_tensors())
    return round(sum(_CONVERTED.get(t.dtype, 0) * math.prod(t.shape) for t in tensors))


def _host_arrays(bundle: Bundle, frames: int) -> int:
    """NumPy's pixels of one call and slow tokens of all frames, float32."""
    cells = bundle.tokens_per_frame(single_image=frames == 1)
    pixels = min(frames, VISION_CHUNK) * 3 * bundle.image.crop**2
    return 4 * (pixels + frames * cells * bundle.config.text.hidden_size)
