"""Describe the two operations that both kinds of TensorRT plugin implement: inputs, types, shapes and launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sfexport.dtypes import Precision
from sfexport.errors import InputError
from sfexport.graphs.plugin_nodes import COMBINE, SPLIT, PluginSettings
from sfexport.kernels.compile import Kernel
from sfexport.kernels.launch_config import (
    Arithmetic,
    LaunchConfig,
    Shapes,
    combine_launch,
    combine_outputs,
    split_launch,
    split_outputs,
    tiles_for,
)

KernelSource = Callable[[str, int, int, int], tuple[Kernel, Kernel]]


@dataclass(frozen=True)
class Operation:
    """One plugin.

    Attributes:
        inputs: names of the inputs.
        types: TensorRT's type name of each input, then output; 'T': fp16, bf16 or fp32, one for all.
        outputs: how many.
    """

    name: str
    inputs: tuple[str, ...]
    types: tuple[str, ...]
    outputs: int

    def output_shapes(self, arithmetic: Arithmetic, shapes: Sequence[Any], settings: PluginSettings) -> Shapes:
        """Return the outputs' shapes for the inputs' (integers or symbols)."""
        if self.name == COMBINE:
            return combine_outputs(arithmetic, shapes[0])
        return split_outputs(arithmetic, shapes[0], shapes[1], settings.multiprocessors)

    def launch(
        self, arithmetic: Arithmetic, shapes: Sequence[Any], dtype: str, settings: PluginSettings
    ) -> LaunchConfig:
        """Return the launch for the inputs' shapes (integers or symbols)."""
        if self.name == COMBINE:
            return combine_launch(arithmetic, shapes[0], shapes[1])
        tiles = tiles_for(dtype, settings.head_dim, settings.sm)
        return split_launch(arithmetic, shapes[0], shapes[1], tiles, settings.multiprocessors)

    def kernel(self, source: KernelSource, dtype: str, settings: PluginSettings) -> Kernel:
        split, combine = source(dtype, settings.head_dim, settings.sm, settings.ptx_isa)
        return combine if self.name == COMBINE else split

    def accepts(self, position: int, types: Sequence[str]) -> bool:
        """Tell whether the type at `position` (inputs, then outputs) fits those before it."""
        expected = self.types[position]
        if expected != "T":
            return types[position] == expected
        return Precision.from_tensorrt(types[position]) is not None and types[position] == types[0]

    def check_shapes(self, shapes: Sequence[Sequence[int | None]], settings: PluginSettings) -> None:
        """Check the inputs' shapes. Raises InputError where known dimensions (None: unknown) do not fit one another."""
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
        heads, kv_heads = query[1], key[1]
        if heads is not None and kv_heads is not None and heads % kv_heads:
            raise InputError(f"{self.name}: {heads} query heads are not a multiple of {kv_heads} kv heads.")


OPERATIONS = (
    Operation(
        SPLIT,
        ("query", "key", "value", "attends", "lengths"),
        ("T", "T", "T", "INT32", "INT64", "FLOAT", "FLOAT"),
        outputs=2,
    ),
    Operation(COMBINE, ("query", "partial", "logsumexp", "attends"), ("T", "FLOAT", "FLOAT", "INT32", "T"), outputs=1),
)


def dtype_name(tensorrt_type: Any) -> str:
    """Return a type's precision: 'fp16' for DataType.HALF and so on.

    Raises:
        InputError: a type the kernels do not compute in.
    """
    precision = Precision.from_tensorrt(tensorrt_type.name)
    if precision is None:
        raise InputError(f"The cross-attention plugin cannot compute in {tensorrt_type.name}.")
    return precision.value
