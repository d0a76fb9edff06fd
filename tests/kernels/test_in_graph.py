"""The kernels in the graph they are made for: the demo model's decoder says the same with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.shipped import SHIPPED
from sfexport.engines.tensorrt.plugin_operations import OPERATIONS
from sfexport.exporting.export import ExportOptions, export
from sfexport.graphs.plugin_nodes import PLUGIN_OPS, PluginSettings, count_cross_attention, with_plugin_nodes

pytest.importorskip("triton", reason="the kernel is written in Triton, which is not installed")
pytest.importorskip("torch")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return export(Checkpoint.open(SHIPPED), tmp_path_factory.mktemp("b") / "bundle", ExportOptions())


def test_the_decoder_with_the_kernels_says_what_onnx_runtime_says(bundle):
    script = Path(__file__).parent / "in_graph.py"
    run = subprocess.run([sys.executable, str(script), str(bundle.path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["calls"] == ["CrossAttentionSplit", "CrossAttentionCombine"] * report["nodes"]
    assert report["nodes"] == 2
    assert report["difference"] < 1e-5


def test_the_sibling_has_no_function_and_only_our_two_operations(bundle):
    model = onnx.load(bundle.graph_file("decoder"), load_external_data=False)
    sibling = with_plugin_nodes(model, PluginSettings(sm=87, ptx_isa=85, multiprocessors=16, head_dim=32))
    assert len(model.functions) == 1 and len(sibling.functions) == 0
    ours = {(n.domain, n.op_type) for n in sibling.graph.node if n.domain}
    assert ours == PLUGIN_OPS
    assert list(sibling.graph.output) == list(model.graph.output)
    produced = {name for node in sibling.graph.node for name in node.output}
    given = {v.name for v in sibling.graph.input} | {t.name for t in sibling.graph.initializer}
    assert {name for node in sibling.graph.node for name in node.input if name} <= produced | given


def test_the_plugins_take_no_boolean(bundle):
    """TensorRT's header has neither kBOOL nor kUINT8 for a plugin's tensors; one cast serves all nodes."""
    model = onnx.load(bundle.graph_file("decoder"), load_external_data=False)
    sibling = with_plugin_nodes(model, PluginSettings(sm=87, ptx_isa=85, multiprocessors=16, head_dim=32))
    makers = {name: node for node in sibling.graph.node for name in node.output}
    attending = [node.input[3] for node in sibling.graph.node if node.domain == "sfexport"]
    assert len(attending) == 2 * count_cross_attention(model) and len(set(attending)) == 1
    cast = makers[attending[0]]
    assert cast.op_type == "Cast" and cast.attribute[0].i == onnx.TensorProto.INT32
    assert all("BOOL" not in operation.types and "UINT8" not in operation.types for operation in OPERATIONS)
