"""Name every number format once: in NumPy, ONNX, safetensors, TensorRT, ONNX Runtime and PyTorch, with its width.

Imports nothing but the standard library until an array or another library's object is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


@dataclass(frozen=True)
class Dtype:
    """One number format. Names are None where a library has no such format.

    Attributes:
        name: NumPy's name (also ml_dtypes' and PyTorch's), as manifests have it.
        bits: width of an element.
        onnx: name in TensorProto.DataType and onnx_ir.DataType.
        safetensors: name in a file's header.
        tensorrt: name in tensorrt.DataType.
        exponent: bits of the exponent, for the formats of Precision.
    """

    name: str
    bits: int
    onnx: str | None = None
    safetensors: str | None = None
    tensorrt: str | None = None
    exponent: int = 0

    @property
    def numpy(self) -> np.dtype:
        """NumPy's dtype; ml_dtypes' for the formats that NumPy does not have."""
        import ml_dtypes
        import numpy as np

        return np.dtype(getattr(ml_dtypes, self.name, self.name))


DTYPES = (
    Dtype("float32", 32, "FLOAT", "F32", "FLOAT", exponent=8),
    Dtype("float16", 16, "FLOAT16", "F16", "HALF", exponent=5),
    Dtype("bfloat16", 16, "BFLOAT16", "BF16", "BF16", exponent=8),
    Dtype("float64", 64, "DOUBLE", "F64"),
    Dtype("bool", 8, "BOOL", "BOOL", "BOOL"),
    Dtype("int4", 4, "INT4", None, "INT4"),
    Dtype("uint4", 4, "UINT4"),
    Dtype("int8", 8, "INT8", "I8", "INT8"),
    Dtype("uint8", 8, "UINT8", "U8", "UINT8"),
    Dtype("int16", 16, "INT16", "I16"),
    Dtype("uint16", 16, "UINT16", "U16"),
    Dtype("int32", 32, "INT32", "I32", "INT32"),
    Dtype("uint32", 32, "UINT32", "U32"),
    Dtype("int64", 64, "INT64", "I64", "INT64"),
    Dtype("uint64", 64, "UINT64", "U64"),
    Dtype("complex64", 64, "COMPLEX64", "C64"),
    Dtype("float4_e2m1fn", 4, "FLOAT4E2M1", "F4", "FP4"),
    Dtype("float6_e2m3fn", 6, None, "F6_E2M3"),
    Dtype("float6_e3m2fn", 6, None, "F6_E3M2"),
    Dtype("float8_e4m3fn", 8, "FLOAT8E4M3FN", "F8_E4M3", "FP8"),
    Dtype("float8_e5m2", 8, "FLOAT8E5M2", "F8_E5M2"),
    Dtype("float8_e4m3fnuz", 8, "FLOAT8E4M3FNUZ", "F8_E4M3FNUZ"),
    Dtype("float8_e5m2fnuz", 8, "FLOAT8E5M2FNUZ", "F8_E5M2FNUZ"),
    Dtype("float8_e8m0fnu", 8, "FLOAT8E8M0", "F8_E8M0"),
)
_BY_NAME = {dtype.name: dtype for dtype in DTYPES}
_BY_ONNX = {dtype.onnx: dtype for dtype in DTYPES if dtype.onnx}
_BY_TENSORRT = {dtype.tensorrt: dtype for dtype in DTYPES if dtype.tensorrt}
# Safetensors' names: bits of an element, and bytes where those are whole.
SAFETENSORS_BITS = {dtype.safetensors: dtype.bits for dtype in DTYPES if dtype.safetensors}
SAFETENSORS_BYTES = {name: bits // 8 for name, bits in SAFETENSORS_BITS.items() if bits % 8 == 0}


def from_onnx(number: int) -> Dtype:
    """Return the format of a TensorProto.DataType or onnx_ir.DataType. Raises KeyError for one that is not numeric."""
    import onnx  # not onnx_ir: engines are loaded with onnx alone, and onnx_ir takes 40 MB of memory

    try:
        return _BY_ONNX[onnx.TensorProto.DataType.Name(number)]
    except ValueError:  # no type has this number
        raise KeyError(number) from None


def onnx_bits(number: int) -> int:
    """Return the bits of an element of a TensorProto.DataType; 0 for one that is not numeric."""
    try:
        return from_onnx(number).bits
    except KeyError:
        return 0


def from_tensorrt(name: str) -> Dtype:
    """Return the format of tensorrt.DataType's `name`. Raises KeyError for an unknown one."""
    return _BY_TENSORRT[name]


def operator_table_name(onnx_name: str) -> str:
    """Return the name in TensorRT's table of operators: 'FP16' for FLOAT16; ONNX's own where TensorRT has none."""
    dtype = _BY_ONNX.get(onnx_name)
    if dtype is None or dtype.tensorrt is None:
        return onnx_name
    return next((p.value.upper() for p in Precision if p.dtype is dtype), dtype.tensorrt)


class Precision(str, Enum):
    """A format that graphs compute in. Its value is what --precision and manifests call it."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def from_onnx(cls, number: int) -> Precision | None:
        """Return the precision of a TensorProto.DataType; None for any other type."""
        return next((p for p in cls if int(p.onnx) == number), None)

    @classmethod
    def from_safetensors(cls, name: str) -> Precision:
        """Return the precision of a header's dtype. Raises KeyError for any other dtype."""
        return _PRECISIONS_BY_SAFETENSORS[name]

    @classmethod
    def from_tensorrt(cls, name: str) -> Precision | None:
        """Return the precision of tensorrt.DataType's `name`; None for any other type."""
        return next((p for p in cls if p.dtype.tensorrt == name), None)

    @classmethod
    def from_onnxruntime(cls, name: str) -> Precision | None:
        """Return the precision of a session's input type such as 'tensor(float16)'; None for any other type."""
        return next((p for p in cls if p.onnxruntime == name), None)

    @property
    def dtype(self) -> Dtype:
        return _BY_NAME[_NAMES[self.value]]

    @property
    def nbytes(self) -> int:
        """Bytes of one number."""
        return self.dtype.bits // 8

    @property
    def onnx(self) -> ir.DataType:
        """onnx_ir's type; as an integer it is onnx.TensorProto's."""
        import onnx_ir as ir

        return ir.DataType[self.dtype.onnx or ""]

    @property
    def safetensors(self) -> str:
        return self.dtype.safetensors or ""

    @property
    def tensorrt(self) -> str:
        """Name in tensorrt.DataType."""
        return self.dtype.tensorrt or ""

    @property
    def onnxruntime(self) -> str:
        """Type of a session's input: 'tensor(float16)'."""
        return f"tensor({(self.dtype.onnx or '').lower()})"

    @property
    def torch(self) -> str:
        """Name in the module torch."""
        return self.dtype.name

    @property
    def numpy(self) -> np.dtype:
        """NumPy's dtype; bfloat16 is ml_dtypes'."""
        return self.dtype.numpy

    @property
    def exponent_mask(self) -> np.unsignedinteger:
        """The exponent's bits, as an unsigned integer of this width: all are set in what is not a finite number."""
        import numpy as np

        dtype = self.dtype
        mask = ((1 << dtype.exponent) - 1) << (dtype.bits - 1 - dtype.exponent)
        return np.uint32(mask) if dtype.bits == 32 else np.uint16(mask)

    @property
    def fp16_overflow(self) -> np.unsignedinteger:
        """The bits of this precision's smallest positive number that float16 rounds to infinity."""
        import numpy as np

        # 65520 is halfway from float16's largest number to 65536, which bfloat16 rounds it to; float16 has infinity.
        bits: np.unsignedinteger = self.from_float32(np.array([65520], np.float32)).view(self.exponent_mask.dtype)[0]
        return bits

    def from_float32(self, values: np.ndarray) -> np.ndarray:
        """Round float32 values to this precision, to nearest even; those beyond its range become infinite."""
        import numpy as np

        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(self.numpy)

    def to_float32(self, stored: np.ndarray) -> np.ndarray:
        """Widen an array of this precision to float32; float32 itself is not copied."""
        import numpy as np

        return stored.view(self.numpy).astype(np.float32, copy=False)


_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_PRECISIONS_BY_SAFETENSORS = {p.safetensors: p for p in Precision}
PRECISIONS = tuple(p.value for p in Precision)
