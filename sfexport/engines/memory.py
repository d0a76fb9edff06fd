"""Estimate the memory of building and running engines from the graphs.

Computed from the graph: weights, K/V, and the most bytes alive at once if every node's output were kept until its last
use. Measured with the builder of TensorRT for RTX 1.7, and assumed for TensorRT: what an engine's activations take
of the computed ones, and how often weights are in memory while an engine is built (docs/benchmarks/full_width.md).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner

from sfexport.artifacts.bundle import Bundle
from sfexport.checkpoint.vision_tower import ConvNextTower, tower_from_sizes
from sfexport.dtypes import Precision, from_onnx
from sfexport.engines.profiles import Profile
from sfexport.engines.tensorrt.graph_file import tensorrt_graph
from sfexport.errors import SfexportError
from sfexport.graphs.initializers import external_to_inputs
from sfexport.printable import sizes_text

# The CUDA context, TensorRT's own code and its kernels.
RUNTIME_OVERHEAD = 600 << 20
# A session's text K/V: the video's prefix, each row's own positions, and those of the step being made.
TEXT_KEY_VALUES = ("prefix_key_values.", "past_key_values.", "new_key_values.")
MEASURED_WITH = "TensorRT for RTX 1.7"  # what the figures below were measured with; they are assumed for TensorRT
# Bytes of an engine and of memory on the host per byte of weights: those of the builder and of the serialised engine
# are there at once, and more where the builder folds casts or packs integers. Bytes per weight byte, measured: engines
# 1.003 to 1.031 (1.20 in fp32, which stores the head twice); memory 2.03 with the graph's own type (the tower 2.1),
# 2.68 with fp16 cast from bf16, 2.76 in INT4.
ENGINE_PER_WEIGHT = 1.03
HOST_COPIES, HOST_COPIES_CONVERTED = 2.05, 2.8
# Not measured: the parser's copy, unless it reads the mapped file, and the builder's on the GPU.
PARSER_COPIES, DEVICE_COPIES = 1, 1
# Bytes of an engine's activations per computed one. Measured at 64 frames: the decoder 1.27 without and 1.32 with the
# plain nodes of cross-attention, ConvNeXt-XXL 0.28, the compressor 0.64. Not measured, so 1: the other towers.
ACTIVATIONS = {"vision_encoder": 0.3, "compressor": 0.65, "decoder": 1.35}


@dataclass(frozen=True)
class GraphMemory:
    """Bytes of one graph, at the largest shapes.

    Attributes:
        weights: in the graph's own type or as integers.
        activations: computed from the graph.
        stored: bytes of the weights in their files.
        per_computed: bytes of an engine's activations per computed one.
        converted: most weights are stored in another type than the graph's, or as integers.
        parts: engines of about as many weights that it is built as, one after the other.
    """

    name: str
    weights: int
    activations: int
    stored: int
    per_computed: float = 1.0
    converted: bool = False
    parts: int = 1

    @property
    def engine_activations(self) -> int:
        return round(self.per_computed * self.activations)

    @property
    def engine(self) -> int:
        return round(ENGINE_PER_WEIGHT * self.weights)

    def host(self, mapped_weights: bool) -> int:
        """Return the bytes of the host's memory while this graph is built."""
        copies = HOST_COPIES_CONVERTED if self.converted else HOST_COPIES
        return round((copies * self.weights + (0 if mapped_weights else PARSER_COPIES * self.stored)) / self.parts)

    @property
    def device(self) -> int:
        """Bytes of the GPU's memory while this graph is built."""
        return round(DEVICE_COPIES * self.weights / self.parts) + self.engine_activations


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes; the module says how they are computed.

    Attributes:
        text_key_values: text K/V of the video's prefix and of all rows.
        slow_key_values: slow K/V of one video.
        run: everything on the GPU while answering.
        build_device: memory on the GPU while the largest graph is built.
        build_host: memory of the host while the largest graph is built.
    """

    graphs: tuple[GraphMemory, ...]
    text_key_values: int
    slow_key_values: int
    run: int
    build_device: int
    build_host: int

    @property
    def build(self) -> int:
        """Bytes of a build where CPU and GPU share one memory."""
        return self.build_device + self.build_host

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with the source of every figure."""
        added = {g.name: {"engine_activations": g.engine_activations, "engine": g.engine} for g in self.graphs}
        document = asdict(self)
        graphs = [graph | added[graph["name"]] for graph in document["graphs"]]
        return document | {"graphs": graphs, "sources": memory_sources()}


def memory_sources() -> dict[str, str]:
    """Return how each kind of figure was found."""
    measured = f"computed, times a ratio measured with the builder of {MEASURED_WITH} (not TensorRT)"
    return {
        "weights": "computed",
        "activations": "computed",
        "text_key_values": "computed",
        "slow_key_values": "computed",
        "engine": measured,
        "engine_activations": f"{measured}; a vision tower other than ConvNeXt: computed",
        "run": "computed, with engine_activations",
        "build_device": "computed, with engine_activations; one copy of the weights is assumed",
        "build_host": f"{measured}; without mapped weights one copy more, assumed",
    }


def estimate_memory(
    bundle: Bundle,
    profiles: Mapping[str, Sequence[Profile]],
    mapped_weights: bool,
    plugin: bool = True,
    for_tensorrt: bool = True,
) -> MemoryEstimate:
    """Estimate the memory of building and running a bundle's engines.

    Args:
        mapped_weights: the parser reads weights where they lie in the file (TensorRT 10.13 and later).
        plugin: cross-attention is the plugin's, not of plain nodes.
        for_tensorrt: the graphs are those that TensorRT builds from; False: the bundle's own.
    """
    models = {name: _load(bundle, name, plugin, for_tensorrt) for name in profiles}
    graphs = tuple(_graph_memory(bundle, name, model, profiles[name]) for name, model in models.items())
    width = Precision(bundle.precision).nbytes
    decoder = {t.name: t for t in profiles["decoder"][-1].tensors}
    text = sum(math.prod(t.max) for n, t in decoder.items() if n.startswith(TEXT_KEY_VALUES)) * width
    slow = sum(math.prod(t.max) for n, t in decoder.items() if n.startswith("slow_key_values.")) * width
    return sum_up(graphs, text, slow, mapped_weights)


def with_decoder_parts(estimate: MemoryEstimate, parts: int, mapped_weights: bool) -> MemoryEstimate:
    """Return the estimate for a decoder that is built as several engines."""
    graphs = [replace(g, parts=parts) if g.name == "decoder" else g for g in estimate.graphs]
    return sum_up(graphs, estimate.text_key_values, estimate.slow_key_values, mapped_weights)


def sum_up(graphs: Sequence[GraphMemory], text: int, slow: int, mapped_weights: bool) -> MemoryEstimate:
    """Add up the memory of graphs and K/V.

    Args:
        text: bytes of text K/V.
        slow: bytes of slow K/V.
        mapped_weights: as in estimate_memory.
    """
    weights, largest = sum(g.weights for g in graphs), max(g.engine_activations for g in graphs)
    run = weights + largest + text + slow + RUNTIME_OVERHEAD
    host = max(g.host(mapped_weights) for g in graphs)
    device = max(g.device for g in graphs) + RUNTIME_OVERHEAD
    return MemoryEstimate(tuple(graphs), text, slow, run, device, host)


def _load(bundle: Bundle, name: str, plugin: bool, for_tensorrt: bool) -> onnx.ModelProto:
    if not for_tensorrt:
        return onnx.load(bundle.graph_file(name), load_external_data=False)
    model = tensorrt_graph(bundle, name)
    return model if plugin or not model.functions else onnx.inliner.inline_local_functions(model)


def _graph_memory(bundle: Bundle, name: str, model: onnx.ModelProto, profiles: Sequence[Profile]) -> GraphMemory:
    width = Precision(bundle.precision).nbytes
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    weights = sum(math.prod(t.dims) * _stored_bits(t.data_type, 8 * width) // 8 for t in external)
    stored = sum(math.prod(t.dims) * from_onnx(t.data_type).bits // 8 for t in external)
    own = onnx.TensorProto.DataType.Value(Precision(bundle.precision).dtype.onnx)
    kept = sum(math.prod(t.dims) * width for t in external if t.data_type == own)
    tower = tower_from_sizes(bundle.content["model"]["tower"])
    per_computed = ACTIVATIONS[name] if name != "vision_encoder" or isinstance(tower, ConvNextTower) else 1.0
    activations = max(_activations(model, profile) for profile in profiles)
    return GraphMemory(name, weights, activations, stored, per_computed, converted=2 * kept < weights)


def _activations(model: onnx.ModelProto, profile: Profile) -> int:
    """Compute the largest number of bytes alive at once, with every tensor at its largest shape.

    What is between the two products of a fused attention is never in memory.
    """
    fused = _fused_values(model)
    sizes = {name: size for name, size in _sizes(model, profile).items() if name not in fused}
    last_use: dict[str, int] = {}
    for i, node in enumerate(model.graph.node):
        last_use |= dict.fromkeys(node.input, i)
    outputs = {v.name for v in model.graph.output}
    ends: dict[int, list[str]] = {}
    for name, i in last_use.items():
        ends.setdefault(i, []).append(name)
    alive = peak = 0
    for i, node in enumerate(model.graph.node):
        alive += sum(sizes.get(name, 0) for name in node.output)
        peak = max(peak, alive)
        alive -= sum(sizes.get(name, 0) for name in ends.get(i, ()) if name not in outputs)
    return peak


def _fused_values(model: onnx.ModelProto) -> set[str]:
    """Name the scores and probabilities of attention in the form that TensorRT makes one kernel of."""
    by_output = {name: node for node in model.graph.node for name in node.output}
    readers = {name: node for node in model.graph.node for name in node.input}
    fused = set()
    for node in model.graph.node:
        if node.op_type != "Softmax":
            continue
        chain = [node]
        while chain[-1].op_type in ("Softmax", "Add", "Mul", "Cast") and chain[-1].input[0] in by_output:
            chain.append(by_output[chain[-1].input[0]])
        after = [node]
        while after[-1].op_type in ("Softmax", "Cast", "CastLike") and after[-1].output[0] in readers:
            after.append(readers[after[-1].output[0]])
        if chain[-1].op_type == after[-1].op_type == "MatMul" and len(after) > 2:
            fused |= {name for inner in (*chain, *after[:-1]) for name in inner.output}
    return fused


def _sizes(model: onnx.ModelProto, profile: Profile) -> dict[str, int]:
    """Compute the bytes of every value that depends on the inputs. A build folds casts of weights: not counted."""
    fixed = _with_shapes(model, profile)
    _fold_integers(fixed)
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    weights = {t.name for t in model.graph.initializer}
    folded = {o for node in model.graph.node if set(node.input) <= weights for o in node.output}
    out = {}
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        kind = value.type.tensor_type
        if value.name not in folded:
            dims = [d.dim_value for d in kind.shape.dim]
            out[value.name] = math.prod(dims) * max(1, from_onnx(kind.elem_type).bits // 8)
    return out


def _fold_integers(model: onnx.ModelProto) -> None:
    """Make initializers of the integers that follow from the inputs' shapes: shape inference misses some of them."""
    graph = model.graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    integers = (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)
    known = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type in integers}
    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] in shapes:
            where = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            known[node.output[0]] = np.array(shapes[node.input[0]][where.get("start", 0) : where.get("end")], np.int64)
        elif node.input and not node.domain and all(name in known for name in node.input):
            known |= zip(node.output, _evaluate(node, known, model.opset_import), strict=True)
    initializers = {t.name for t in graph.initializer}
    computed = {name: value for name, value in known.items() if name not in initializers}
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in computed.items())
    kept = [node for node in graph.node if not set(node.output) & computed.keys()]
    del graph.node[:]
    graph.node.extend(kept)


def _evaluate(node: onnx.NodeProto, values: Mapping[str, np.ndarray], opsets: Any) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    names, tensor = (list(node.input), list(node.output)), onnx.helper.make_tensor_value_info
    inputs, outputs = ([tensor(name, onnx.TensorProto.UNDEFINED, None) for name in group] for group in names)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "integers", inputs, outputs), opset_imports=opsets)
    found = ReferenceEvaluator(model).run(None, {name: values[name] for name in node.input})
    return [np.asarray(value) for value in found]


def _stored_bits(onnx_type: int, width: int) -> int:
    """Return the bits of one weight: integer codes are kept as stored, all others take the graph's `width`."""
    bits = from_onnx(onnx_type).bits
    return bits if bits <= 8 else width


def _with_shapes(model: onnx.ModelProto, profile: Profile) -> onnx.ModelProto:
    """Return the graph with concrete inputs and outputs, and weights as inputs: no file is read."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    largest = {t.name: t.max for t in profile.tensors}
    for value in (*out.graph.input, *out.graph.output):
        if value.name not in largest:  # what the form for TensorRT returns besides: a number or two per row
            continue
        for dim, size in zip(value.type.tensor_type.shape.dim, largest[value.name], strict=True):
            dim.Clear()
            dim.dim_value = size
    external_to_inputs(out)
    return out


def check_weights_fit(bundle: Bundle, backend: str) -> None:
    """Refuse weights that this machine's memory cannot hold, before a long load ends in a kill.

    ONNX Runtime's CPU holds them in float32 whatever the graphs compute in, but for those rounded to 4 and 8 bits;
    PyTorch has the checkpoint's, all in float32.

    Raises:
        SfexportError: naming both sizes.
    """
    whole = 4 * bundle.content["weights"]["parameters"]
    needed, available = whole if backend == "torch" else bundle.weight_bytes(4), physical_memory()
    if available is None or needed <= available:
        return
    hint = "Use a machine with more, or --force if you know better (swap, for instance)."
    if backend == "onnxruntime" and not bundle.quantization:
        hint = "Export with --quantize int4, which takes a fraction of it; or use a machine with more, or --force."
    how = "in float32" if needed == whole else "in memory"
    needs, has = sizes_text(needed, available)
    raise SfexportError(f"The weights take {needs} {how}; this machine has {has} of memory.", hint)


def physical_memory() -> int | None:
    """Return the bytes of this machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
