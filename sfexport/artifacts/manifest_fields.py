"""Fields of the manifests `sfexport.json` and `engine.json`, with their types and ranges."""

from __future__ import annotations

import math
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from sfexport.errors import BundleError

AGAIN = "Move it away and run the command that wrote it again."
_LIMIT = 64 << 20  # bytes of a manifest
# A plain file name, without control characters and line separators.
Name = Annotated[str, msgspec.Meta(pattern=r"^(?!\.{1,2}$)[^/\\\x00-\x1f\x7f-\x9f\u2028\u2029]+$", max_length=255)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Text = Annotated[str, msgspec.Meta(max_length=255)]
PathText = Annotated[str, msgspec.Meta(min_length=1, max_length=1 << 15, pattern=r"^[^\x00]+$")]
Share = Annotated[float, msgspec.Meta(ge=0, le=1e300)]

_T = TypeVar("_T")


class _Exact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the structures in which a field that we did not write is a sign of damage."""


class FileFields(_Exact, frozen=True, kw_only=True):
    """A file of a bundle that is no weight file: ONNX graphs, the largest, have less than 2 GiB."""

    size: Annotated[int, msgspec.Meta(ge=0, le=2**31)]
    sha256: Digest


class EngineFileFields(_Exact, frozen=True, kw_only=True):
    size: Size
    sha256: Digest


class PlaceFields(_Exact, frozen=True, kw_only=True):
    relative: PathText
    absolute: PathText


class ValueFields(_Exact, frozen=True, kw_only=True):
    """An input or output of a graph; a dimension is a number, or a name where it is dynamic."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    dtype: Literal["float32", "float16", "bfloat16", "int64", "bool"]
    shape: list[Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | Annotated[str, msgspec.Meta(max_length=255)]]


class GraphFields(_Exact, frozen=True, kw_only=True):
    opset: Annotated[int, msgspec.Meta(ge=18, le=99)]
    nodes: Count
    inputs: Annotated[list[ValueFields], msgspec.Meta(min_length=1)]
    outputs: Annotated[list[ValueFields], msgspec.Meta(min_length=1)]


class GraphsFields(_Exact, frozen=True, kw_only=True):
    vision_encoder: GraphFields
    compressor: GraphFields
    decoder: GraphFields


class ShardFields(_Exact, frozen=True, kw_only=True):
    """A weight file; sha256 is of all bytes, where that was asked for (see sfexport.artifacts.identity)."""

    file: Name
    size: Size
    sampled_sha256: Digest
    sha256: Digest | None


class CheckpointFields(PlaceFields, frozen=True, kw_only=True):
    """The checkpoint that PyTorch loads to compare with, and its weight files."""

    shards: Annotated[list[ShardFields], msgspec.Meta(min_length=1)]


class EmbeddingFields(_Exact, frozen=True, kw_only=True):
    file: Name
    dtype: Literal["F32", "F16", "BF16"]
    shape: tuple[Count, Count]
    offset: Size
    length: Size


class WeightsFields(_Exact, frozen=True, kw_only=True):
    directory: PlaceFields
    shards: Annotated[list[ShardFields], msgspec.Meta(min_length=1)]
    parameters: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    embedding: EmbeddingFields


class OptionsFields(_Exact, frozen=True, kw_only=True):
    precision: Literal["fp32", "fp16", "bf16"]
    frames: Count
    weights: Literal["copy", "reference"]
    quantize: Literal["int4"] | None
    split_lm_head: Count


class RoundedFields(_Exact, frozen=True, kw_only=True):
    weights: Size
    scales: Size
    plain_error: Share
    error: Share


class QuantizationFields(_Exact, frozen=True, kw_only=True):
    method: Literal["int4", "gptq", "awq"]
    lm_head: Literal["int8", "fp16", "int4"]
    int4: RoundedFields
    int8: RoundedFields
    taken: RoundedFields
    matrices: dict[str, dict[str, Any]]


class TokensFields(_Exact, frozen=True, kw_only=True):
    image: Count
    video: Count


class ImageFields(_Exact, frozen=True, kw_only=True):
    """Fields of ImageProcessorConfig, in ranges that pixels can be made with."""

    size: Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]
    crop: Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]
    keep_aspect: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class ModelFields(_Exact, frozen=True, kw_only=True):
    """Sizes read from config.json and the vision tower's tensors."""

    text: dict[str, Any]
    slow_fast: dict[str, Any]
    projector: dict[str, Any]
    tower: dict[str, Any]


class BundleFields(_Exact, frozen=True, kw_only=True):
    """The manifest of a bundle. `model` has to agree with config.json, which is compared."""

    format: int
    sfexport: Text
    digest: Digest
    model: ModelFields
    image: ImageFields
    tokens_per_frame: TokensFields
    options: OptionsFields
    graphs: GraphsFields
    checkpoint: CheckpointFields
    original: PlaceFields
    weights: WeightsFields
    quantization: QuantizationFields | None
    files: dict[Name, FileFields]
    tools: dict[Text, Text]


class RuntimeFields(_Exact, frozen=True, kw_only=True):
    name: Text
    version: Text


class BuiltFromFields(_Exact, frozen=True, kw_only=True):
    relative: PathText
    absolute: PathText
    sha256: Digest


class ReadFields(_Exact, frozen=True, kw_only=True):
    sha256: Digest
    mtime_ns: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class EngineFields(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest of engines of any backend; weights_read: each weight file of the bundle, as the build read it."""

    format: int
    sfexport: Text
    digest: Digest
    backend: Text | None
    target: Text
    machine: Text
    runtime: RuntimeFields
    bundle: BuiltFromFields
    files: dict[Name, EngineFileFields]
    weights_read: dict[Name, ReadFields]


class GpuFields(msgspec.Struct, frozen=True, kw_only=True):
    name: Text
    sm: Count


class LimitsFields(msgspec.Struct, frozen=True, kw_only=True):
    frames: Count
    question_tokens: Count
    new_tokens: Count
    rows: Count


class TensorRTFields(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that TensorRT's engines have besides."""

    gpu: GpuFields
    plugin: Text | None
    limits: LimitsFields
    split_decoder: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    cuda: dict[Text, Text | None]


class RtxFields(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that the engines of TensorRT for RTX have besides."""

    compute_capabilities: list[Text]
    limits: LimitsFields
    split_decoder: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1


def read_manifest(file: Path) -> dict[str, Any]:
    """Read the JSON object in a manifest.

    Raises:
        BundleError: it is not a regular file of strict JSON.
    """
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > _LIMIT:
            raise BundleError(f"{file} is not a manifest.", AGAIN)
        content = msgspec.json.decode(file.read_bytes())
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror or error}.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BundleError(f"{file} is not valid JSON: {error}.", AGAIN) from None
    if not isinstance(content, dict):
        raise BundleError(f"{file} does not hold a JSON object.", AGAIN)
    return content


def check_fields(content: dict[str, Any], kind: type[_T], directory: Path) -> _T:
    """Check the manifest of `directory` against a structure and return it.

    Raises:
        BundleError: naming the field that is missing, unknown, or has another type or range.
    """
    try:
        return msgspec.convert(content, kind, strict=True)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        problem = re.sub(r" matching regex '.*'(?= - |$)", " of another form", str(error))
        raise damaged(directory, problem.replace("`", "'").replace("$.", "")) from None


def damaged(directory: Path, problem: str) -> BundleError:
    return BundleError(f"The manifest in {directory} is damaged: {problem}.", AGAIN)


def is_finite(value: Any) -> bool:
    """Tell whether no number anywhere in a value is infinite or NaN."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
