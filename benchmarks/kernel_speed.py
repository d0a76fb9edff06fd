"""Speed of the cross-attention kernel on a GPU: `python benchmarks/kernel_speed.py --json out.json`.

For the 7B model's shapes (28 heads, 4 kv heads, 128 elements, 81 slow tokens per frame): 64 to 1,536 frames, prefill
of 30 and 100 positions and one decode step, in one run against torch's scaled_dot_product_attention (flash backend) on
the same tensors, and against the floor: the larger of bytes over this GPU's measured bandwidth and operations over its
measured rate. Inputs rotate among several sets, so that the cache does not hold them. Checks every result against
float64 first. Needs torch with CUDA and triton; prints a line per shape and ends with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

FRAMES, POSITIONS = (64, 96, 128, 1536), (1, 30, 100)
HEADS, KV_HEADS, HEAD_DIM, TOKENS_PER_FRAME = 28, 4, 128, 81
CACHE_BYTES = 256 << 20  # more than any GPU's L2: as many input sets are rotated as pass it


@dataclass(frozen=True)
class Result:
    """Milliseconds, medians. `floor` is the least that this GPU's measured ceilings allow."""

    frames: int
    positions: int
    dtype: str
    error: float
    ours: float
    torch_flash: float
    floor: float


def bytes_moved(positions: int, slow: int, width: int) -> int:
    """Every input read once, the output written once."""
    query_and_output = 2 * HEADS * positions * HEAD_DIM
    return width * (query_and_output + 2 * KV_HEADS * slow * HEAD_DIM)


def operations(positions: int, slow: int) -> int:
    """Two products, two operations per multiply-add."""
    return 4 * HEADS * positions * slow * HEAD_DIM


def measure_ceilings(torch: Any, dtype: Any) -> tuple[float, float]:
    """Bytes per second of a large copy (read plus written) and operations per second of a large product."""
    source = torch.randn(1 << 28, device="cuda", dtype=dtype)
    target = torch.empty_like(source)
    copy = time_calls(torch, [lambda: target.copy_(source)])
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    product = time_calls(torch, [lambda: a @ b])
    return 2 * source.nbytes / copy * 1e3, 2 * 8192**3 / product * 1e3


def time_calls(torch: Any, calls: list[Any], repeats: int = 100) -> float:
    """Median milliseconds of a call, with device events; calls of the list take turns."""
    turn = cycle(calls)
    for _ in range(10):
        next(turn)()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        next(turn)()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def graphed(torch: Any, call: Any) -> Any:
    """The call as a CUDA graph: both sides are then free of launch gaps."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def run_shape(torch: Any, frames: int, positions: int, dtype: str, ceilings: tuple[float, float]) -> Result:
    import numpy as np
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from sfexport.kernels.cases import Tensors, reference
    from sfexport.kernels.launch import cross_attention
    from sfexport.kernels.launch_config import tiles_for

    properties = torch.cuda.get_device_properties(0)
    slow, kind = frames * TOKENS_PER_FRAME, {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    tiles = tiles_for(dtype, HEAD_DIM, 10 * properties.major + properties.minor)
    sets = max(2, CACHE_BYTES // bytes_moved(positions, slow, 2) + 1)

    def make() -> tuple[Any, ...]:
        query = torch.randn(1, HEADS, positions, HEAD_DIM, device="cuda", dtype=kind) * HEAD_DIM**-0.5
        key, value = (torch.randn(1, KV_HEADS, slow, HEAD_DIM, device="cuda", dtype=kind) for _ in range(2))
        attends = torch.ones(1, positions, device="cuda", dtype=torch.int32)
        return query, key, value, attends, torch.tensor([slow], device="cuda")

    inputs = [make() for _ in range(sets)]
    count = properties.multi_processor_count

    def ours(i: tuple[Any, ...]) -> Any:
        return cross_attention(*i, tiles, count, poison=False)

    def flash(i: tuple[Any, ...]) -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*i[:3], scale=1.0, enable_gqa=True)

    first = [x.float().cpu().numpy() if x.is_floating_point() else x.cpu().numpy() for x in inputs[0]]
    expected = reference(Tensors(*first))
    error = np.linalg.norm(ours(inputs[0]).double().cpu().numpy() - expected) / np.linalg.norm(expected)
    bandwidth, rate = ceilings
    floor = max(bytes_moved(positions, slow, 2) / bandwidth, operations(positions, slow) / rate) * 1e3
    timed = [time_calls(torch, [graphed(torch, partial(f, i)) for i in inputs]) for f in (ours, flash)]
    return Result(frames, positions, dtype, float(error), *timed, floor)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--dtype", choices=["fp16", "bf16"], default="fp16")
    options = parser.parse_args()
    try:
        import torch
        import triton
    except ImportError as error:
        print(f"This benchmark needs {error.name}: pip install {error.name}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("There is no GPU here; nothing was measured.", file=sys.stderr)
        return 2
    ceilings = measure_ceilings(torch, torch.float16)
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    print(f"{device}: copy {ceilings[0] / 1e9:.0f} GB/s, product {ceilings[1] / 1e12:.0f} TFLOP/s")
    results = []
    for frames in FRAMES:
        for positions in POSITIONS:
            r = run_shape(torch, frames, positions, options.dtype, ceilings)
            results.append(r)
            print(
                f"{frames:5} frames {positions:4} positions: ours {r.ours:.4f} ms, torch {r.torch_flash:.4f} ms "
                f"({r.torch_flash / r.ours:.2f}x), floor {r.floor:.4f} ms ({r.floor / r.ours:.0%}), error {r.error:.1e}"
            )
    if options.json:
        document = {"device": device, "ceilings": ceilings, "results": [asdict(r) for r in results]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
