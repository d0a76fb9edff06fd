"""Write nodes: a thin layer over onnx-ir's tape, and the blocks every graph uses.

Plain operators of opset 18 only (21 in a graph with INT4 weights), so that TensorRT 10.3 and later and ONNX Runtime
read the same file.
Float32 islands (norms, softmax, GELU, rotary angles, means, the decoder's scores) are written with explicit casts,
which vanish when the graph computes in float32. In a bfloat16 graph convolutions are islands too: ONNX has them
in bfloat16 from opset 22 on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sfexport.__version__ import __version__
from sfexport.dtypes import Precision
from sfexport.graphs.initializers import Packed, Rows, Weights, part_name

OPSET = 18
INT4_OPSET = 21  # the first with INT4 and scales by block
IR_VERSIONS = {OPSET: 8, INT4_OPSET: 10}
Shape = Sequence[int | str | None]


class GraphWriter:
    """Writes one graph: values in, nodes added in order, values out.

    Args:
        weights: where initialisers come from.
        dtype: the type the graph computes in; weights stored otherwise are followed by a Cast.
    """

    def __init__(self, name: str, weights: Weights, dtype: ir.DataType = ir.DataType.FLOAT, opset: int = OPSET) -> None:
        self.name, self.dtype, self.opset = name, dtype, opset
        self._weights = weights
        self._graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": opset})
        self._tape = ir.tape.Tape(self._graph)
        self._scope: list[str] = []
        self._counts: dict[str, int] = {}
        self._constants: dict[tuple, ir.Value] = {}
        self._loaded: dict[tuple, ir.Value] = {}

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of nodes and values, so that a viewer shows the model's own hierarchy."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def _unique(self, op_type: str) -> str:
        name = "/".join([*self._scope, op_type])
        self._counts[name] = self._counts.get(name, 0) + 1
        return name if self._counts[name] == 1 else f"{name}_{self._counts[name]}"

    def input(self, name: str, dtype: ir.DataType, shape: Shape) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._graph.inputs.append(value)
        return value

    def output(self, name: str, value: ir.Value, dtype: ir.DataType, shape: Shape) -> None:
        """Give `value` its public name; a value that is an input or already an output passes through Identity."""
        if value.producer() is None or value in self._graph.outputs:
            value = self.op("Identity", value)
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        self._graph.outputs.append(value)

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Add a node with one output."""
        name = self._unique(op_type)
        value = self._tape.op(op_type, inputs, attributes, domain=domain, name=name)
        value.name = name
        return value

    def split(self, x: ir.Value, parts: int, axis: int) -> list[ir.Value]:
        """Split into equal parts along `axis`."""
        name = self._unique("Split")
        attributes = {"axis": ir.AttrInt64("axis", axis), "num_outputs": ir.AttrInt64("num_outputs", parts)}
        node = ir.Node("", "Split", [x], attributes, num_outputs=parts, name=name)
        self._graph.append(node)
        for i, out in enumerate(node.outputs):
            out.name = f"{name}.{i}"
        return list(node.outputs)

    def constant(self, array: np.ndarray, name: str = "") -> ir.Value:
        """Make a small initialiser, shared by all nodes that use the same values."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = name or f"const.{len(self._constants)}"
            self._constants[key] = self._tape.initializer(ir.tensor(array, name=name), name)
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, dtype=np.int64))

    def float32(self, value: float) -> ir.Value:
        return self.constant(np.array(value, dtype=np.float32))

    def scalar(self, value: float) -> ir.Value:
        """Make a constant of the graph's own type."""
        return self.cast(self.float32(value), ir.DataType.FLOAT, self.dtype)

    def weight(self, name: str, dtype: ir.DataType | None = None, rows: Rows | None = None) -> ir.Value:
        """Make an initialiser that points to a stored tensor, or some rows; cast where not `dtype`."""
        dtype, part = dtype or self.dtype, part_name(name, rows)
        if (part, dtype) not in self._loaded:
            tensor = self._weights.tensor(name, rows)
            if (part, None) not in self._loaded:
                self._loaded[part, None] = self._tape.initializer(tensor, part)
            with self._named_after(part):
                self._loaded[part, dtype] = self.cast(self._loaded[part, None], tensor.dtype, dtype)
        return self._loaded[part, dtype]

    @contextlib.contextmanager
    def _named_after(self, weight: str) -> Iterator[None]:
        """Nodes that only change how a weight is stored are named after it, wherever it is used first."""
        scope, self._scope = self._scope, [weight]
        yield
        self._scope = scope

    def cast(self, x: ir.Value, source: ir.DataType, target: ir.DataType) -> ir.Value:
        return x if source == target else self.op("Cast", x, to=int(target))

    def to_float32(self, x: ir.Value) -> ir.Value:
        return self.cast(x, self.dtype, ir.DataType.FLOAT)

    def from_float32(self, x: ir.Value) -> ir.Value:
        return self.cast(x, ir.DataType.FLOAT, self.dtype)

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        return self.op("Reshape", x, self.ints(*shape))

    def transpose(self, x: ir.Value, *perm: int) -> ir.Value:
        return self.op("Transpose", x, perm=perm)

    def dims(self, x: ir.Value, start: int, end: int) -> ir.Value:
        """Dimensions start..end-1 of x, int64 [end - start]."""
        return self.op("Shape", x, start=start, end=end)

    def linear(self, x: ir.Value, name: str, bias: bool = True, rows: Rows | None = None) -> ir.Value:
        """x [rows, in] @ weight.T (+ bias). Gemm with transB reads the stored [out, in] layout: no copy.

        The matrices that can be quantised have no bias, or are written by `heads`.

        Args:
            rows: only these outputs (without bias).
        """
        if packed := self._weights.packed(f"{name}.weight", rows):
            return self._packed_product(x, name, packed)
        inputs = [x, self.weight(f"{name}.weight", rows=rows)]
        if bias:
            inputs.append(self.weight(f"{name}.bias"))
        return self.op("Gemm", *inputs, transB=1)

    def heads(self, x: ir.Value, name: str, shape: ir.Value, width: int) -> ir.Value:
        """x [rows, in] @ weight.T + bias as [batch, sequence, heads, width], which is what `shape` says.

        A quantised product gets its bias after it is reshaped: of a matrix of rank 2 and a bias, ONNX Runtime before
        1.25 makes a Gemm first, and then dequantises all weights at every step, 100 times as slow.
        """
        packed = self._weights.packed(f"{name}.weight")
        if packed is None:
            return self.op("Reshape", self.linear(x, name), shape)
        product = self.op("Reshape", self._packed_product(x, name, packed), shape)
        # This Reshape is done once, when the graph is loaded.
        return self.op("Add", product, self.reshape(self.weight(f"{name}.bias"), -1, width))

    def _packed_product(self, x: ir.Value, name: str, packed: Packed) -> ir.Value:
        """With integer weights, stored [in, out]: what ONNX Runtime makes one MatMulNBits of."""
        values = [self._tape.initializer(tensor, tensor.name) for tensor in packed.initializers()]
        attributes: dict[str, Any] = {"axis": 0, "block_size": packed.block} if packed.block else {"axis": 1}
        with self._named_after(f"{name}.weight"):
            weight = self.op("DequantizeLinear", *values, **attributes)
        return self.op("MatMul", x, weight)

    def float32_linear(self, x: ir.Value, name: str, rows: Rows | None = None) -> ir.Value:
        """Write linear() without a bias, its result in float32."""
        return self.to_float32(self.linear(x, name, bias=False, rows=rows))

    def scaled_linear(self, x: ir.Value, name: str, rows: Rows | None = None) -> ir.Value:
        """Write float32_linear() so that TensorRT never expands 8-bit weights.

        Its builder multiplies by integer weights that share one scale in one kernel, and expands a matrix with a scale
        per output before. So the codes get a power of two as their scale, and the float32 results the rest of their
        own.
        """
        packed = self._weights.packed(f"{name}.weight", rows)
        if packed is None or packed.bits != 8:
            return self.float32_linear(x, name, rows)
        common = _power_of_two(packed.scales.rows())
        codes, stored = (self._tape.initializer(tensor, tensor.name) for tensor in packed.initializers())
        with self._named_after(f"{name}.weight"):
            weight = self.op("DequantizeLinear", codes, self.scalar(common))
            scales = self.cast(stored, Precision.from_safetensors(packed.scales.dtype).onnx, ir.DataType.FLOAT)
            rest = self.op("Mul", scales, self.float32(1 / common))
        return self.op("Mul", self.to_float32(self.op("MatMul", x, weight)), rest)

    def conv(self, x: ir.Value, name: str, bias: bool = True, **attributes: Any) -> ir.Value:
        """Conv with the stored kernel (and bias), in the narrowest type that opset 18 allows."""
        dtype = ir.DataType.FLOAT if self.dtype == ir.DataType.BFLOAT16 else self.dtype
        inputs = [self.cast(x, self.dtype, dtype), self.weight(f"{name}.weight", dtype)]
        if bias:
            inputs.append(self.weight(f"{name}.bias", dtype))
        return self.cast(self.op("Conv", *inputs, **attributes), dtype, self.dtype)

    def average_pool(self, x: ir.Value, k: int) -> ir.Value:
        """k x k means of [N, C, h, w], odd rows and columns dropped; summed in float32, as in torch."""
        mean = self.op("AveragePool", self.to_float32(x), kernel_shape=[k, k], strides=[k, k])
        return self.from_float32(mean)

    def layer_norm(self, x: ir.Value, name: str, eps: float) -> ir.Value:
        """LayerNorm over the last axis, the whole of it in float32.

        The last stage of a ConvNeXt has values whose squares leave float16's range. `stash_type` alone would say
        so, but whether a runtime heeds it cannot be seen from outside.
        """
        weight, bias = (self.weight(f"{name}.{part}", ir.DataType.FLOAT) for part in ("weight", "bias"))
        normed = self.op("LayerNormalization", self.to_float32(x), weight, bias, axis=-1, epsilon=eps, stash_type=1)
        return self.from_float32(normed)

    def rms_norm(self, x: ir.Value, name: str, eps: float) -> ir.Value:
        """Qwen2's RMSNorm over the last axis: normalised in float32, times the weight in the graph's type.

        ONNX Runtime makes one node of it as long as the square is a Pow.
        """
        x = self.to_float32(x)
        mean_square = self.op("ReduceMean", self.op("Pow", x, self.float32(2.0)), self.ints(-1), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean_square, self.float32(eps)))
        normed = self.from_float32(self.op("Div", x, root))
        return self.op("Mul", normed, self.weight(f"{name}.weight"))

    def gelu(self, x: ir.Value) -> ir.Value:
        """The exact GELU, x/2 * (1 + erf(x / sqrt 2)); in float32, since 1 + erf cancels where x is negative."""
        x = self.to_float32(x)
        erf = self.op("Erf", self.op("Mul", x, self.float32(1 / math.sqrt(2))))
        half = self.op("Mul", x, self.float32(0.5))
        return self.from_float32(self.op("Mul", half, self.op("Add", erf, self.float32(1.0))))

    def gelu_tanh(self, x: ir.Value) -> ir.Value:
        """GELU by tanh; in float32, whose range x cubed does not leave."""
        x = self.to_float32(x)
        cube = self.op("Mul", self.op("Mul", x, x), x)
        inner = self.op("Add", x, self.op("Mul", cube, self.float32(0.044715)))
        tanh = self.op("Tanh", self.op("Mul", inner, self.float32(math.sqrt(2 / math.pi))))
        half = self.op("Mul", x, self.float32(0.5))
        return self.from_float32(self.op("Mul", half, self.op("Add", tanh, self.float32(1.0))))

    def srelu(self, x: ir.Value, name: str) -> ir.Value:
        """SReLU over the last axis with the stored t_right, a_right, t_left, a_left; in float32, as in torch."""
        x = self.to_float32(x)

        def piece(side: str, comparison: str, otherwise: ir.Value) -> ir.Value:
            threshold, slope = (self.weight(f"{name}.{p}_{side}", ir.DataType.FLOAT) for p in "ta")
            outer = self.op("Add", threshold, self.op("Mul", slope, self.op("Sub", x, threshold)))
            return self.op("Where", self.op(comparison, x, threshold), outer, otherwise)

        # The right piece comes last: it wins where both hold.
        return self.from_float32(piece("right", "GreaterOrEqual", piece("left", "LessOrEqual", x)))

    def model(self, functions: Sequence[ir.Function] = ()) -> ir.Model:
        """The finished model."""
        for function in functions:
            self._graph.opset_imports[function.domain] = 1
        return ir.Model(
            self._graph,
            ir_version=IR_VERSIONS[self.opset],
            producer_name="sfexport",
            producer_version=__version__,
            functions=list(functions),
        )


def _power_of_two(scales: np.ndarray) -> float:
    """Return a power of two below all scales, so that no product with it is larger than the final one.

    From 2^-14 on, float16's smallest normal number; and never 1, which a builder would leave out.
    """
    smallest = float(scales.min())
    power = 2.0 ** max(-14, math.floor(math.log2(smallest))) if smallest > 0 else 2.0**-14
    return 0.5 if power == 1 else power
