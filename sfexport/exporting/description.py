"""Describe a graph file's inputs and outputs, for a bundle's manifest and for comparing with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from sfexport.dtypes import from_onnx


def describe_graph(file: Path) -> dict[str, Any]:
    """A graph's inputs and outputs: name, dtype, shape (names for dynamic dimensions), and its opset."""
    model = onnx.load(file, load_external_data=False)

    def describe(values: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": v.name,
                "dtype": from_onnx(v.type.tensor_type.elem_type).name,
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
