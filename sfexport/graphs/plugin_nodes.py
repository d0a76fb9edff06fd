"""The function-free sibling of a graph: its CrossAttention nodes become the two that TensorRT's plugins implement.

    CrossAttentionSplit    query, key, value, attends, lengths -> partial, logsumexp
    CrossAttentionCombine  query, partial, logsumexp, attends  -> context

`attends` is cast to int32 for them: TensorRT's header says that a plugin's tensors cannot be of type BOOL.

A build with the plugins parses this file, a build without them the graph with the function. So no rule of any TensorRT
version about which of a function and a plugin wins is relied upon.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import onnx

from sfexport.graphs.cross_attention import DOMAIN, OP_TYPE, PLUGIN_ATTRIBUTES

SPLIT, COMBINE = "CrossAttentionSplit", "CrossAttentionCombine"
PLUGIN_NAMESPACE = PLUGIN_ATTRIBUTES["plugin_namespace"]
PLUGIN_VERSION = PLUGIN_ATTRIBUTES["plugin_version"]
PLUGIN_OPS = frozenset({(DOMAIN, SPLIT), (DOMAIN, COMBINE)})


@dataclass(frozen=True)
class PluginSettings:
    """Integer attributes of the plugin nodes, which a kernel is compiled and launched for.

    Attributes:
        sm: compute capability times 10.
        ptx_isa: PTX version times 10.
        multiprocessors: number on the GPU.
    """

    sm: int
    ptx_isa: int
    multiprocessors: int
    head_dim: int


def with_plugin_nodes(model: onnx.ModelProto, settings: PluginSettings) -> onnx.ModelProto:
    """Copy `model` without functions, its CrossAttention nodes replaced. Weights stay where they are."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    del out.functions[:]
    nodes, casts = list(out.graph.node), {}
    del out.graph.node[:]
    for node in nodes:
        if (node.domain, node.op_type) != (DOMAIN, OP_TYPE):
            out.graph.node.append(node)
            continue
        attends = node.input[3]
        if attends not in casts:
            casts[attends] = f"{attends}/int32"
            name = f"{attends}/Cast"
            cast = onnx.helper.make_node("Cast", [attends], [casts[attends]], name=name, to=onnx.TensorProto.INT32)
            out.graph.node.append(cast)
        out.graph.node.extend(_plugin_nodes(node, casts[attends], settings))
    return out


def count_cross_attention(model: onnx.ModelProto) -> int:
    return sum((node.domain, node.op_type) == (DOMAIN, OP_TYPE) for node in model.graph.node)


def _plugin_nodes(node: onnx.NodeProto, attends: str, settings: PluginSettings) -> list[onnx.NodeProto]:
    """Make the two plugin nodes of a CrossAttention node. `attends` is the int32 form of the node's."""
    query, key, value, _, lengths = node.input
    partial, logsumexp = f"{node.name}/partial", f"{node.name}/logsumexp"
    attributes = PLUGIN_ATTRIBUTES | asdict(settings)

    def make(op_type: str, inputs: list[str], outputs: list[str]) -> onnx.NodeProto:
        name = f"{node.name}/{op_type}"
        return onnx.helper.make_node(op_type, inputs, outputs, name=name, domain=DOMAIN, **attributes)

    return [
        make(SPLIT, [query, key, value, attends, lengths], [partial, logsumexp]),
        make(COMBINE, [query, partial, logsumexp, attends], list(node.output)),
    ]
