"""Compile a Triton kernel ahead of time to PTX for a given GPU, on a machine without one.

Triton's own launcher passes two more pointers than the kernel declares (global and profile scratch); ours are of
size 0 and unused, so they are removed from the PTX for launchers that do not pass them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sfexport.errors import MissingDependency, SfexportError
from sfexport.kernels.launch_config import COMBINE_POSITIONS, COMBINE_WARPS, tiles_for
from sfexport.versions import OLDEST, is_older, version_text

SHARED_LIMIT = 48 << 10  # bytes a launch may ask for without an opt-in, which ahead-of-time plugins cannot make
INSTALL = f"pip install 'triton>={version_text(OLDEST['triton'])}'"
_PURPOSE = "Compiling the cross-attention kernel"
_POINTERS = {
    "cross_attention_split": {
        "query": "{t}",
        "key": "{t}",
        "value": "{t}",
        "attends": "i32",
        "lengths": "i64",
        "partial": "fp32",
        "logsumexp": "fp32",
    },
    "cross_attention_combine": {
        "query": "{t}",
        "partial": "fp32",
        "logsumexp": "fp32",
        "attends": "i32",
        "output": "{t}",
    },
}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        name: the entry point.
        ptx: the text, for `sm`.
        threads: number of threads per block.
        shared: dynamic shared memory in bytes.
    """

    name: str
    ptx: str
    threads: int
    shared: int
    sm: int
    dtype: str
    head_dim: int


@dataclass(frozen=True)
class Resources:
    """A kernel's resources by ptxas: registers per thread, bytes of static shared memory, bytes spilled."""

    registers: int
    static_shared: int
    spill_stores: int
    spill_loads: int


def triton_version() -> str:
    return str(_triton().__version__)


def _triton() -> Any:
    """Import triton. Raises MissingDependency where there is none, it is too old or it does not load."""
    try:
        import triton
    except Exception as error:
        raise MissingDependency("triton", _PURPOSE, INSTALL, failure=error) from None
    oldest = OLDEST["triton"]
    if is_older(triton.__version__, oldest):
        raise MissingDependency("triton", _PURPOSE, INSTALL, triton.__version__, version_text(oldest))
    return triton


@cache
def compile_kernels(dtype: str, head_dim: int, sm: int, ptx_isa: int) -> tuple[Kernel, Kernel]:
    """Compile cross_attention_split and cross_attention_combine.

    Args:
        dtype: 'fp16', 'bf16' or 'fp32', of query, key, value and output.
        sm: compute capability times 10.
        ptx_isa: newest PTX version that the target's driver takes, times 10.

    Raises:
        InputError: no such kernel. MissingDependency: triton. SfexportError: it does not compile.
    """
    tiles = tiles_for(dtype, head_dim, sm)
    split = {"D": head_dim, "BLOCK_M": tiles.rows, "BLOCK_N": tiles.tokens}
    combine = {"D": head_dim, "BLOCK_S": COMBINE_POSITIONS}
    return (
        _compile("cross_attention_split", split, tiles.warps, tiles.stages, dtype, head_dim, sm, ptx_isa),
        _compile("cross_attention_combine", combine, COMBINE_WARPS, 2, dtype, head_dim, sm, ptx_isa),
    )


def _compile(
    name: str, constants: dict[str, int], warps: int, stages: int, dtype: str, head_dim: int, sm: int, ptx_isa: int
) -> Kernel:
    triton = _triton()
    try:
        parameters, compiled = _run_triton(triton, name, constants, warps, stages, dtype, sm, ptx_isa)
    except Exception as error:  # its compiler's exceptions share no base class
        message = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise SfexportError(
            f"Triton {triton.__version__} cannot compile {name} for SM {sm / 10:.1f}: {message[0]}"
        ) from error
    ptx = without_scratch(compiled.asm["ptx"], name, parameters)
    return Kernel(name, ptx, 32 * warps, compiled.metadata.shared, sm, dtype, head_dim)


def _run_triton(
    triton: Any, name: str, constants: dict[str, int], warps: int, stages: int, dtype: str, sm: int, ptx_isa: int
) -> tuple[int, Any]:
    """Return the number of a kernel's parameters, and Triton's compiled kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Line information would carry this machine's paths into every engine.
    triton.knobs.compilation.disable_line_info = True
    from sfexport.kernels import cross_attention

    function = getattr(cross_attention, name)
    pointers = {k: "*" + t.format(t=dtype) for k, t in _POINTERS[name].items()}
    signature = {p: pointers.get(p, "constexpr" if p in constants else "i32") for p in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(signature) if p in pointers}
    options = {"num_warps": warps, "num_stages": stages, "ptx_version": ptx_isa, "enable_fp_fusion": True}
    source = ASTSource(function, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return len(signature) - len(constants), compiled


def without_scratch(ptx: str, name: str, parameters: int) -> str:
    """Return the PTX of kernel `name` with only its first `parameters` parameters.

    Raises:
        SfexportError: one that would be removed is used.
    """
    extra = re.findall(rf"\.param [^\n]*?({name}_param_(\d+))\b", ptx)
    for parameter, number in extra:
        if int(number) < parameters:
            continue
        if len(re.findall(rf"\b{parameter}\b", ptx)) > 1:
            raise SfexportError(
                f"The kernel {name} uses Triton's scratch memory, which an engine cannot give it.",
                "This is a bug in sfexport; please report it with your Triton version.",
            )
        ptx = re.sub(rf",\s*\.param [^\n]*?{parameter}\b", "", ptx)
    return ptx


def ptx_version(ptx: str) -> str:
    """Return the PTX ISA that a text asks for."""
    return _directive("version", ptx)


def _directive(name: str, ptx: str) -> str:
    """Return what follows `.name`. Raises SfexportError for a text that is no PTX."""
    found = re.search(rf"\.{name} (\w[\w.]*)", ptx)
    if found is None:
        raise SfexportError(f"The kernel's PTX has no .{name}.", "Write the kernels again with sfexport build --check.")
    return found[1]


def find_ptxas(sm: int) -> str | None:
    """Find NVIDIA's assembler, Triton's own or a CUDA toolkit's; None where there is neither."""
    try:
        bundled = Path(_triton().__file__).parent / "backends/nvidia/bin"
    except SfexportError:
        return shutil.which("ptxas")
    name = "ptxas-blackwell" if sm >= 100 else "ptxas"
    return next((str(p) for p in (bundled / name, bundled / "ptxas") if os.access(p, os.X_OK)), shutil.which("ptxas"))


def assemble(kernel: Kernel, ptxas: str) -> Resources:
    """Assemble for the kernel's GPU and read its resources from what ptxas prints.

    Raises:
        SfexportError: ptxas refuses the PTX.
    """
    architecture = _directive("target", kernel.ptx)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(kernel.ptx)
        command = [ptxas, "-v", f"-arch={architecture}", str(file), "-o", os.devnull]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SfexportError(f"ptxas refuses {kernel.name} for {architecture}: {run.stderr.strip()}")

    def number(pattern: str) -> int:
        found = re.search(pattern, run.stderr)
        return int(found.group(1)) if found else 0

    return Resources(
        registers=number(r"Used (\d+) registers"),
        static_shared=number(r"(\d+) bytes smem"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
    )
