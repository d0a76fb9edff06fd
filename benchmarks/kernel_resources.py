"""List registers and shared memory of the cross-attention kernels per compute capability.

Run `python benchmarks/kernel_resources.py`; it needs no GPU.

Compiles both kernels for every SM and type and assembles them with ptxas. With -o FILE the table is written there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sfexport.dtypes import PRECISIONS
from sfexport.kernels.compile import assemble, compile_kernels, find_ptxas, triton_version
from sfexport.kernels.launch_config import HEAD_DIMS, SMS, tiles_for
from sfexport.machines.targets import kernel_ptx_isa

HEADER = ("SM", "type", "head", "rows x tokens", "warps", "stages", "kernel", "registers", "shared KB", "spilled bytes")


def rows(head_dims: tuple[int, ...]) -> list[tuple[str, ...]]:
    """One row per kernel; 'no ptxas' where there is none for that SM."""
    out = []
    for sm in SMS:
        for dtype in PRECISIONS:
            for head_dim in head_dims:
                tiles = tiles_for(dtype, head_dim, sm)
                for kernel in compile_kernels(dtype, head_dim, sm, kernel_ptx_isa(sm)):
                    used = assemble(kernel, find_ptxas(sm))
                    shared = (kernel.shared + used.static_shared) / 1024
                    name = kernel.name.removeprefix("cross_attention_")
                    sizes = (f"{tiles.rows} x {tiles.tokens}", str(tiles.warps), str(tiles.stages))
                    sizes = sizes if name == "split" else ("", str(kernel.threads // 32), "")
                    spilled = str(used.spill_stores + used.spill_loads)
                    taken = (str(used.registers), f"{shared:.1f}", spilled)
                    out.append((f"{sm / 10:.1f}", dtype, str(head_dim), *sizes, name, *taken))
    return out


def table(lines: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (HEADER, ("---",) * len(HEADER), *lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="write the page there instead of printing it")
    parser.add_argument("--all-heads", action="store_true", help="heads of 32 and 64 too, not only the 7B model's 128")
    options = parser.parse_args()
    lines = rows(HEAD_DIMS if options.all_heads else (128,))
    text = f"""# Registers and shared memory of the cross-attention kernels

`python benchmarks/kernel_resources.py`: Triton {triton_version()}, the ptxas that it ships, no GPU. Without an
opt-in, which an AOT plugin cannot make, a launch has at most 48 KB of shared memory. No registers are spilled.

{table(lines)}
"""
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
