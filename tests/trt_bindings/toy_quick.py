"""A small ahead-of-time plugin of `tensorrt.plugin` in the real registry; prints JSON. Runs inside an environment.

No `from __future__ import annotations` here: TensorRT reads the annotations as objects.
"""

import json
from dataclasses import asdict

import numpy as np
import tensorrt as trt
import tensorrt.plugin as quick

from trt_bindings.expressions import Tensor, drive_quick

Result = tuple[str | bytes, str | bytes, quick.KernelLaunchParams, quick.SymIntExprs]


@quick.register("toy::shorten")
def describe(x: quick.TensorDesc, block: int) -> quick.TensorDesc:
    out = x.like()
    out.shape_expr[1] = quick.cdiv(x.shape_expr[1], block)
    return out


@quick.aot_impl("toy::shorten")
def implement(x: quick.TensorDesc, block: int, outputs: tuple[quick.TensorDesc], tactic: int) -> Result:
    elements = x.shape_expr.numel()
    launch = quick.KernelLaunchParams()
    launch.grid_x, launch.block_x, launch.shared_mem = quick.cdiv(elements, block), 128, 256
    extra = quick.SymIntExprs(1)
    extra[0] = quick.SymInt32(elements)
    return "shorten", "// PTX", launch, extra


if __name__ == "__main__":
    field = trt.PluginField("block", np.array([4], dtype=np.int64), trt.PluginFieldType.INT64)
    driven = drive_quick(trt, "toy::shorten", [Tensor("HALF", (2, 10, 3), dynamic=(1,))], [field])
    print(json.dumps(asdict(driven)))
