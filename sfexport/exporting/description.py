"""Describe a graph file's inputs and outputs, for a bundle's manifest and for comparing with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

TYPE_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.BOOL: "bool",
}


def describe_graph(file: Path) -> dict[str, Any]:
    """A graph's inputs and outputs: name, dtype, shape (names for dynamic dimensions), and its opset."""
    model = onnx.load(file, load_external_data=False)

    def describe(values: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": v.name,
                "dtype": TYPE_NAMES[ir.DataType(v.type.tensor_type.elem_type)],
                "shape": [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            }
            for v in values
        ]

    return {
        "opset": next(o.version for o in model.opset_import if o.domain == ""),
        "nodes": len(model.graph.node),
        "inputs": describe(model.graph.input),
        "outputs": describe(model.graph.output),
    }
