"""Check the cross-attention kernel against float64: `python -m sfexport.kernels.check --seed 1 --cases 50`.

Runs the Triton kernels in Triton's interpreter on a CPU (or on a GPU with --gpu) on cases drawn at random from the
seed, or with --sweep over a fixed list, and prints the worst relative error ||out - reference|| / ||reference|| per
type. Fails where fp16 inputs pass 1e-3, fp32 inputs 1e-5, on NaN, on an element that should be exactly zero and is
not, or where the kernel reads K or V beyond a sample's length (they are NaN).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np

from sfexport.dtypes import Precision
from sfexport.errors import MissingDependency, SfexportError
from sfexport.kernels.cases import Case, Tensors, make_tensors, random_case, reference, swept_cases
from sfexport.kernels.compile import INSTALL
from sfexport.kernels.launch_config import tiles_for

LIMITS = {Precision.FP32: 1e-5, Precision.FP16: 1e-3, Precision.BF16: 1e-2}


def run_case(case: Case, device: str) -> float:
    """Return the relative error of a case; inf where the result is not finite or not zero where it must be."""
    import torch

    from sfexport.kernels.launch import cross_attention

    dtype = getattr(torch, Precision(case.dtype).torch)
    tensors = make_tensors(case)
    query, key, value = [torch.from_numpy(x).to(dtype) for x in (tensors.query, tensors.key, tensors.value)]
    attends, lengths = torch.from_numpy(tensors.attends), torch.from_numpy(tensors.lengths)
    # The reference starts from the rounded inputs: what is measured is the kernel.
    rounded = [x.float().numpy() for x in (query, key, value)]
    expected = reference(Tensors(rounded[0], rounded[1], rounded[2], tensors.attends, tensors.lengths))
    tiles = tiles_for(case.dtype, case.head_dim, case.sm)
    query, key, value, attends, lengths = [x.to(device) for x in (query, key, value, attends, lengths)]
    context = cross_attention(query, key, value, attends, lengths, tiles, case.multiprocessors)
    found = context.cpu().double().numpy()
    silent = ~(tensors.attends & (tensors.lengths > 0)[:, None])
    if not np.isfinite(found).all() or found[silent].any():
        return float("inf")
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30))


def check(cases: Iterable[Case], device: str) -> dict[str, object]:
    """Return the worst error by type, the number of cases, and the cases that fail."""
    worst: dict[str, float] = {}
    failed, count = [], 0
    for case in cases:
        error = run_case(case, device)
        count += 1
        worst[case.dtype] = max(worst.get(case.dtype, 0.0), error)
        if not error < LIMITS[Precision(case.dtype)]:
            failed.append({"error": error, **asdict(case)})
    return {"cases": count, "worst": worst, "limits": LIMITS, "failed": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=30, help="how many to draw")
    parser.add_argument("--sweep", action="store_true", help="the fixed list instead")
    parser.add_argument("--gpu", action="store_true", help="on a GPU instead of in the interpreter")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    if not options.gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    try:
        _need_libraries()
    except SfexportError as error:
        print(f"Error: {error.paragraph()}", file=sys.stderr)
        return error.exit_code
    rng = np.random.default_rng(options.seed)
    cases = swept_cases() if options.sweep else (random_case(rng) for _ in range(options.cases))
    report = check(cases, "cuda" if options.gpu else "cpu")
    if options.json:
        print(json.dumps(report))
    else:
        _show(report)
    return 1 if report["failed"] else 0


def _need_libraries() -> None:
    for library in ("torch", "triton"):
        try:
            __import__(library)
        except Exception as error:
            install = f"{INSTALL} and pip install torch"
            raise MissingDependency(library, "Running the kernel", install, failure=error) from None


def _show(report: dict) -> None:
    print(f"{report['cases']} cases against float64")
    for dtype, error in sorted(report["worst"].items()):
        print(f"  {dtype}: worst relative error {error:.2e} (limit {LIMITS[Precision(dtype)]:.0e})")
    for case in report["failed"]:
        print(f"  FAILED: {case}")


if __name__ == "__main__":
    sys.exit(main())
