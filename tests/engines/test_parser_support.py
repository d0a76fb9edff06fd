"""The table of what TensorRT's ONNX parser takes, and what the check finds: nothing in our graphs, all planted gaps."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.vision_tower import VitTower
from sfexport.demo.shipped import SHIPPED
from sfexport.dtypes import Precision
from sfexport.engines.tensorrt.parser_support import Gap, check_graph, support_for
from sfexport.errors import InputError
from sfexport.exporting.export import build_graphs
from sfexport.testing.random_checkpoint import TOWER, write_random_checkpoint

VERSIONS = ["10.3", "10.9", "10.13", "10.16", "11.4"]
ROWS = [*VERSIONS, "10.4", "10.5", "10.6", "10.7", "10.8", "10.11", "10.12", "10.14", "10.15", "11.0", "11.2", "11.5"]
OURS = frozenset({("sfexport", "CrossAttention")})
CLIP = VitTower("clip", 64, 3, 2, 96, 14, 56, -2, 1e-5, "quick_gelu")
SIGLIP = VitTower("siglip", 48, 3, 3, 64, 14, 70, -2, 1e-6, "gelu_tanh")
VARIANTS = {
    "clip": (CLIP, {"mm_vision_tower": "openai/clip-vit-x", "mm_vision_num_attention_heads": CLIP.num_heads}),
    "siglip": (SIGLIP, {"mm_vision_tower": "google/siglip-x", "mm_vision_num_attention_heads": SIGLIP.num_heads}),
    "srelu projector": (TOWER, {"mm_projector_type": "mlp2x_srelu"}),
    "pooled in space": (TOWER, {"fast_token_spatial_stride": 2, "mm_video_pooling_stride": 1}),
    "no slow branch, tied embeddings": (TOWER, {"cross_attn_every_n_layers": None, "tie_word_embeddings": True}),
    "every layer hybrid": (TOWER, {"cross_attn_every_n_layers": 1, "cross_attn_gating_type": "whole-dynamic"}),
}
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
CONV = {"w": (3, 2, 3, 3), "b": (3,)}  # kernel and bias


def protos(checkpoint: Path, precision: str = "fp32") -> dict[str, onnx.ModelProto]:
    graphs = build_graphs(Checkpoint.open(checkpoint), precision)
    return {name: ir.to_proto(build()) for name, build in graphs.items()}


@pytest.fixture(scope="module")
def shipped() -> dict[str, onnx.ModelProto]:
    """The demo model's graphs; read only."""
    return protos(SHIPPED)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_demo_models_graphs_have_no_gap(shipped: dict[str, onnx.ModelProto], version: str) -> None:
    for name, model in shipped.items():
        assert check_graph(model, name, support_for(version)) == []
        assert check_graph(model, name, support_for(version), OURS) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_checkpoint_in_every_precision_has_no_gap(variant: str, precision: str, tmp_path: Path) -> None:
    tower, changes = VARIANTS[variant]
    write_random_checkpoint(tmp_path / "checkpoint", tower=tower, changes=changes)
    for name, model in protos(tmp_path / "checkpoint", precision).items():
        for version in ("10.3", "11.4"):
            assert check_graph(model, name, support_for(version)) == []


def test_a_file_without_functions_needs_the_plugin(shipped: dict[str, onnx.ModelProto]) -> None:
    """The sibling for parsers that would take the body: types behind the plugin's nodes are known all the same."""
    model = onnx.ModelProto()
    model.CopyFrom(shipped["decoder"])
    calls = [node for node in model.graph.node if node.op_type == "CrossAttention"]
    del model.functions[:]
    assert check_graph(model, "decoder", support_for("10.3"), OURS) == []
    gaps = check_graph(model, "decoder", support_for("10.3"))
    unknown = [gap for gap in gaps if gap.op_type == "CrossAttention"]
    assert [gap.node for gap in unknown] == [node.name for node in calls]
    assert "domain 'sfexport'" in unknown[0].problem


def test_a_plugins_node_without_its_attributes_is_found(shipped: dict[str, onnx.ModelProto]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(shipped["decoder"])
    node = next(node for node in model.graph.node if node.op_type == "CrossAttention")
    kept = [attribute for attribute in node.attribute if attribute.name != "plugin_version"]
    del node.attribute[:]
    node.attribute.extend(kept)
    (gap,) = check_graph(model, "decoder", support_for("10.3"), OURS)
    assert (gap.node, gap.op_type) == (node.name, "CrossAttention")
    assert "plugin_version" in gap.problem


def test_a_type_inside_a_function_is_found_with_the_calls_name(shipped: dict[str, onnx.ModelProto]) -> None:
    """A graph with other inputs changes the types inside the function it calls."""
    model = onnx.ModelProto()
    model.CopyFrom(shipped["decoder"])
    for constant in model.functions[0].node:
        if constant.op_type == "Softmax":
            constant.op_type = "Hardmax2"
    calls = [node.name for node in model.graph.node if node.op_type == "CrossAttention"]
    gaps = [gap for gap in check_graph(model, "decoder", support_for("10.3")) if gap.op_type == "Hardmax2"]
    assert [gap.node.split(":")[0] for gap in gaps] == calls
    assert check_graph(model, "decoder", support_for("10.3"), OURS) == []


# Planted gaps: a graph of a few nodes, of which the one named "planted" is wrong.


def value(name: str, dtype: int = FLOAT, shape: tuple[int | str, ...] = (2, 4)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def planted(op_type: str, inputs: list[str], outputs: list[str] | None = None, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, outputs or ["y"], name="planted", **attributes)


def graph(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initializers: tuple[onnx.TensorProto, ...] = (),
    opset: int = 18,
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:
    made = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("custom", 1)]
    return helper.make_model(made, opset_imports=opsets, functions=functions, ir_version=8 if opset < 21 else 10)


def gaps(model: onnx.ModelProto, version: str = "10.3", plugins: frozenset[tuple[str, str]] = frozenset()) -> list[Gap]:
    return check_graph(model, "graph", support_for(version), plugins)


def assert_planted(model: onnx.ModelProto, *parts: str, version: str = "10.3") -> None:
    """One gap, of the node called 'planted', that says all parts."""
    (gap,) = gaps(model, version)
    assert (gap.graph, gap.node) == ("graph", "planted")
    assert gap.op_type == next(node.op_type for node in model.graph.node if node.name == "planted")
    for part in parts:
        assert part in str(gap), (part, str(gap))


def test_an_operator_the_parser_does_not_have() -> None:
    model = graph([planted("Det", ["x"])], [value("x", shape=(4, 4))], [value("y", shape=())])
    for version in VERSIONS:
        assert_planted(model, "Det", f"TensorRT {version}", version=version)


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < 23, reason="this onnx has no RMSNormalization")
def test_an_operator_of_a_later_version_says_since_when() -> None:
    nodes = [planted("RMSNormalization", ["x", "weight"])]
    model = graph(nodes, [value("x"), value("weight", shape=(4,))], [value("y")], opset=23)
    assert_planted(model, "RMSNormalization", "TensorRT 10.15 and later", version="10.13")
    assert gaps(model, "10.16") == []


def test_float64_in_a_product() -> None:
    shapes = {"a": (2, 4), "b": (4, 3)}
    nodes = [helper.make_node("Cast", [n], [f"{n}64"], name=f"cast {n}", to=TensorProto.DOUBLE) for n in shapes]
    nodes.append(planted("MatMul", ["a64", "b64"], ["y64"]))
    nodes.append(helper.make_node("Cast", ["y64"], ["y"], name="cast y", to=FLOAT))
    model = graph(nodes, [value(n, shape=shape) for n, shape in shapes.items()], [value("y", shape=(2, 3))])
    found = {gap.node: gap for gap in gaps(model)}
    assert list(found) == ["cast a", "cast b", "planted", "cast y"]
    assert found["planted"].op_type == "MatMul"
    assert "'a64' is DOUBLE" in found["planted"].problem
    assert "float32" in found["planted"].hint


def test_uint8_in_a_sum() -> None:
    inputs = [value("a", TensorProto.UINT8), value("b", TensorProto.UINT8)]
    model = graph([planted("Add", ["a", "b"])], inputs, [value("y", TensorProto.UINT8)])
    assert_planted(model, "'a' is UINT8", "FP32")


def test_uint8_is_for_a_graphs_inputs_and_outputs() -> None:
    casts = [
        helper.make_node("Cast", ["x"], ["f"], to=FLOAT),
        helper.make_node("Cast", ["f"], ["y"], to=TensorProto.UINT8),
    ]
    edges = [value("x", TensorProto.UINT8)], [value("y", TensorProto.UINT8)]
    assert gaps(graph(casts, *edges)) == []
    inside = [
        planted("Cast", ["x"], ["u"], to=TensorProto.UINT8),
        helper.make_node("Cast", ["u"], ["y"], name="behind", to=FLOAT),
    ]
    found = gaps(graph(inside, [value("x")], [value("y")]))
    assert [gap.node for gap in found] == ["planted", "behind"]
    assert "'u' is UINT8" in found[0].problem


@pytest.mark.parametrize("kind", ["input", "output"])
def test_float64_at_the_graphs_edge(kind: str) -> None:
    x, y = (value(n, TensorProto.DOUBLE if k == kind else FLOAT) for n, k in (("x", "input"), ("y", "output")))
    found = gaps(graph([planted("Cast", ["x"], to=TensorProto.DOUBLE if kind == "output" else FLOAT)], [x], [y]))
    assert (found[0].node, found[0].op_type) == ("", "")
    assert kind in found[0].problem and "DOUBLE" in found[0].problem
    assert [gap.node for gap in found[1:]] == ["planted"]


def test_an_opset_that_is_too_high() -> None:
    model = graph([planted("Relu", ["x"])], [value("x")], [value("y")], opset=21)
    (gap,) = gaps(model, "10.3")
    assert gap.node == "" and "opset 21" in gap.problem and "20" in gap.problem
    assert gaps(model, "10.6") == []
    assert len(gaps(graph([planted("Relu", ["x"])], [value("x")], [value("y")], opset=25), "11.4")) == 1


def test_a_domain_that_nobody_computes() -> None:
    node = planted("Fancy", ["x"], domain="custom", plugin_namespace="custom", plugin_version="1")
    model = graph([node, helper.make_node("Relu", ["y"], ["z"], name="behind")], [value("x")], [value("z")])
    found = gaps(model)
    assert [gap.node for gap in found] == ["planted", "behind"]  # without it, nobody knows what Relu is given
    assert "'custom'" in found[0].problem and "cannot be inferred" in found[1].problem
    assert gaps(model, plugins=frozenset({("custom", "Fancy")})) == []


def int4_model(block: int, zero_point: int | None = None, width: int = 8) -> onnx.ModelProto:
    """Weights of 256 rows in blocks along the rows, times an input."""
    weights = helper.make_tensor("w", TensorProto.INT4, (256, width), bytes(256 * width // 2), raw=True)
    rows = 256 // block if block else 1
    scales = helper.make_tensor("s", FLOAT, (rows, width) if block else (), [1.0] * (rows * width if block else 1))
    initializers, names = [weights, scales], ["w", "s"]
    if zero_point is not None:
        filled = bytes([zero_point]) * (rows * width // 2)
        initializers.append(helper.make_tensor("z", TensorProto.INT4, (rows, width), filled, raw=True))
        names.append("z")
    attributes = {"block_size": block, "axis": 0} if block else {}
    nodes = [planted("DequantizeLinear", names, ["f"], **attributes), helper.make_node("MatMul", ["x", "f"], ["y"])]
    return graph(nodes, [value("x", shape=("rows", 256))], [value("y", shape=("rows", width))], tuple(initializers), 21)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("block", [64, 128])
def test_int4_weights_in_blocks_of_64_and_128(block: int, version: str) -> None:
    """At opset 21 even where the page ends at 20: ONNX has INT4 from there on, and the parser takes it."""
    assert gaps(int4_model(block), version) == []
    assert gaps(int4_model(block, zero_point=0), version) == []


def test_int4_weights_that_tensorrt_does_not_take() -> None:
    assert_planted(int4_model(32), "blocks of 32", "64 or 128")
    assert_planted(int4_model(0), "without blocks")
    assert_planted(int4_model(64, zero_point=0x11), "zero point 'z'")
    assert_planted(int4_model(64, width=7), "odd")


def test_a_dequantized_input_of_another_type() -> None:
    scale = helper.make_tensor("s", FLOAT, (), [1.0])
    model = graph([planted("DequantizeLinear", ["x", "s"])], [value("x", TensorProto.UINT8)], [value("y")], (scale,))
    assert_planted(model, "'x' is UINT8", "INT4")


def test_axes_that_are_computed() -> None:
    nodes = [helper.make_node("Shape", ["v"], ["axes"]), planted("ReduceMean", ["x", "axes"])]
    inputs = [value("x"), value("v", shape=(1,))]
    model = graph(nodes, inputs, [value("y", shape=())])
    for version in VERSIONS:
        assert_planted(model, "'axes' is computed", version=version)
    nodes = [helper.make_node("Shape", ["v"], ["axes"]), planted("Unsqueeze", ["x", "axes"])]
    model = graph(nodes, inputs, [value("y", shape=(1, 1, 1))])
    assert_planted(model, "'axes' is computed", version="10.6")
    assert gaps(model, "10.7") == []


def test_ranks_attributes_and_outputs_that_are_not_taken() -> None:
    x, y = value("x", shape=(2, 3, 4)), value("y", shape=(2, 3, 4))
    w = value("w", shape=(4, 4))
    nodes = [planted("Gemm", ["x", "w"])]
    assert_planted(graph(nodes, [x, w], [y]), "'x' has rank 3", "wants 2")
    image = value("i", shape=(1, 3, 8, 8))
    nodes = [planted("AveragePool", ["i"], kernel_shape=[2, 2], dilations=[1, 2])]
    assert_planted(graph(nodes, [image], [value("y", shape=(1, 3, 7, 6))], opset=19), "'dilations'", "only 1")
    nodes = [planted("LayerNormalization", ["x", "v"], ["y", "mean"])]
    outputs = [y, value("mean", shape=(2, 3, 1))]
    assert_planted(graph(nodes, [x, value("v", shape=(4,))], outputs), "more outputs")
    nodes = [planted("Constant", [], value_string="text")]
    assert "no such attribute" in " ".join(map(str, gaps(graph(nodes, [], [value("y", TensorProto.STRING, ())]))))


def test_a_convolution_whose_kernel_or_bias_is_computed_must_say_its_size() -> None:
    image, y = value("i", shape=(1, 2, 8, 8)), value("y", shape=(1, 3, 6, 6))
    halves = tuple(helper.make_tensor(n, TensorProto.FLOAT16, s, [1.0] * math.prod(s)) for n, s in CONV.items())
    plain = tuple(helper.make_tensor(n, FLOAT, s, [1.0] * math.prod(s)) for n, s in CONV.items())
    casts = [helper.make_node("Cast", [n], [f"{n}.cast"], name=n, to=FLOAT) for n in CONV]
    for inputs in (["i", "w.cast", "b.cast"], ["i", "w.cast"]):
        bare = graph([*casts, planted("Conv", inputs)], [image], [y], halves)
        assert_planted(bare, "'w.cast' is computed", "'kernel_shape'")
        assert gaps(bare, "11.4") == []
        sized = graph([*casts, planted("Conv", inputs, kernel_shape=[3, 3])], [image], [y], halves)
        assert gaps(sized) == []
    bias = graph([*casts[1:], planted("Conv", ["i", "w", "b.cast"])], [image], [y], (plain[0], halves[1]))
    assert_planted(bias, "'b.cast' is computed")
    assert gaps(graph([planted("Conv", ["i", "w", "b"])], [image], [y], plain)) == []


@pytest.mark.parametrize("key", ["checksum", "digest"])
def test_keys_of_external_data_that_the_parser_does_not_know(key: str) -> None:
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[2, 4], data_location=TensorProto.EXTERNAL)
    for name, text in (("location", "w.bin"), ("offset", "0"), ("length", "32"), (key, "x")):
        tensor.external_data.add(key=name, value=text)
    found = gaps(graph([planted("Add", ["x", "w"])], [value("x")], [value("y")], (tensor,)))
    assert [gap.node for gap in found] == ([] if key == "checksum" else [""])
    assert all("'w' has the key 'digest'" in gap.problem for gap in found)


def quantized(dtype: int, scales: list[float], scale_type: int = FLOAT) -> onnx.ModelProto:
    """64 x 4 weights, INT8 or in one INT4 block, with a scale per column."""
    is_int4 = dtype == TensorProto.INT4
    weights = helper.make_tensor("w", dtype, (64, 4), bytes(128 if is_int4 else 256), raw=True)
    scale = helper.make_tensor("s", scale_type, (1, 4) if is_int4 else (4,), scales)
    attributes = {"axis": 0, "block_size": 64} if is_int4 else {"axis": 1}
    nodes = [planted("DequantizeLinear", ["w", "s"], ["y"], **attributes)]
    return graph(nodes, [], [value("y", scale_type, (64, 4))], (weights, scale), 21 if is_int4 else 19)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [TensorProto.INT4, TensorProto.INT8])
@pytest.mark.parametrize("scale_type", [FLOAT, TensorProto.FLOAT16])
def test_scales_that_are_not_positive_numbers(scale_type: int, dtype: int, bad: float) -> None:
    assert gaps(quantized(dtype, [1.0, 2.0, 3.0, 4.0], scale_type)) == []
    assert_planted(quantized(dtype, [1.0, 2.0, bad, 4.0], scale_type), "'s'", "not positive")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_scales_that_lie_in_a_file(kind: str, tmp_path: Path) -> None:
    """Read where the weights' directory is known."""
    number = {"F32": FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}[kind]
    model = quantized(TensorProto.INT4, [1.0] * 4)
    scale = model.graph.initializer[1]
    scale.CopyFrom(TensorProto(name="s", data_type=number, dims=[1, 4], data_location=TensorProto.EXTERNAL))
    for name, text in (("location", "weights"), ("offset", "8"), ("length", "16")):
        scale.external_data.add(key=name, value=text)
    model.graph.output[0].type.tensor_type.elem_type = number
    for wrong in (False, True):
        values = np.array([1.0, 2.0, 0.0 if wrong else 3.0, 4.0], np.float32)
        (tmp_path / "weights").write_bytes(bytes(8) + Precision.from_safetensors(kind).from_float32(values).tobytes())
        found = check_graph(model, "graph", support_for("10.3"), weights=tmp_path)
        assert [gap.node for gap in found] == (["planted"] if wrong else [])
        assert gaps(model) == [], "not looked at without the directory"
    (tmp_path / "weights").unlink()
    assert check_graph(model, "graph", support_for("10.3"), weights=tmp_path) == []


@pytest.mark.parametrize("op_type", ["Mul", "Add", "MatMul", "Gemm", "Concat", "Max", "Equal", "PRelu"])
def test_two_types_in_one_operation(op_type: str) -> None:
    """The parser adds no cast: 'must have same input types'."""
    half = TensorProto.FLOAT16
    for other in (FLOAT, half):
        weights = helper.make_tensor("w", other, (4, 4), [1.0] * 16)
        node = planted(op_type, ["x", "w"], **({"axis": 0} if op_type == "Concat" else {}))
        out = value("y", TensorProto.BOOL if op_type == "Equal" else half, None)
        model = graph([node], [value("x", half, (4, 4))], [out], (weights,))
        if other == half:
            assert gaps(model) == []
        else:
            assert_planted(model, "'x' and 'w'", "FP16 and FP32", "Cast")


def test_two_types_where_onnx_allows_them() -> None:
    half = TensorProto.FLOAT16
    exponent, index = helper.make_tensor("e", FLOAT, (), [2.0]), helper.make_tensor("i", INT64, (1,), [1])
    nodes = [helper.make_node("Pow", ["x", "e"], ["p"]), planted("Gather", ["p", "i"], axis=1)]
    assert gaps(graph(nodes, [value("x", half)], [value("y", half, (2, 1))], (exponent, index))) == []
    where = graph([planted("Where", ["c", "x", "w"])], [value("c", TensorProto.BOOL), value("x", half), value("w")], [])
    where.graph.output.append(value("y", half))
    assert_planted(where, "'x' and 'w'", "FP16 and FP32")


@pytest.mark.parametrize("op_type", ["Gather", "GatherElements"])
def test_a_negative_index_on_a_dynamic_axis(op_type: str) -> None:
    dims = (1, 1) if op_type == "GatherElements" else (1,)
    index = helper.make_tensor("i", INT64, dims, [-1])
    constant = helper.make_node("Constant", [], ["i"], value=index)
    for nodes, stored in (([], (index,)), ([constant], ())):
        node = planted(op_type, ["x", "i"], axis=1)
        dynamic = graph([*nodes, node], [value("x", shape=(1, "s"))], [value("y", shape=(1, 1))], stored)
        assert_planted(dynamic, "'i' is negative", "Slice")
        fixed = graph([*nodes, node], [value("x", shape=(1, 4))], [value("y", shape=(1, 1))], stored)
        assert gaps(fixed) == []
    first = helper.make_tensor("i", INT64, dims, [0])
    node = planted(op_type, ["x", "i"], axis=-1)
    assert gaps(graph([node], [value("x", shape=(1, "s"))], [value("y", shape=(1, 1))], (first,))) == []


def test_a_type_in_a_subgraph() -> None:
    branch = [
        helper.make_graph([helper.make_node("Identity", ["x"], ["a"])], "then", [], [value("a")]),
        helper.make_graph([helper.make_node("Det", ["x"], ["b"], name="inside")], "else", [], [value("b", shape=())]),
    ]
    node = planted("If", ["c"], then_branch=branch[0], else_branch=branch[1])
    model = graph([node], [value("c", TensorProto.BOOL, ()), value("x", shape=(4, 4))], [value("y", shape=None)])
    assert [(gap.node, gap.op_type) for gap in gaps(model)] == [("inside", "Det")]


def function(*formals: str) -> onnx.FunctionProto:
    node = helper.make_node("Add", list(formals), ["sum"], name="inner")
    return helper.make_function("custom", "Twice", formals, ["sum"], [node], [helper.make_opsetid("", 18)])


def test_a_functions_input_called_like_a_tensor_outside() -> None:
    inputs = [value("x"), value("p"), value("q")]
    relu = helper.make_node("Relu", ["x"], ["z"])
    call = planted("Twice", ["p", "q"], domain="custom")
    outputs = [value("y"), value("z")]
    shadowing = graph([relu, call], inputs, outputs, functions=(function("x", "b"),))
    assert_planted(shadowing, "'x'", "Rename", version="10.7")
    assert gaps(shadowing, "10.8") == []
    assert gaps(graph([relu, call], inputs, outputs, functions=(function("a", "b"),)), "10.7") == []


def test_a_functions_nodes_have_the_types_of_the_call() -> None:
    inputs = [value("p", TensorProto.UINT8), value("q", TensorProto.UINT8)]
    call = planted("Twice", ["p", "q"], domain="custom")
    model = graph([call], inputs, [value("y", TensorProto.UINT8)], functions=(function("a", "b"),))
    (gap,) = gaps(model)
    assert gap.node.startswith("planted: ") and gap.op_type == "Add"
    assert "'p' is UINT8" in gap.problem


@pytest.mark.parametrize("version", ROWS)
def test_each_row_says_where_it_comes_from_and_keeps_what_was_there_before(version: str) -> None:
    support = support_for(version)
    assert support.row == version
    assert re.search(r"\(?20\d\d-\d\d-\d\d\)?", support.source), "no date"
    assert support.inferred or "page" in support.source and f"onnx-tensorrt {version}-GA" in support.source
    assert support_for("10.3").operators.keys() <= support.operators.keys()
    assert support_for("10.3").opset <= support.opset <= support.int4_opset
    assert all(
        types and types <= support.tensors | support.quantized | {"UINT8"} for types in support.operators.values()
    )
    assert support.limits.keys() <= support.operators.keys()


def test_the_table_names_operators_inputs_and_attributes_that_onnx_has() -> None:
    """But for three operators that only its first versions had."""
    names = {name for version in ROWS for name in support_for(version).operators}
    schemas = {name: onnx.defs.get_schema(name) for name in names if onnx.defs.has(name)}
    assert support_for("10.3").operators.keys() - schemas.keys() == {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}
    for row in map(support_for, ROWS):
        for name, limits in row.limits.items():
            assert limits.keys() <= {"constant", "computed", "rank", "inputs", "outputs", "attributes"}
            if schema := schemas.get(name):
                inputs = [
                    *limits.get("constant", []),
                    *map(int, [*limits.get("rank", []), *limits.get("computed", [])]),
                ]
                assert all(i < schema.max_input for i in inputs), name
                assert set(limits.get("computed", {}).values()) <= schema.attributes.keys()
                assert limits.get("attributes", {}).keys() <= schema.attributes.keys()
        for name, variable in row.subjects.items():
            assert variable in {p.type_str for p in (*schemas[name].inputs, *schemas[name].outputs)}


def test_versions_between_rows_and_beyond() -> None:
    rows = {"10.3.0.26": "10.3", "10.10.0": "10.9", "v10.13.3": "10.13", "10.16.2": "10.16", "11.4.1": "11.4"}
    assert {version: support_for(version).row for version in rows} == rows
    assert support_for("10.10.0").version == "10.10"
    assert support_for("12.0").row == ROWS[-1]


@pytest.mark.parametrize(("version", "says"), [("8.6.2", "10.3"), ("10.2", "10.3"), ("ten", "'ten'"), ("", "''")])
def test_versions_that_are_refused(version: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        support_for(version)
    assert version in str(error.value) and says in error.value.paragraph()
