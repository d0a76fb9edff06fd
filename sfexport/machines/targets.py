"""Read targets.toml, the machines that engines are built for, and match machines with its rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from sfexport.errors import InputError
from sfexport.tables import read_table
from sfexport.versions import version_numbers

if TYPE_CHECKING:
    from sfexport.machines.machine import Gpu, Machine

# Largest difference between a machine's memory and the vendor's figure, as a share of it: firmware keeps some.
_MEMORY_TOLERANCE = 0.25


@dataclass(frozen=True)
class Target:
    """One kind of machine with one set of versions.

    Attributes:
        name: 'jetson-orin-agx-64', 'h100', ...
        sm: compute capability times ten: 87 for an Orin.
        tensorrt: major and minor version of TensorRT, '10.3'.
        cuda: major and minor version of CUDA, '12.6'.
        ptx_isa: PTX version, times ten, that its kernels are compiled to: enough for its SM, accepted by its driver.
        python: version of Python that its JetPack's TensorRT bindings are built for.
        jetpack: version of JetPack; None in a datacenter.
        multiprocessors: number in the whole GPU; a Jetson's lower power modes switch some off.
        precisions: dtypes that its TensorRT can compute in, of fp32, fp16, bf16, int8, int4, fp8, nvfp4.
        memory_gb: memory in 10^9 bytes, as named by the vendor.
        shared_memory: CPU and GPU share that memory.
        bandwidth_gbs: memory bandwidth in 10^9 bytes per second.
        fp16_tflops: dense fp16 rate in 10^12 operations per second.
        matches: part of a Jetson's model name, or a word of a GPU's name.
        split_lm_head: number of pieces that the head is computed in, so that none is too large to allocate.
        split_decoder: number of engines that the decoder is split into, for the same reason.
    """

    name: str
    sm: int
    tensorrt: str
    cuda: str
    ptx_isa: int
    python: str
    jetpack: str | None
    multiprocessors: int
    precisions: tuple[str, ...]
    memory_gb: float
    shared_memory: bool
    bandwidth_gbs: float
    fp16_tflops: float
    matches: str
    split_lm_head: int = 1
    split_decoder: int = 1


@cache
def load_targets() -> dict[str, tuple[Target, ...]]:
    """Load every target by name: one for each JetPack that it can have, the default first.

    Raises:
        MissingDependency: Python 3.10 without tomli.
    """
    table = _read_toml()
    return {
        name: tuple(_target(name, row, table["software"][key]) for key in row["software"])
        for name, row in table["target"].items()
    }


def find_target(name: str, jetpack: str | None = None) -> Target:
    """Find a target by name, with its default JetPack or the one asked for.

    Raises:
        InputError: no such target; a JetPack that the board does not have; any JetPack for a datacenter GPU.
    """
    targets = load_targets()
    if name not in targets:
        raise InputError(f"Unknown target {name!r}.", f"Choose one of {', '.join(targets)}.")
    choices = targets[name]
    if jetpack is None:
        return choices[0]
    known = [t.jetpack for t in choices if t.jetpack]
    if not known:
        raise InputError(
            f"The target {name} has no JetPack {jetpack}: JetPack is for Jetson boards.", "Drop --jetpack."
        )
    if jetpack not in known:
        raise InputError(f"The target {name} has no JetPack {jetpack}.", f"Choose one of {', '.join(known)}.")
    return choices[known.index(jetpack)]


def match_machine(machine: Machine) -> Target | None:
    """Find the target that a machine is, with its JetPack's versions; None: not in the table.

    A Jetson is identified by its model name and memory, not by multiprocessors, which its power modes switch off. Any
    other machine is identified by its first GPU's name, multiprocessors and memory.
    """
    if machine.jetson_model:
        return _match_jetson(machine.jetson_model, machine.memory_gb, machine.jetpack)
    return _match_gpu(machine.gpus[0]) if machine.gpus else None


def _match_jetson(model: str, memory_gb: float | None, jetpack: str | None) -> Target | None:
    rows = [t for t in load_targets().values() if t[0].jetpack and t[0].matches in model]
    near = [t for t in rows if memory_gb is not None and _near(memory_gb, t[0].memory_gb)]
    return _nearest_jetpack(near[0], jetpack) if near else None


def _nearest_jetpack(choices: tuple[Target, ...], jetpack: str | None) -> Target:
    """Choose the target whose JetPack is nearest to a machine's.

    That is the first of the same major version that is not older, else the newest of that major, else the default.
    """
    if jetpack is None:
        return choices[0]
    wanted = version_numbers(jetpack)[:2]
    same = sorted(
        (t for t in choices if version_numbers(t.jetpack)[0] == wanted[0]), key=lambda t: version_numbers(t.jetpack)
    )
    return next((t for t in same if version_numbers(t.jetpack) >= wanted), same[-1] if same else choices[0])


def _match_gpu(gpu: Gpu) -> Target | None:
    words = re.findall(r"[A-Za-z0-9]+", gpu.name)
    rows = (t[0] for t in load_targets().values() if not t[0].jetpack and t[0].matches in words)
    return next(
        (t for t in rows if t.multiprocessors == gpu.multiprocessors and _near(gpu.memory_gb, t.memory_gb)), None
    )


def _near(seen: float, named: float) -> bool:
    return abs(seen - named) <= _MEMORY_TOLERANCE * named


def newest_ptx_isa(cuda: str) -> int:
    """Return the newest PTX version, times ten, that a CUDA version's driver takes: 85 for '12.6'; 0 before 12.0."""
    wanted = version_numbers(cuda)[:2]
    return max((isa for name, isa in _read_toml()["ptx_isa"].items() if version_numbers(name) <= wanted), default=0)


def oldest_cuda(ptx_isa: int) -> str:
    """Return the oldest CUDA version whose driver takes a PTX version, times ten: '12.5' for 85.

    Raises:
        InputError: no CUDA in the table is new enough.
    """
    table: dict[str, int] = _read_toml()["ptx_isa"]
    for name, isa in table.items():
        if isa >= ptx_isa:
            return name
    raise InputError(f"No CUDA version is known to take PTX {ptx_isa / 10:.1f}.")


def kernel_ptx_isa(sm: int) -> int:
    """Return the PTX version that kernels for a compute capability are compiled to; both times ten.

    Raises:
        InputError: no kernel is compiled for this compute capability.
    """
    table: dict[str, int] = _read_toml()["kernels"]
    known = [isa for oldest, isa in table.items() if int(oldest) <= sm]
    if not known:
        raise InputError(f"There are no kernels for compute capability {sm / 10:.1f}.", "The oldest is 8.0.")
    return max(known)


def _target(name: str, row: dict[str, Any], software: dict[str, Any]) -> Target:
    fields = {key: value for key, value in (software | row).items() if key not in ("software", "precisions")}
    isa, precisions = kernel_ptx_isa(row["sm"]), tuple(row["precisions"])
    return Target(**{"jetpack": None, **fields}, name=name, ptx_isa=isa, precisions=precisions)


@cache
def _read_toml() -> dict[str, Any]:
    return read_table("sfexport.machines", "targets.toml")
