"""Read checkpoints whose linear weights GPTQ or AWQ has quantized already: their 4-bit codes are kept.

For a layer `x` such a checkpoint has, in the place of x.weight [out, in]:

    GPTQ  x.qweight I32 [in / 8, out], eight inputs to a number    x.g_idx I32 [in], the group of each input
    AWQ   x.qweight I32 [in, out / 8], eight outputs to a number, in the order of _AWQ_ORDER
    both  x.qzeros I32 [in / group, out / 8], x.scales [in / group, out]

A weight is (code - zero) * scale with codes 0..15. GPTQ's first format stores zero - 1. Where every zero is 8 the codes
less 8 are ours, symmetric; TensorRT takes no other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from sfexport.checkpoint.checkpoint import Checkpoint, Tensor
from sfexport.checkpoint.quantization_config import HINT, Quantization, read_quantization
from sfexport.errors import CheckpointError

# The linear weights of the decoder's layers; with 4 bits, these are what changes.
DECODER_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
PARTS = ("qweight", "qzeros", "scales", "g_idx")
CENTRE = 8
# AWQ: the output that each 4 bits of a number hold, the lowest bits first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_IN_ORDER = tuple(range(8))


@dataclass(frozen=True)
class PrequantizedMatrix:
    """A matrix that the checkpoint stores as 4-bit codes.

    Attributes:
        name: of the weight that the codes stand for.
        method: 'gptq' or 'awq'.
        group: number of inputs that share a scale.
        codes: I32; eight codes to a number.
        zeros: I32 [in / group, out / 8], zero points.
        scales: [in / group, out].
        zero_offset: added to a stored zero point: 1 for GPTQ's first format.
        symmetric: every zero point is 8.
    """

    name: str
    method: str
    group: int
    codes: Tensor
    zeros: Tensor
    scales: Tensor
    zero_offset: int
    symmetric: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """[in, out]."""
        return self.scales.shape[0] * self.group, self.scales.shape[1]

    def codes_of(self, start: int, stop: int) -> np.ndarray:
        """Read uint8 codes 0..15 of the inputs start..stop-1, multiples of the group: [stop - start, out]."""
        if self.method == "awq":
            return _unpack(_numbers(self.codes, start, stop), _AWQ_ORDER)
        # A number's eight codes are consecutive inputs.
        numbers = _numbers(self.codes, start // 8, stop // 8)
        codes = np.empty((len(numbers), 8, numbers.shape[1]), np.uint8)
        for i in range(8):
            codes[:, i] = numbers >> 4 * i & 15
        return codes.reshape(stop - start, -1)

    def zero_points(self) -> np.ndarray:
        """Read the zero points, uint8 [in / group, out]."""
        order = _AWQ_ORDER if self.method == "awq" else _IN_ORDER
        stored = _unpack(_numbers(self.zeros, 0, self.zeros.shape[0]), order)
        return (stored + self.zero_offset) & 15

    def scale_values(self) -> np.ndarray:
        """Read the scales, float32 [in / group, out]. Raises ValueError for one that is not a positive number."""
        scales = self.scales.rows()
        if not (np.isfinite(scales) & (scales > 0)).all():
            raise ValueError("scales that are not positive numbers")
        return scales

    def weights(self) -> np.ndarray:
        """Dequantize the codes: float32 [out, in]."""
        zeros, scales = (np.repeat(part, self.group, axis=0) for part in (self.zero_points(), self.scale_values()))
        codes = self.codes_of(0, self.shape[0]).astype(np.float32)
        return np.ascontiguousarray(((codes - zeros.astype(np.float32)) * scales).T)


def _numbers(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    """Read rows of a stored I32 tensor as uint32, without mapping the file."""
    width = tensor.shape[1]
    values = np.fromfile(tensor.shard, "<u4", (stop - start) * width, offset=tensor.offset + 4 * start * width)
    return values.reshape(stop - start, width)


def _unpack(numbers: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Unpack uint32 [n, out / 8] into uint8 [n, out]."""
    codes = np.empty((*numbers.shape, 8), np.uint8)
    for i, place in enumerate(order):
        codes[..., place] = numbers >> 4 * i & 15
    return codes.reshape(len(numbers), -1)


def read_prequantized(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, PrequantizedMatrix]]:
    """Return the checkpoint as if it had plain weights, and by name the matrices that stand in their place.

    The plain weights' places in files mean nothing. An ordinary checkpoint comes back as it is.

    Raises:
        CheckpointError: quantized by another method, or in a form that cannot be kept.
    """
    settings = read_quantization(checkpoint)
    if settings is None:
        return checkpoint, {}
    prequantized = {}
    for name, shape in checkpoint.expected_tensors().items():
        if name in checkpoint.tensors or not name.endswith(".weight"):
            continue
        if f"{name.removesuffix('.weight')}.qweight" not in checkpoint.tensors:
            continue
        if not DECODER_LINEAR.fullmatch(name):
            raise CheckpointError(
                f"'{name}' is rounded to 4 bits; sfexport takes that over of the decoder layers' own weights only.",
                "Quantise again with it in modules_to_not_convert, or take the ordinary checkpoint.",
            )
        prequantized[name] = _read_matrix(checkpoint, name, shape, settings)
    plain = {
        name: replace(matrix.scales, name=name, shape=(matrix.shape[1], matrix.shape[0]))
        for name, matrix in prequantized.items()
    }
    parts = {f"{name.removesuffix('.weight')}.{part}" for name in prequantized for part in PARTS}
    others = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in parts}
    # Settings from the quantiser's own file are config.json's from here on.
    config = checkpoint.raw_config | {"quantization_config": {"quant_method": settings.method}}
    return replace(checkpoint, raw_config=config, tensors=others | plain), prequantized


def _read_matrix(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], settings: Quantization
) -> PrequantizedMatrix:
    stem, (outputs, inputs) = name.removesuffix(".weight"), shape
    method, group = settings.method, settings.group
    packed = (inputs, outputs // 8) if method == "awq" else (inputs // 8, outputs)
    groups = inputs // group
    parts = {"qweight": packed, "qzeros": (groups, outputs // 8), "scales": (groups, outputs)}
    for part, wanted in parts.items():
        tensor = checkpoint.tensors.get(f"{stem}.{part}")
        if tensor is None or tensor.shape != wanted or inputs % group:
            found = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
            raise CheckpointError(
                f"Tensor '{stem}.{part}' {found}; {method} in groups of {group} asks for {list(wanted)}.",
                "config.json may belong to another model.",
            )
        if part != "scales" and tensor.dtype != "I32":
            raise CheckpointError(f"Tensor '{stem}.{part}' is stored as {tensor.dtype}, not I32.", HINT)
    if method == "gptq":
        _check_order(checkpoint, stem, inputs, settings)
    codes, zeros, scales = (checkpoint.tensors[f"{stem}.{part}"] for part in parts)
    matrix = PrequantizedMatrix(name, method, group, codes, zeros, scales, settings.zero_offset)
    return replace(matrix, symmetric=bool((matrix.zero_points() == CENTRE).all()))


def _check_order(checkpoint: Checkpoint, stem: str, inputs: int, settings: Quantization) -> None:
    """Check that groups are runs of consecutive inputs, as they are unless GPTQ was asked for `desc_act`."""
    tensor = checkpoint.tensors.get(f"{stem}.g_idx")
    if tensor is None and not settings.desc_act:
        return
    if tensor is None or (tensor.dtype, tensor.shape) != ("I32", (inputs,)):
        raise CheckpointError(f"Tensor '{stem}.g_idx' must be I32 of shape [{inputs}].", "Download it again.")
    found = np.fromfile(tensor.shard, "<u4", inputs, offset=tensor.offset)
    if not np.array_equal(found, np.arange(inputs) // settings.group):
        raise CheckpointError(
            f"'{stem}.g_idx' mixes the inputs of the groups (GPTQ's desc_act), which no runtime's INT4 has.",
            "Take a checkpoint made with desc_act false, or the ordinary one with --quantize int4.",
        )
