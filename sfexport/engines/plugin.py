"""The TensorRT plugins CrossAttentionSplit and CrossAttentionCombine: what they take, and the door they come through.

Two doors lead into TensorRT and both launch the same PTX:

    ahead of time   a quick plugin whose PTX is stored in the engine; nothing of sfexport is needed to run it
    python          an IPluginV3 in Python that launches the PTX itself; its class must be registered to run

Imports neither tensorrt nor triton; the doors are sfexport/engines/plugin_ahead.py and plugin_python.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sfexport.errors import InputError, SfexportError
from sfexport.graphs.plugin_nodes import COMBINE, PLUGIN_NAMESPACE, PLUGIN_VERSION, SPLIT, PluginSettings
from sfexport.kernels.compile import Kernel, compile_kernels
from sfexport.kernels.plan import (
    Arithmetic,
    Launch,
    Shapes,
    combine_outputs,
    plan_combine,
    plan_split,
    split_outputs,
    tiles_for,
)

DOORS = ("ahead", "python")
FIRST_AHEAD = (10, 9)
# Quick plugins of TensorRT up to this version use NumPy functions that 2.4 has removed.
LAST_WITH_OLD_NUMPY, FIRST_NEW_NUMPY = (10, 16), (2, 4)
KernelSource = Callable[[str, int, int, int], tuple[Kernel, Kernel]]
_TYPES = {"HALF": "fp16", "BF16": "bf16", "FLOAT": "fp32"}


@dataclass(frozen=True)
class Operation:
    """One plugin.

    Attributes:
        inputs: names. types: TensorRT's type name of each input, then output; 'T': fp16, bf16 or fp32, one for all.
        outputs: how many.
    """

    name: str
    inputs: tuple[str, ...]
    types: tuple[str, ...]
    outputs: int

    def output_shapes(self, arithmetic: Arithmetic, shapes: Sequence[Any], settings: PluginSettings) -> Shapes:
        """The outputs' shapes for the inputs' (integers or symbols)."""
        if self.name == COMBINE:
            return combine_outputs(arithmetic, shapes[0])
        return split_outputs(arithmetic, shapes[0], shapes[1], settings.multiprocessors)

    def launch(self, arithmetic: Arithmetic, shapes: Sequence[Any], dtype: str, settings: PluginSettings) -> Launch:
        """The launch for the inputs' shapes (integers or symbols)."""
        if self.name == COMBINE:
            return plan_combine(arithmetic, shapes[0], shapes[1])
        tiles = tiles_for(dtype, settings.head_dim, settings.sm)
        return plan_split(arithmetic, shapes[0], shapes[1], tiles, settings.multiprocessors)

    def kernel(self, source: KernelSource, dtype: str, settings: PluginSettings) -> Kernel:
        split, combine = source(dtype, settings.head_dim, settings.sm, settings.ptx_isa)
        return combine if self.name == COMBINE else split

    def accepts(self, position: int, types: Sequence[str]) -> bool:
        """Whether the type at `position` (inputs, then outputs) fits those before it."""
        expected = self.types[position]
        if expected != "T":
            return types[position] == expected
        return types[position] in _TYPES and types[position] == types[0]

    def check_shapes(self, shapes: Sequence[Sequence[int | None]], settings: PluginSettings) -> None:
        """Raises InputError where known dimensions of the inputs (None: unknown) do not fit one another."""
        ranks = {SPLIT: (4, 4, 4, 2, 1), COMBINE: (4, 4, 3, 2)}[self.name]
        for name, shape, rank in zip(self.inputs, shapes, ranks, strict=True):
            if len(shape) != rank:
                raise InputError(f"{self.name}: {name} has {len(shape)} dimensions; it takes {rank}.")
        query = shapes[0]
        if query[3] is not None and query[3] != settings.head_dim:
            raise InputError(f"{self.name}: query has heads of {query[3]} elements, its node says {settings.head_dim}.")
        if self.name == SPLIT:
            self._check_key_value(query, shapes[1], shapes[2])

    def _check_key_value(
        self, query: Sequence[int | None], key: Sequence[int | None], value: Sequence[int | None]
    ) -> None:
        if any(k != v for k, v in zip(key, value, strict=True) if None not in (k, v)):
            raise InputError(f"{self.name}: key {list(key)} and value {list(value)} differ in shape.")
        if None not in (query[3], key[3]) and query[3] != key[3]:
            raise InputError(f"{self.name}: query has heads of {query[3]} elements, key of {key[3]}.")
        if None not in (query[1], key[1]) and query[1] % key[1]:
            raise InputError(f"{self.name}: {query[1]} query heads are not a multiple of {key[1]} kv heads.")


OPERATIONS = (
    Operation(
        SPLIT,
        ("query", "key", "value", "attends", "lengths"),
        ("T", "T", "T", "BOOL", "INT64", "FLOAT", "FLOAT"),
        outputs=2,
    ),
    Operation(COMBINE, ("query", "partial", "logsumexp", "attends"), ("T", "FLOAT", "FLOAT", "BOOL", "T"), outputs=1),
)


def dtype_name(tensorrt_type: Any) -> str:
    """'fp16' for DataType.HALF and so on.

    Raises:
        InputError: a type the kernels do not compute in.
    """
    if tensorrt_type.name not in _TYPES:
        raise InputError(f"The cross-attention plugin cannot compute in {tensorrt_type.name}.")
    return _TYPES[tensorrt_type.name]


def choose_door(tensorrt_version: str, numpy_version: str) -> str:
    """'ahead' where this TensorRT has it and its Python part works with this NumPy, else 'python'."""
    version = _numbers(tensorrt_version)
    if version < FIRST_AHEAD:
        return "python"
    if version <= LAST_WITH_OLD_NUMPY and _numbers(numpy_version) >= FIRST_NEW_NUMPY:
        return "python"
    return "ahead"


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def register_plugins(trt: Any, door: str, source: KernelSource = compile_kernels) -> None:
    """Register both plugins in TensorRT's registry; registered ones stay as they are.

    Args:
        trt: the tensorrt module. source: makes the kernels; compiles them with Triton by default.

    Raises:
        SfexportError: the registry refuses.
    """
    registry = trt.get_plugin_registry()
    if registry is None:
        raise SfexportError("TensorRT has no plugin registry.", "Its libraries are incomplete; install them again.")
    for operation in OPERATIONS:
        if _creator(registry, operation.name) is not None:
            continue
        if door == "ahead":
            from sfexport.engines.plugin_ahead import register
        else:
            from sfexport.engines.plugin_python import register
        register(trt, operation, source)


def _creator(registry: Any, name: str) -> Any:
    find = getattr(registry, "get_creator", None)
    return find(name, PLUGIN_VERSION, PLUGIN_NAMESPACE) if find else None
