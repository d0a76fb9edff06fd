"""The vision encoder: pixels -> tower -> projector -> pooling. Mirrors sfexport/model/vision.py and projector.py.

Input   pixel_values        [frames, 3, S, S]
Outputs slow_tokens         [frames, P, H]   k x k pooled: what a video uses
        projected_features  [frames, n, H]   unpooled: what a single image uses

The tower's features are the value named `vision_features` ([frames * n, C]), for tools that look inside.
"""

from __future__ import annotations

import onnx_ir as ir

from sfexport.checkpoint.config import TOWER_PREFIX, ModelConfig, ProjectorConfig
from sfexport.checkpoint.vision_tower import ConvNextTower, Tower
from sfexport.graphs.initializers import Weights
from sfexport.graphs.names import FEATURES, PIXELS, PROJECTED, SLOW_TOKENS
from sfexport.graphs.vit import write_vit
from sfexport.graphs.writer import GraphWriter


def build_vision_encoder(
    config: ModelConfig, tower: Tower, image_size: int, weights: Weights, dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.Model:
    """Build the graph for square frames of `image_size` pixels; the number of frames is dynamic."""
    g = GraphWriter("vision_encoder", weights, dtype)
    pixels = g.input(PIXELS, dtype, ["frames", 3, image_size, image_size])
    side, hidden = tower.grid(image_size), config.text.hidden_size
    features = write_convnext(g, tower, pixels) if isinstance(tower, ConvNextTower) else write_vit(g, tower, pixels)
    features.name = FEATURES
    with g.scope("mm_projector"):
        projected = write_projector(g, config.projector, features)
    cells = side * side
    grid = g.reshape(projected, -1, side, side, hidden)
    pooled, pooled_side = write_pooling(g, grid, config.slow_fast.video_pooling_stride, side)
    slow = g.reshape(pooled, -1, pooled_side**2, hidden)
    g.output(SLOW_TOKENS, slow, dtype, ["frames", pooled_side**2, hidden])
    g.output(PROJECTED, g.reshape(projected, -1, cells, hidden), dtype, ["frames", cells, hidden])
    return g.model()


def write_convnext(g: GraphWriter, tower: ConvNextTower, pixels: ir.Value) -> ir.Value:
    """Write the tower: [frames, 3, S, S] -> features [frames * n, C], row-major over the grid."""
    p, eps = TOWER_PREFIX, tower.layer_norm_eps
    with g.scope("stem"):
        x = _conv(g, pixels, f"{p}stem.0", stride=tower.stem_patch)
        x = _norm_channels(g, x, f"{p}stem.1", eps)
    for s, depth in enumerate(tower.depths):
        with g.scope(f"stages.{s}"):
            if s:
                x = _norm_channels(g, x, f"{p}stages.{s}.downsample.0", eps)
                x = _conv(g, x, f"{p}stages.{s}.downsample.1", stride=2)
            for j in range(depth):
                with g.scope(f"blocks.{j}"):
                    x = _write_block(g, tower, s, x, f"{p}stages.{s}.blocks.{j}.")
    return g.reshape(g.transpose(x, 0, 2, 3, 1), -1, tower.out_size)


def _conv(g: GraphWriter, x: ir.Value, name: str, stride: int) -> ir.Value:
    return g.conv(x, name, strides=[stride, stride], kernel_shape=[stride, stride])


def _norm_channels(g: GraphWriter, x: ir.Value, name: str, eps: float) -> ir.Value:
    return g.transpose(g.layer_norm(g.transpose(x, 0, 2, 3, 1), name, eps), 0, 3, 1, 2)


def _write_block(g: GraphWriter, tower: ConvNextTower, stage: int, x: ir.Value, p: str) -> ir.Value:
    """Write x + weight * mlp(norm(depthwise(x))) on [frames, C, h, w]."""
    width, k = tower.widths[stage], tower.kernel
    y = g.conv(x, f"{p}conv_dw", group=width, kernel_shape=[k, k], pads=[k // 2] * 4)
    y = g.transpose(y, 0, 2, 3, 1)
    shape = g.op("Shape", y)
    y = g.reshape(g.layer_norm(y, f"{p}norm", tower.layer_norm_eps), -1, width)
    y = g.linear(g.gelu(g.linear(y, f"{p}mlp.fc1")), f"{p}mlp.fc2")
    y = g.op("Mul", y, g.weight(f"{p}weight"))
    return g.op("Add", x, g.transpose(g.op("Reshape", y, shape), 0, 3, 1, 2))


def write_projector(g: GraphWriter, config: ProjectorConfig, x: ir.Value) -> ir.Value:
    """Write the projector: [rows, C] -> [rows, H]."""
    if config.kind == "identity":
        return x
    first, *others = config.linear_names()
    x = g.linear(x, first)
    for i, name in enumerate(others):
        x = g.srelu(x, config.srelu_names()[i]) if config.activation == "srelu" else g.gelu(x)
        x = g.linear(x, name)
    return x


def write_pooling(g: GraphWriter, grid: ir.Value, k: int, side: int) -> tuple[ir.Value, int]:
    """Write k x k average pooling of [frames, side, side, H]; odd rows and columns are dropped."""
    if k == 1:
        return grid, side
    pooled = g.average_pool(g.transpose(grid, 0, 3, 1, 2), k)
    return g.transpose(pooled, 0, 2, 3, 1), side // k
