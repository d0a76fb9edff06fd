"""Ahead-of-time compilation for every GPU, without one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfexport.dtypes import PRECISIONS
from sfexport.errors import InputError, SfexportError
from sfexport.kernels.compile import (
    SHARED_LIMIT,
    assemble,
    compile_kernels,
    find_ptxas,
    ptx_version,
    without_scratch,
)
from sfexport.kernels.launch_config import (
    HEAD_DIMS,
    SMS,
    Integers,
    combine_launch,
    combine_outputs,
    split_launch,
    split_outputs,
    tiles_for,
)

triton = pytest.importorskip("triton", reason="the kernel is written in Triton, which is not installed")
# The 7B model's heads for every GPU and type; the small ones, which take fewer resources, for one.
SHIPPED = [(dtype, 128, sm) for sm in SMS for dtype in ("fp16", "bf16")] + [("fp32", 128, 87), ("fp32", 128, 100)]
SHIPPED += [(dtype, d, 87) for dtype in PRECISIONS for d in HEAD_DIMS[:2]]


@pytest.mark.parametrize(("dtype", "head_dim", "sm"), SHIPPED)
def test_compiles_within_the_limits_of_every_gpu(dtype, head_dim, sm):
    isa = 90 if sm >= 100 else 85
    parameters = {"cross_attention_split": 12, "cross_attention_combine": 8}
    for kernel in compile_kernels(dtype, head_dim, sm, isa):
        assert ptx_version(kernel.ptx) == f"{isa / 10:.1f}"
        assert re.search(rf"\.target sm_{sm}a?\b", kernel.ptx)
        assert f".entry {kernel.name}(" in kernel.ptx
        assert len(re.findall(r"\.param \.", kernel.ptx)) == parameters[kernel.name]
        assert ".py" not in kernel.ptx, "a path of this machine"
        ptxas = find_ptxas(sm)
        if ptxas is None:
            pytest.skip("no ptxas here")
        resources = assemble(kernel, ptxas)
        assert resources.spill_stores == resources.spill_loads == 0
        assert kernel.shared + resources.static_shared <= SHARED_LIMIT
        assert resources.registers * kernel.threads <= 65536


def test_scratch_that_is_used_is_refused():
    ptx = ".entry k(\n .param .u64 k_param_0,\n .param .u64 k_param_1\n)\n{ ld.param.b64 %rd1, [k_param_1]; }"
    with pytest.raises(SfexportError, match="scratch"):
        without_scratch(ptx, "k", 1)
    assert "k_param_1" in without_scratch(ptx, "k", 2)


@pytest.mark.parametrize(("dtype", "head_dim", "sm"), [("int8", 128, 87), ("fp16", 80, 87), ("fp16", 128, 72)])
def test_kernels_that_do_not_exist_are_refused(dtype, head_dim, sm):
    with pytest.raises(InputError):
        compile_kernels(dtype, head_dim, sm, 85)


@given(
    batch=st.integers(1, 4),
    kv_heads=st.integers(1, 8),
    group=st.integers(1, 8),
    sequence=st.integers(1, 2000),
    slow=st.integers(0, 130_000),
    multiprocessors=st.integers(1, 200),
    sm=st.sampled_from(SMS),
)
def test_launches_cover_all_rows_and_fill_without_crumbs(batch, kv_heads, group, sequence, slow, multiprocessors, sm):
    tiles = tiles_for("fp16", 128, sm)
    query, key = (batch, kv_heads * group, sequence, 128), (batch, kv_heads, slow, 128)
    split = split_launch(Integers(), query, key, tiles, multiprocessors)
    row_tiles, splits, pairs = split.grid
    assert row_tiles * tiles.rows >= group * sequence > (row_tiles - 1) * tiles.rows
    assert pairs == batch * kv_heads and 1 <= splits <= max(1, -(-slow // 128))
    assert splits == 1 or -(-group * sequence // 64) * splits * pairs <= 2 * multiprocessors
    partial, logsumexp = split_outputs(Integers(), query, key, multiprocessors)
    assert partial == (pairs, splits, group * sequence, 128) and logsumexp == partial[:3]
    combine = combine_launch(Integers(), query, partial)
    assert combine.arguments == (sequence, splits, group)
    assert combine_outputs(Integers(), query) == ((batch, sequence, kv_heads * group * 128),)
