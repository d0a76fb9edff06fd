"""The function-free sibling of a graph: its CrossAttention nodes become the two that TensorRT's plugins implement.

    CrossAttentionSplit    query, key, value, attends, lengths -> partial, logsumexp
    CrossAttentionCombine  query, partial, logsumexp, attends  -> context

A build with the plugins parses this file, a build without them the bundle's own. So no rule of any TensorRT version
about which of a function and a plugin wins is relied upon. Imports onnx.
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
    """What a kernel is compiled and launched for; the nodes' integer attributes.

    Attributes:
        sm: compute capability times 10. ptx_isa: PTX version times 10. multiprocessors: of the GPU.
    """

    sm: int
    ptx_isa: int
    multiprocessors: int
    head_dim: int


def with_plugin_nodes(model: onnx.ModelProto, settings: PluginSettings) -> onnx.ModelProto:
    """A copy of `model` without functions, its CrossAttention nodes replaced. Weights stay where they are."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    del out.functions[:]
    nodes = list(out.graph.node)
    del out.graph.node[:]
    for node in nodes:
        is_ours = (node.domain, node.op_type) == (DOMAIN, OP_TYPE)
        out.graph.node.extend(_plugin_nodes(node, settings) if is_ours else [node])
    return out


def count_cross_attention(model: onnx.ModelProto) -> int:
    return sum((node.domain, node.op_type) == (DOMAIN, OP_TYPE) for node in model.graph.node)


def _plugin_nodes(node: onnx.NodeProto, settings: PluginSettings) -> list[onnx.NodeProto]:
    query, key, value, attends, lengths = node.input
    partial, logsumexp = f"{node.name}/partial", f"{node.name}/logsumexp"
    attributes = PLUGIN_ATTRIBUTES | asdict(settings)

    def make(op_type: str, inputs: list[str], outputs: list[str]) -> onnx.NodeProto:
        name = f"{node.name}/{op_type}"
        return onnx.helper.make_node(op_type, inputs, outputs, name=name, domain=DOMAIN, **attributes)

    return [
        make(SPLIT, [query, key, value, attends, lengths], [partial, logsumexp]),
        make(COMBINE, [query, partial, logsumexp, attends], list(node.output)),
    ]
