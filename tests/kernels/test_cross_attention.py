"""The kernel's answers against float64, in Triton's interpreter, through the command that anyone can run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sfexport.kernels.cases import MASKS, swept_cases
from sfexport.kernels.launch_config import HEAD_DIMS

pytest.importorskip("triton", reason="the kernel is written in Triton, which is not installed")


def run_check(*arguments: str) -> dict:
    pytest.importorskip("torch", reason="Triton's interpreter computes on PyTorch's tensors")
    command = [sys.executable, "-m", "sfexport.kernels.check", "--json", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout, run.stderr
    report = json.loads(run.stdout)
    assert run.returncode == (1 if report["failed"] else 0)
    return report


def test_the_sweep_is_within_its_limits():
    report = run_check("--sweep")
    assert report["cases"] == len(list(swept_cases())) and report["failed"] == []
    assert 0 < report["worst"]["fp16"] < 1e-3
    assert 0 < report["worst"]["fp32"] < 1e-5


def test_the_sweep_covers_what_it_claims():
    cases = list(swept_cases())
    assert {c.group for c in cases} == set(range(1, 9))
    assert {c.head_dim for c in cases} == set(HEAD_DIMS)
    assert {c.mask for c in cases} == set(MASKS)
    assert {0, 1, 131, 515} <= {c.slow for c in cases}
    assert any(len(set(c.lengths)) > 1 for c in cases)


def test_random_cases_are_within_their_limits():
    report = run_check("--seed", "7", "--cases", "12")
    assert report["cases"] == 12 and report["failed"] == []


def test_a_wrong_kernel_is_found():
    """The check can fail: with the slow tokens' share one step short, the error is large."""
    pytest.importorskip("torch", reason="Triton's interpreter computes on PyTorch's tensors")
    program = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "import inspect, tempfile, importlib.util, sys, json\n"
        "from sfexport.kernels import cross_attention as right\n"
        "text = inspect.getsource(right).replace('tl.minimum(start + share, length)', "
        "'tl.minimum(start + share, length) - 1')\n"
        "file = tempfile.NamedTemporaryFile('w', suffix='.py', delete=False); file.write(text); file.close()\n"
        "spec = importlib.util.spec_from_file_location('sfexport.kernels.cross_attention', file.name)\n"
        "wrong = importlib.util.module_from_spec(spec); spec.loader.exec_module(wrong)\n"
        "sys.modules['sfexport.kernels.cross_attention'] = wrong\n"
        "from sfexport.kernels.cases import swept_cases\n"
        "from sfexport.kernels.check import check\n"
        "case = next(c for c in swept_cases() if c.slow == 131)\n"
        "print(json.dumps(check([case], 'cpu')['failed'][0]['error'] > 1e-3))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "true", run.stderr
