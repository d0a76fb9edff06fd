"""The kernel on a GPU: the PTX that engines carry, launched as the plugins launch it, and Triton's own compilation.

SFEXPORT_KERNELS names a folder of kernels that another machine compiled for this GPU; otherwise they are compiled here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sfexport.dtypes import PRECISIONS
from sfexport.engines.tensorrt import cuda
from sfexport.engines.tensorrt.plugin_operations import OPERATIONS, KernelSource
from sfexport.errors import SfexportError
from sfexport.graphs.plugin_nodes import PluginSettings
from sfexport.kernels.cases import MASKS, Case, Tensors, make_tensors, reference
from sfexport.kernels.check import LIMITS
from sfexport.kernels.compile import compile_kernels
from sfexport.kernels.launch_config import HEAD_DIMS, SMS, Integers
from sfexport.kernels.store import StoredKernels
from sfexport.machines.targets import kernel_ptx_isa

pytestmark = pytest.mark.gpu
NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def settings() -> PluginSettings:
    """Of this GPU, with heads of 128."""
    try:
        cuda.initialise()
    except SfexportError as error:
        pytest.skip(str(error))
    if (sm := cuda.device_sm()) not in SMS:
        pytest.skip(f"the kernel is not compiled for SM {sm / 10:.1f}")
    attribute = cuda.bindings().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    count = cuda.call("cuDeviceGetAttribute", attribute, cuda.call("cuDeviceGet", 0))
    return PluginSettings(sm=sm, ptx_isa=kernel_ptx_isa(sm), multiprocessors=count, head_dim=128)


@pytest.fixture(scope="module")
def source() -> KernelSource:
    if folder := os.environ.get("SFEXPORT_KERNELS"):
        return StoredKernels(Path(folder))
    pytest.importorskip("triton", reason="the kernel is written in Triton, which is not installed")
    return compile_kernels


def cases() -> list[Case]:
    """Every mask, head size and kind of length, and the 7B model's decoder with 64 frames: prefill and decode."""
    small = Case(2, 2, 7, 9, 515, (515, 77), 128, "mixed", "fp16", 90, 132, 2.0, 1)
    made = [replace(small, mask=mask, seed=i) for i, mask in enumerate(MASKS)]
    made += [replace(small, head_dim=size, group=size // 16, seed=size) for size in HEAD_DIMS]
    made += [replace(small, slow=n, lengths=(n, n // 2), seed=n) for n in (0, 1, 2, 131)]
    large = Case(1, 4, 7, 30, 64 * 81, (64 * 81,), 128, "all", "fp16", 90, 132, 1.0, 3)
    return [*made, large, replace(large, sequence=1), replace(large, sequence=100, mask="visual first")]


def run_as_an_engine(tensors: Tensors, dtype: str, settings: PluginSettings, source: KernelSource) -> np.ndarray:
    """The context that the two plugins leave, in float64."""
    number = NUMPY[dtype]
    arrays = {name: getattr(tensors, name).astype(number) for name in ("query", "key", "value")}
    arrays |= {"attends": tensors.attends.astype(np.int32), "lengths": tensors.lengths}
    stream, pointers = cuda.Stream(), {}
    with ExitStack() as stack:
        stack.callback(stream.close)

        def place(name: str, array: np.ndarray) -> None:
            buffer = cuda.Buffer(array.nbytes)
            stack.callback(buffer.free)
            pointers[name] = buffer.pointer
            if array.nbytes:
                stream.to_device(buffer.pointer, array)

        for name, array in arrays.items():
            place(name, np.ascontiguousarray(array))
        for operation, outputs in zip(OPERATIONS, (("partial", "logsumexp"), ("context",)), strict=True):
            shapes = [arrays[name].shape for name in operation.inputs]
            for name, shape in zip(outputs, operation.output_shapes(Integers(), shapes, settings), strict=True):
                # What no program writes shows as NaN.
                arrays[name] = np.full(shape, np.nan, number if name == "context" else np.float32)
                place(name, arrays[name])
            kernel = operation.kernel(source, dtype, settings)
            function = cuda.Function(kernel.ptx, kernel.name, kernel.threads, kernel.shared)
            launch = operation.launch(Integers(), shapes, dtype, settings)
            given = [pointers[name] for name in operation.inputs]
            function.launch(launch.grid, given, launch.arguments, [pointers[n] for n in outputs], stream.handle)
        stream.to_host(arrays["context"], pointers["context"])
        stream.synchronize()
    return arrays["context"].astype(np.float64)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_compiled_kernel_is_within_its_limits(dtype: str, settings: PluginSettings, source: KernelSource) -> None:
    worst = 0.0
    for case in cases():
        tensors = make_tensors(replace(case, dtype=dtype))
        own = replace(settings, head_dim=case.head_dim)
        found = run_as_an_engine(tensors, dtype, own, source)
        rounded = (x.astype(NUMPY[dtype]).astype(np.float32) for x in (tensors.query, tensors.key, tensors.value))
        expected = reference(Tensors(*rounded, tensors.attends, tensors.lengths))
        assert np.isfinite(found).all(), case
        assert not found[~(tensors.attends & (tensors.lengths > 0)[:, None])].any(), case
        worst = max(worst, float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)))
        assert worst < LIMITS[dtype], case
    print(f"{dtype}: worst relative error {worst:.2e} of {len(cases())} cases")


@pytest.mark.parametrize("arguments", [("--sweep",), ("--seed", "11", "--cases", "200")])
def test_tritons_own_compilation_is_within_its_limits(arguments: tuple[str, ...], settings: PluginSettings) -> None:
    pytest.importorskip("triton", reason="the kernel is written in Triton, which is not installed")
    if not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    command = [sys.executable, "-m", "sfexport.kernels.check", "--gpu", "--json", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    print(f"{report['cases']} cases, worst relative errors {report['worst']}")
    assert report["failed"] == []
