"""Building refuses weights that graphs cannot compute with, and names the tensor."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_says, sfexport

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.run import DemoPaths as Tree
from sfexport.dtypes import Precision

NAMES = (
    "model.layers.1.mlp.up_proj.weight",
    "lm_head.weight",
    "model.norm.weight",
    "model.vision_tower.vision_tower.stages.0.blocks.0.mlp.fc1.bias",
)


def plant(tree: Tree, name: str, value: float) -> str:
    """Make the last number of a tensor `value`; the tensor's name."""
    place = Checkpoint.open(tree.checkpoint).tensors[name]
    assert place.dtype == "BF16"
    with place.shard.open("r+b") as shard:
        shard.seek(place.offset + place.length - 2)
        shard.write(Precision.BF16.from_float32(np.float32([value])).tobytes())
    return name


def build(tree: Tree, *options: str):
    return sfexport("build", tree.checkpoint, "-o", tree.root / "new" / "engines", *options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_no_number_is_named(name: str, value: float, tree_copy: Tree) -> None:
    plant(tree_copy, name, value)
    result = build(tree_copy)
    assert result.exit_code == 2
    assert_says(result.stderr, f"Tensor '{name}' in ", "not finite", "get it again")
    assert not (tree_copy.root / "new" / "engines").exists()


@pytest.mark.parametrize("value", [65536.0, -1e30])
def test_a_weight_beyond_float16_is_named_in_float16_only(value: float, tree_copy: Tree) -> None:
    plant(tree_copy, NAMES[2], value)
    result = build(tree_copy, "--precision", "fp16")
    assert result.exit_code == 2
    assert_says(result.stderr, f"Tensor '{NAMES[2]}'", "float16", "--precision bf16 or fp32")
    assert build(tree_copy).exit_code == 0


def test_the_largest_of_float16_are_taken(tree_copy: Tree) -> None:
    """bfloat16's last number that float16 still has, 65280."""
    plant(tree_copy, NAMES[2], 65280.0)
    assert build(tree_copy, "--precision", "fp16").exit_code == 0
