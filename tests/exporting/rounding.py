"""Running a float16 or bfloat16 graph in float32 with a rounding after every node. Used by test_precision.py only.

ONNX Runtime's CPU has no bfloat16 arithmetic, and computes much of a float16 graph in float32. Here every value that
the graph says is 16 bits wide is one: what is left to the runtime is the order of a sum.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from golden_data import Golden, goldens
from onnx import TensorProto, helper, inliner, shape_inference
from sessions import model_session
from text_cache import TextCache

from sfexport.artifacts.bundle import GRAPHS
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.fast_path import cell_weights, frame_weights
from sfexport.exporting.export import ExportOptions, export
from sfexport.graphs import names

NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


class RoundedGraph:
    """The graph in `file`, its weights beside it. Call it with float32 arrays; all outputs are float32."""

    def __init__(self, file: Path) -> None:
        model = onnx.load(file, load_external_data=False)
        model = shape_inference.infer_shapes(inliner.inline_local_functions(model), strict_mode=True)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = model_session(_widen(model), file.parent, options)

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [o.name for o in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, feeds), strict=True))


def _widen(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.output, *graph.value_info]}
    nodes = []
    for value in graph.input:
        if types[value.name] in NARROW:
            nodes += _rounding(value.name, f"{value.name}|rounded", types[value.name])
    renamed = {v.name: f"{v.name}|rounded" for v in graph.input if types[v.name] in NARROW}
    for tensor in graph.initializer:
        if tensor.data_type in NARROW:
            renamed[tensor.name] = f"{tensor.name}|wide"
            nodes.append(helper.make_node("Cast", [tensor.name], [renamed[tensor.name]], to=TensorProto.FLOAT))
    for node in graph.node:
        nodes += _widened_node(node, renamed, types)
    for value in [*graph.input, *graph.output]:
        if types[value.name] in NARROW:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


def _widened_node(node: onnx.NodeProto, renamed: dict[str, str], types: dict[str, int]) -> list[onnx.NodeProto]:
    """The node on float32 values, and a rounding of each output that should be narrow."""
    after = []
    is_cast = node.op_type in ("Cast", "CastLike")
    if is_cast and types[node.output[0]] in (*NARROW, TensorProto.FLOAT):
        node = helper.make_node("Cast", node.input[:1], node.output, to=TensorProto.FLOAT)
    for i, name in enumerate(node.input):
        node.input[i] = renamed.get(name, name)
    for i, name in enumerate(node.output):
        if types[name] in NARROW:
            node.output[i] = f"{name}|exact"
            after += _rounding(node.output[i], name, types[name])
    return [node, *after]


def _rounding(source: str, target: str, dtype: int) -> list[onnx.NodeProto]:
    narrow = f"{target}|narrow"
    return [
        helper.make_node("Cast", [source], [narrow], to=dtype),
        helper.make_node("Cast", [narrow], [target], to=TensorProto.FLOAT),
    ]


class RoundedGolden:
    """A golden of one row through the three graphs, every value as wide as the graph says."""

    def __init__(self, golden: Golden, precision: str, folder: Path) -> None:
        self.golden = golden
        checkpoint = Path(shutil.copytree(golden.path, folder / "checkpoint"))
        # Goldens are recorded at sizes of their own and have no preprocessor file.
        size = golden.pixels(0).shape[-1]
        (checkpoint / "preprocessor_config.json").write_text(json.dumps({"size": size}))
        options = ExportOptions(weights="copy", precision=precision)
        self.bundle = export(Checkpoint.open(checkpoint), folder / "bundle", options)
        self.config = self.bundle.config
        self.vision, self.compressor, self.decoder = (RoundedGraph(self.bundle.graph_file(name)) for name in GRAPHS)

    def slow(self) -> np.ndarray:
        pixels = self.golden.pixels(0)
        return self.vision({names.PIXELS: pixels})[names.PROJECTED if len(pixels) == 1 else names.SLOW_TOKENS]

    def compress(self, slow: np.ndarray) -> dict[str, np.ndarray]:
        fast = self.config.slow_fast.fast
        feeds = {names.SLOW_TOKENS: slow, names.FRAME_WEIGHTS: frame_weights(len(slow), fast)}
        if fast.spatial_stride > 1:
            feeds[names.CELL_WEIGHTS] = cell_weights(slow.shape[1], fast.spatial_stride)
        return self.compressor(feeds)

    def logits(self) -> np.ndarray:
        """[L, V], one position at a time."""
        slow, found = self.slow(), []
        compressed = self.compress(slow)
        embeds = self._merge(compressed[names.FAST_TOKENS])
        attends = self.golden.outputs["token_types"][0] <= 2
        assert self.config.slow_fast.attends == "text"
        cache = TextCache(self.config, 1)
        fixed = {n: compressed[n] for n in names.slow_names(self.config)}
        fixed[names.SLOW_LENGTHS] = np.array([slow.shape[0] * slow.shape[1]])
        for i in range(len(embeds)):
            here = {names.EMBEDS: embeds[None, i : i + 1], names.POSITIONS: np.array([[i]])}
            here |= {names.MASK: np.ones((1, 1), bool), names.SLOW_ATTENDS: attends[None, i : i + 1]}
            out = self.decoder(here | cache.feeds() | fixed)
            cache.append(out, here[names.MASK])
            found.append(out[names.LOGITS][0])
        return np.stack(found)

    def _merge(self, fast: np.ndarray) -> np.ndarray:
        ids, table = self.golden.ids(0), self.bundle.embedding().rows()
        (at,) = np.flatnonzero(ids == -200)
        return np.concatenate([table[ids[:at]], fast, table[ids[at + 1 :]]])


def with_large_biases(folder: Path) -> Golden:
    """Copy a golden, with key and query biases as large as Qwen2's: its scores reach 10^5."""
    from safetensors.numpy import load_file, save_file

    golden = next(g for g in goldens() if g.name == "base_t16")
    copy = Path(shutil.copytree(golden.path, folder / "golden"))
    tensors = load_file(copy / "model.safetensors")
    for name in tensors:
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            tensors[name] = tensors[name] + np.float32(400)
    save_file(tensors, copy / "model.safetensors")
    return Golden(copy, "")
