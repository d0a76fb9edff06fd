"""Store compiled kernels in a directory: made on one machine, used on another that has no Triton."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from sfexport.errors import BundleError, InputError
from sfexport.kernels.compile import Kernel, ptx_version

INDEX = "kernels.json"
FORMAT = 3  # of the index and of the kernels' parameters: 3 takes the number of videos


def save_kernels(directory: Path, kernels: Sequence[Kernel]) -> list[str]:
    """Write one .ptx per kernel and an index; returns the files' names."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = {}
    for kernel in kernels:
        name = f"{kernel.name}-{kernel.dtype}-{kernel.head_dim}-sm{kernel.sm}.ptx"
        (directory / name).write_text(kernel.ptx)
        entries[name] = asdict(replace(kernel, ptx=""))
    (directory / INDEX).write_text(json.dumps({"format": FORMAT, "kernels": entries}, indent=1) + "\n")
    return [INDEX, *entries]


class StoredKernels:
    """A kernel source that reads such a directory."""

    def __init__(self, directory: Path) -> None:
        """Open a directory. Raises InputError if it holds no kernels, BundleError if it is damaged."""
        if not (directory / INDEX).is_file():
            raise InputError(
                f"{directory} holds no compiled kernels (no {INDEX}).", "sfexport build --check -o DIR writes them."
            )
        try:
            index = json.loads((directory / INDEX).read_text())
            if index.get("format") != FORMAT:
                raise ValueError("another version of sfexport wrote them")
            kernels = index["kernels"].items()
            self._kernels = [replace(Kernel(**e), ptx=(directory / n).read_text()) for n, e in kernels]
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise BundleError(
                f"The kernels in {directory} cannot be used: {error}.", "Write them again with sfexport build --check."
            ) from None
        self._directory = directory

    def __call__(self, dtype: str, head_dim: int, sm: int, ptx_isa: int) -> tuple[Kernel, Kernel]:
        """Return kernels as compile_kernels does. Raises InputError where they are absent or too new for the driver."""
        found = [k for k in self._kernels if (k.dtype, k.head_dim, k.sm) == (dtype, head_dim, sm)]
        found = [k for k in found if float(ptx_version(k.ptx)) * 10 <= ptx_isa + 0.5]
        by_name = {k.name: k for k in found}
        try:
            return by_name["cross_attention_split"], by_name["cross_attention_combine"]
        except KeyError:
            raise InputError(
                f"{self._directory} holds no kernels of {dtype} and heads of {head_dim} for SM {sm / 10:.1f} and PTX "
                f"{ptx_isa / 10:.1f}.",
                "Write them with sfexport build --check for this target and precision.",
            ) from None
