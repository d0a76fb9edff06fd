"""Read how GPTQ or AWQ rounded a checkpoint: config.json's quantization_config, or the quantiser's own file.

AutoGPTQ writes quantize_config.json and AutoAWQ quant_config.json (w_bit and q_group_size for bits and group_size);
not every tool copies them into config.json. Every key is known here, or refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.small_files import read_optional_json
from sfexport.errors import CheckpointError
from sfexport.fields import Fields, read_fields, shown, unknown_fields

METHODS = ("gptq", "awq")  # whose codes are kept as they are
GROUPS = (16, 32, 64, 128, 256)  # what ONNX Runtime fuses
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
HINT = "Export the model's ordinary checkpoint with --quantize int4."


class QuantizationFields(Fields, frozen=True, kw_only=True):
    """The keys of GPTQ's and AWQ's settings, as transformers, AutoGPTQ, GPTQModel and AutoAWQ write them."""

    # How the codes were found, or which kernel is to run them. Which layers have codes is seen from the tensors.
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(
        {
            "sym",
            "damp_percent",
            "damp_auto_increment",
            "true_sequential",
            "static_groups",
            "act_group_aware",
            "mse",
            "v2",
        }
        | {"model_name_or_path", "model_file_base_name", "meta", "tokenizer", "dataset", "model_seqlen"}
        | {"block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "batch_size"}
        | {"pad_token_id", "use_exllama", "disable_exllama", "exllama_config", "max_input_length", "use_cuda_fp16"}
        | {"cache_block_outputs", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert"}
        | {
            "mse",
            "v2",
            "hyb_act",
            "lm_head",
            "parallel_packing",
            "device",
            "offload_to_disk",
            "pack_impl",
            "_load_in_4bit",
            "_load_in_8bit",
        }
    )

    quant_method: str | None = None
    bits: int | None = None
    w_bit: int | None = None
    group_size: int | None = None
    q_group_size: int | None = None
    desc_act: bool = False
    zero_point: bool = True
    version: str | None = None
    format: str | None = None
    checkpoint_format: str | None = None
    is_marlin_format: bool = False
    pack_dtype: str = "int32"
    dynamic: dict[str, Any] | None = None
    adapter: Any = None
    rotation: Any = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False


@dataclass(frozen=True)
class Quantization:
    """How the codes are to be read.

    Attributes:
        method: 'gptq' or 'awq'.
        group: number of inputs that share a scale.
        zero_offset: added to stored zero points.
        desc_act: GPTQ chose an order of the inputs, which each layer's g_idx then gives.
    """

    method: str
    group: int
    zero_offset: int
    desc_act: bool


def read_quantization(checkpoint: Checkpoint) -> Quantization | None:
    """Read the settings of a checkpoint with 4-bit codes; None for an ordinary one.

    Raises:
        CheckpointError: codes without settings, settings without codes, or a form that sfexport does not read.
    """
    packed = next((name for name in checkpoint.tensors if name.endswith(".qweight")), None)
    values = checkpoint.raw_config.get("quantization_config")
    if values is not None:
        found = _settings(values, "config.json", None)
        if packed is None:
            raise CheckpointError(
                f"config.json: the weights are rounded by {found.method}, but no tensor is ('*.qweight').",
                "config.json may belong to another checkpoint of this model.",
            )
        return found
    if packed is None:
        return None
    for name, method in FILES.items():
        if (values := read_optional_json(checkpoint.path / name)) is not None:
            return _settings(values, name, method)
    raise CheckpointError(
        f"The checkpoint has rounded weights ('{packed}') and does not say how: config.json has no "
        f"quantization_config, and there is no {' or '.join(FILES)}.",
        "Get the missing file from the model's own download.",
    )


def _settings(values: Any, file: str, method: str | None) -> Quantization:
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: quantization_config is {shown(values)}, not an object.", HINT)
    method = _known_method(values, file, method)
    fields = read_fields(QuantizationFields, values, file, hint=HINT)
    if unknown := unknown_fields(QuantizationFields, values):
        raise CheckpointError(f"{file}: {shown(unknown[0])} in the quantisation's settings is not known.", HINT)
    group = _one_of(fields, file, "group_size", "q_group_size", 128)
    bits = _one_of(fields, file, "bits", "w_bit", 4 if method == "awq" else None)
    if bits != 4 or group not in GROUPS:
        sizes = ", ".join(map(str, GROUPS))
        raise CheckpointError(
            f"{file}: {method} with {bits} bits in groups of {group}; sfexport reads 4 bits in groups of {sizes}.",
            HINT,
        )
    _refuse_other_forms(fields, file)
    offset = _awq_format(fields, file) if method == "awq" else _gptq_offset(fields, file)
    return Quantization(method, group, offset, fields.desc_act)


def _known_method(values: dict[str, Any], file: str, default: str | None) -> str:
    """Return the method that the settings name. Raises CheckpointError for one that is not in METHODS."""
    method = values.get("quant_method", default)
    if method is None and (values.get("load_in_4bit") or values.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in METHODS:
        raise CheckpointError(
            f"{file}: this checkpoint's weights are rounded by {shown(method)}; sfexport reads gptq and awq.", HINT
        )
    return str(method)


def _one_of(fields: QuantizationFields, file: str, name: str, other: str, default: int | None) -> int | None:
    """Read the value under either of its names."""
    first, second = getattr(fields, name), getattr(fields, other)
    if first is not None and second is not None and first != second:
        raise CheckpointError(f"{file}: {name} is {first} and {other} is {second}.", HINT)
    found = second if first is None else first
    return default if found is None else found


def _refuse_other_forms(fields: QuantizationFields, file: str) -> None:
    plain = {"is_marlin_format": False, "pack_dtype": "int32", "adapter": None, "rotation": None, "zero_point": True}
    plain |= {"load_in_4bit": False, "load_in_8bit": False}
    for name, wanted in plain.items():
        if (value := getattr(fields, name)) != wanted:
            raise CheckpointError(f"{file}: '{name}' is {shown(value)}, which sfexport does not take over.", HINT)
    for rule in fields.dynamic or {}:
        if not rule.startswith("-:"):  # a layer left out; others change a layer's settings
            raise CheckpointError(f"{file}: 'dynamic' changes the settings of {shown(rule)}.", HINT)


def _first(*values: str | None) -> str:
    return next(value for value in values if value is not None)


def _awq_format(fields: QuantizationFields, file: str) -> int:
    layout = _first(fields.version, fields.format, fields.checkpoint_format, "gemm")
    if layout.lower() != "gemm":
        raise CheckpointError(f"{file}: AWQ's layout {shown(layout)} is not the usual 'gemm'.", HINT)
    return 0


def _gptq_offset(fields: QuantizationFields, file: str) -> int:
    """Return the offset of zero points: GPTQ's first format stores them less 1."""
    layout = _first(fields.checkpoint_format, fields.format, "gptq")
    if layout.lower() not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{file}: GPTQ's layout {shown(layout)} is not 'gptq' or 'gptq_v2'.", HINT)
    return int(layout.lower() == "gptq")
