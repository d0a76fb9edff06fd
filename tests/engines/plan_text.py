"""Read a serialised TensorRT plan: its kernels, and the memory that it takes beside weights.

A plan is no documented format, but parts of it are text: every kernel's name, which for a fused one lists what was
fused (`__myl_CastMulFc`), and every piece of device memory with its size. By hand:

    python tests/engines/plan_text.py decoder.engine
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_KERNEL = re.compile(rb"name=(\w+)")
_REGION = re.compile(rb"region = \{[^}]*?name=(\w+)[^}]*?size=(\d+)")


@dataclass(frozen=True)
class PlanText:
    """What can be read of a plan.

    Attributes:
        kernels: number of uses by kernel's name.
        scratch: sizes of the pieces of device memory, in bytes, largest first.
    """

    kernels: Counter[str]
    scratch: tuple[int, ...]

    @classmethod
    def read(cls, plan: bytes) -> PlanText:
        names = (name.decode() for name in _KERNEL.findall(plan))
        kernels = Counter(name for name in names if name.startswith("__myl_") or "mha" in name or "gem" in name)
        sizes = {int(size) for name, size in _REGION.findall(plan) if name.startswith(b"devmem")}
        return cls(kernels, tuple(sorted(sizes, reverse=True)))

    @property
    def attention(self) -> Counter[str]:
        """Kernels that do a whole attention."""
        return Counter({name: count for name, count in self.kernels.items() if "mha" in name})


def main() -> None:
    text = PlanText.read(Path(sys.argv[1]).read_bytes())
    for name, count in text.kernels.most_common():
        print(f"{count:6} {name}")
    print("scratch:", *text.scratch[:20])


if __name__ == "__main__":
    main()
