"""One table of number formats: equal to each library's own, and in no other file of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import sfexport
from sfexport.artifacts.manifest_fields import EmbeddingFields, OptionsFields, ValueFields
from sfexport.dtypes import DTYPES, PRECISIONS, SAFETENSORS_BITS, Precision, from_onnx, from_tensorrt

PACKAGE = Path(sfexport.__file__).parent


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.onnx], ids=lambda d: d.name)
def test_onnx_calls_a_number_format_so(dtype: typing.Any) -> None:
    if dtype.onnx not in dict(onnx.TensorProto.DataType.items()):
        pytest.skip(f"onnx {onnx.__version__} is older than {dtype.onnx}")
    number = ir.DataType[dtype.onnx]
    assert number == onnx.TensorProto.DataType.Value(dtype.onnx)
    assert from_onnx(number) is dtype and number.numpy() == dtype.numpy


@pytest.mark.parametrize("precision", Precision)
def test_names_lead_back_to_a_precision(precision: Precision) -> None:
    assert Precision(precision.value) is Precision.from_onnx(precision.onnx) is precision
    assert Precision.from_safetensors(precision.safetensors) is Precision.from_tensorrt(precision.tensorrt) is precision
    assert Precision.from_onnxruntime(precision.onnxruntime) is precision
    assert from_tensorrt(precision.tensorrt) is precision.dtype
    assert precision.numpy.itemsize == precision.nbytes
    assert f"{precision}" == str(precision) == precision.value == precision


@pytest.mark.parametrize("precision", Precision)
def test_the_first_number_that_overflows_in_float16(precision: Precision) -> None:
    bits = precision.fp16_overflow
    first, before = (precision.to_float32(np.array([b], bits.dtype)) for b in (bits, bits - 1))
    assert np.isinf(Precision.FP16.from_float32(first)) and np.isfinite(Precision.FP16.from_float32(before))


def test_names_that_are_no_precision() -> None:
    assert Precision.from_onnx(onnx.TensorProto.INT64) is Precision.from_tensorrt("INT64") is None
    with pytest.raises(KeyError):
        Precision.from_safetensors("I64")


def test_pytorch_and_safetensors_call_them_so() -> None:
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    for precision in Precision:
        assert safetensors._TYPES[precision.safetensors] is getattr(torch, precision.torch)
    for name, torch_type in safetensors._TYPES.items():
        assert SAFETENSORS_BITS.get(name, 8 * torch_type.itemsize) == 8 * torch_type.itemsize


def test_every_bfloat16_is_the_upper_half_of_a_float32() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    wide = Precision.BF16.to_float32(bits)
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    numbers = ~np.isnan(expected)
    assert (wide.view(np.uint32) == expected.view(np.uint32))[numbers].all()
    assert np.isnan(wide[~numbers]).all()
    back = Precision.BF16.from_float32(wide)
    assert (back.view(np.uint16) == bits)[numbers].all()
    assert np.isnan(back.astype(np.float32)[~numbers]).all()


@pytest.mark.parametrize("lower", [0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_rounding_to_bfloat16_is_to_nearest_even_for_every_upper_half(lower: int) -> None:
    bits = (np.arange(1 << 16, dtype=np.uint32) << 16) | np.uint32(lower)
    values = bits.view(np.float32)
    numbers = ~np.isnan(values)
    expected = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    found = Precision.BF16.from_float32(values)
    assert (found.view(np.uint16) == expected)[numbers].all()
    assert np.isnan(found.astype(np.float32)[~numbers]).all(), "and no NaN becomes a number"


@pytest.mark.parametrize("precision", Precision)
def test_the_exponents_bits_are_all_set_in_what_is_not_finite(precision: Precision) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    if precision is Precision.FP32:
        bits = bits.astype(np.uint32) << 16
    values, mask = bits.view(precision.numpy).astype(np.float32), precision.exponent_mask
    assert mask.dtype.itemsize == precision.nbytes
    assert (((bits & mask) == mask) == ~np.isfinite(values)).all()


def test_manifests_spell_them_so() -> None:
    hints = {c: typing.get_type_hints(c) for c in (EmbeddingFields, OptionsFields, ValueFields)}
    assert typing.get_args(hints[OptionsFields]["precision"]) == PRECISIONS
    assert typing.get_args(hints[EmbeddingFields]["dtype"]) == tuple(p.safetensors for p in Precision)
    assert set(typing.get_args(hints[ValueFields]["dtype"])) == {p.dtype.name for p in Precision} | {"int64", "bool"}


def test_importing_the_table_imports_no_library() -> None:
    code = "import sys, sfexport.dtypes; print(sorted({'numpy', 'onnx', 'onnx_ir', 'ml_dtypes'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- No second table.

NAMES = {
    name: precision
    for precision in Precision
    for name in (
        *(precision.value, precision.torch, precision.safetensors, precision.tensorrt, precision.onnxruntime),
        precision.onnx.name,
    )
}


def precision_of(node: ast.AST | None) -> Precision | None:
    """The precision that 'fp16', "F16", np.float16 or TensorProto.FLOAT16 names; not Precision.FP16 itself."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return NAMES.get(node.value)
    return NAMES.get(node.attr) if isinstance(node, ast.Attribute) else None


def tables(source: str) -> list[int]:
    """Lines of dict, tuple, list and set literals that name two precisions, outside Literal[...]."""
    tree = ast.parse(source)
    # A file format's fields: test_manifests_spell_them_so holds them equal to the table.
    spelled = {
        id(node.slice)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal"
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in spelled:
            continue
        if isinstance(node, ast.Dict):
            parts = (node.keys, node.values)
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            parts = (node.elts,)
        else:
            continue
        if any(len({precision_of(part) for part in some} - {None}) > 1 for some in parts):
            found.append(node.lineno)
    return found


def test_a_table_is_found() -> None:
    assert tables('A = {"F32": 4, "F16": 2}') == tables("B = (np.float32, np.float16)") == [1]
    assert tables("C = {1: torch.float32, 2: torch.bfloat16}") == [1]
    assert tables('D = {Precision.FP32: 1, Precision.FP16: 2}; E: Literal["F32", "F16"]; F = {"F32": 4}') == []


def test_no_other_file_has_a_table_of_number_formats() -> None:
    found = {
        str(file.relative_to(PACKAGE)): lines
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.name != "dtypes.py" and (lines := tables(file.read_text(encoding="utf-8")))
    }
    assert found == {}
