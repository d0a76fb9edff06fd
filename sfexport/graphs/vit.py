"""CLIP's and SigLIP's vision transformers as ONNX nodes, cut at the selected layer. Mirrors model/vision.py's Vit."""

from __future__ import annotations

import math

import onnx_ir as ir

from sfexport.checkpoint.tower_names import VIT_PREFIX
from sfexport.checkpoint.vision_tower import VitTower
from sfexport.graphs.writer import GraphWriter


def write_vit(g: GraphWriter, tower: VitTower, pixels: ir.Value) -> ir.Value:
    """Write the tower: pixels [frames, 3, S, S] -> features [frames * n, C]."""
    p, cells = VIT_PREFIX, tower.grid(tower.image_size) ** 2
    with g.scope("embeddings"):
        x = _embed(g, tower, pixels)
    tokens = cells + (tower.kind == "clip")
    x = g.reshape(x, -1, tower.width)
    if tower.kind == "clip":
        x = g.layer_norm(x, f"{p}pre_layrnorm", tower.layer_norm_eps)
    for i in range(tower.num_layers_used):
        with g.scope(f"layers.{i}"):
            x = _write_layer(g, tower, x, tokens, f"{p}encoder.layers.{i}.")
    if tower.kind == "clip":
        x = g.op("Slice", g.reshape(x, -1, tokens, tower.width), g.ints(1), g.ints(tokens), g.ints(1))
        x = g.reshape(x, -1, tower.width)
    return x


def _embed(g: GraphWriter, tower: VitTower, pixels: ir.Value) -> ir.Value:
    """Write patches, class token (CLIP) and positions: [frames, tokens, C]."""
    p, k = VIT_PREFIX + "embeddings.", tower.patch
    has_bias = tower.kind == "siglip"
    x = g.conv(pixels, f"{p}patch_embedding", has_bias, kernel_shape=[k, k], strides=[k, k])
    x = g.transpose(g.reshape(x, 0, tower.width, -1), 0, 2, 1)
    if tower.kind == "clip":
        shape = g.op("Concat", g.dims(pixels, 0, 1), g.ints(1, tower.width), axis=0)
        x = g.op("Concat", g.op("Expand", g.weight(f"{p}class_embedding"), shape), x, axis=1)
    return g.op("Add", x, g.weight(f"{p}position_embedding.weight"))


def _write_layer(g: GraphWriter, tower: VitTower, x: ir.Value, tokens: int, p: str) -> ir.Value:
    """Write pre-norm attention and MLP on [frames * tokens, C]."""
    y = g.layer_norm(x, f"{p}layer_norm1", tower.layer_norm_eps)
    x = g.op("Add", x, _attention(g, tower, y, tokens, f"{p}self_attn."))
    y = g.layer_norm(x, f"{p}layer_norm2", tower.layer_norm_eps)
    y = g.linear(y, f"{p}mlp.fc1")
    y = _quick_gelu(g, y) if tower.activation == "quick_gelu" else g.gelu_tanh(y)
    return g.op("Add", x, g.linear(y, f"{p}mlp.fc2"))


def _attention(g: GraphWriter, tower: VitTower, x: ir.Value, tokens: int, p: str) -> ir.Value:
    heads, dim = tower.num_heads, tower.width // tower.num_heads

    def project(name: str, *perm: int) -> ir.Value:
        return g.transpose(g.reshape(g.linear(x, f"{p}{name}"), -1, tokens, heads, dim), *perm)

    query = g.op("Mul", project("q_proj", 0, 2, 1, 3), g.scalar(1 / math.sqrt(dim)))
    scores = g.to_float32(g.op("MatMul", query, project("k_proj", 0, 2, 3, 1)))
    probabilities = g.from_float32(g.op("Softmax", scores, axis=-1))
    context = g.op("MatMul", probabilities, project("v_proj", 0, 2, 1, 3))
    return g.linear(g.reshape(g.transpose(context, 0, 2, 1, 3), -1, tower.width), f"{p}out_proj")


def _quick_gelu(g: GraphWriter, x: ir.Value) -> ir.Value:
    """Write CLIP's activation, x * sigmoid(1.702 x)."""
    return g.op("Mul", x, g.op("Sigmoid", g.op("Mul", x, g.scalar(1.702))))
