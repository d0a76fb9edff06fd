"""Run by test_in_graph.py in a process of its own: the demo's decoder with the Triton kernels in it.

The function-free sibling that TensorRT parses is run by onnx's reference evaluator, whose CrossAttentionSplit and
CrossAttentionCombine are sfexport's kernels in Triton's interpreter, launched as the plugins launch them. Prints the
largest difference of the logits from ONNX Runtime's on the bundle's own graph, as JSON.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sfexport.artifacts.bundle import Bundle
from sfexport.engines.onnxruntime_backend import OnnxRuntimeBackend
from sfexport.engines.tensorrt.plugin_operations import OPERATIONS
from sfexport.graphs import names
from sfexport.graphs.plugin_nodes import COMBINE, SPLIT, PluginSettings, count_cross_attention, with_plugin_nodes
from sfexport.kernels.launch import launch_combine, launch_split
from sfexport.kernels.launch_config import Integers, tiles_for

ATTRIBUTES = ("sm", "ptx_isa", "multiprocessors", "head_dim")
BY_NAME = {operation.name: operation for operation in OPERATIONS}
calls: list[str] = []


def outputs_of(operation: Any, tensors: list[torch.Tensor], attributes: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The launch and poisoned outputs, planned as the plugins plan them."""
    settings = PluginSettings(**{name: attributes[name] for name in ATTRIBUTES})
    shapes = [tuple(t.shape) for t in tensors]
    operation.check_shapes(shapes, settings)
    made = [torch.full(s, float("nan")) for s in operation.output_shapes(Integers(), shapes, settings)]
    calls.append(operation.name)
    return operation.launch(Integers(), shapes, "fp32", settings), made


class CrossAttentionSplit(OpRun):
    op_domain = "sfexport"

    def _run(self, *inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
        tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in inputs]
        launch, (partial, logsumexp) = outputs_of(BY_NAME[SPLIT], tensors, attributes)
        tiles = tiles_for("fp32", attributes["head_dim"], attributes["sm"])
        launch_split(*tensors, partial, logsumexp, launch, tiles)
        return partial.numpy(), logsumexp.numpy()


class CrossAttentionCombine(OpRun):
    op_domain = "sfexport"

    def _run(self, *inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
        tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in inputs]
        launch, (output,) = outputs_of(BY_NAME[COMBINE], tensors, attributes)
        launch_combine(*tensors, output, launch)
        return (output.numpy(),)


def widen_weights(model: onnx.ModelProto) -> None:
    """Turn bfloat16 weights into float32: onnx's evaluator misreads them in its versions before 1.17."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.BFLOAT16:
            bits = np.frombuffer(tensor.raw_data, "<u2").astype(np.uint32) << 16
            values = bits.view(np.float32).reshape(tuple(tensor.dims))
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def main() -> None:
    bundle = Bundle.open(Path(sys.argv[1]))
    config, text = bundle.config, bundle.config.text
    rng = np.random.default_rng(0)
    backend = OnnxRuntimeBackend(bundle.path, bundle.weights_directory, config)
    frames, cells = bundle.frames, bundle.tokens_per_frame(single_image=False)
    _, slow = backend.compress(rng.standard_normal((frames, cells, text.hidden_size)).astype(np.float32))
    sequence = 11
    feeds = {
        names.EMBEDS: rng.standard_normal((1, sequence, text.hidden_size)).astype(np.float32),
        names.POSITIONS: np.arange(sequence, dtype=np.int64)[None],
        names.MASK: np.ones((1, sequence), dtype=bool),
        names.SLOW_ATTENDS: (np.arange(sequence) % 3 > 0)[None],
        names.SLOW_LENGTHS: np.array([slow.length], dtype=np.int64),
    }
    empty = np.zeros((1, text.num_kv_heads, 0, text.head_dim), dtype=np.float32)
    feeds |= dict.fromkeys([*names.prefix_names(config), *names.past_names(config)], empty)
    feeds[names.PAST_LENGTHS] = np.zeros(1, dtype=np.int64)
    feeds |= dict(zip(names.slow_names(config), backend.to_numpy(slow), strict=True))

    model = onnx.load(bundle.graph_file("decoder"))
    widen_weights(model)
    settings = PluginSettings(sm=87, ptx_isa=85, multiprocessors=16, head_dim=text.head_dim)
    sibling = with_plugin_nodes(model, settings)
    evaluator = ReferenceEvaluator(sibling, new_ops=[CrossAttentionSplit, CrossAttentionCombine])
    found = evaluator.run([names.LOGITS], feeds)[0]
    ort = backend._sessions["decoder"].run([names.LOGITS], feeds)[0]
    difference = float(np.abs(found - ort).max() / np.abs(ort).max())
    print(json.dumps({"difference": difference, "calls": calls, "nodes": count_cross_attention(model)}))


if __name__ == "__main__":
    main()
