"""What a checkpoint is, read without torch: the model's facts and where each tensor lies on disk.

Reads config.json and the headers of the safetensors shards; of the weights themselves, `validate` looks at an
SReLU's few numbers and at nothing else. Only safetensors are read: a pickle can run code when it is opened, so
pickled weights are refused.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sfexport.errors import CheckpointError
from sfexport.facts import TOWER_PREFIX, ModelFacts
from sfexport.images import ImageFacts
from sfexport.towers import Tower, VitTower, read_tower

SINGLE_FILE = "model.safetensors"
# What to do about weights that are not finite.
NO_NUMBERS = "The training diverged, or the file is damaged: get it again."
INDEX_FILE = "model.safetensors.index.json"
PICKLE_PATTERNS = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt")
# Files besides the weights that a bundle takes along.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
READABLE = ("F32", "F16", "BF16")
# Other dtypes may stand in a checkpoint as long as the model does not need the tensor.
DTYPE_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2},
    **{"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8},
}
HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own limit
_LAYER_SCALE = re.compile(re.escape(TOWER_PREFIX) + r"stages\.\d+\.blocks\.\d+\.gamma$")
_UNUSED = re.compile(re.escape(TOWER_PREFIX) + r"(head\.|vision_model\.(head|post_layernorm)\.)")


@dataclass(frozen=True)
class Tensor:
    """One tensor's place: `length` bytes at `offset` of `shard` (a real path, symlinks resolved)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    offset: int
    length: int

    def rows(self, index: np.ndarray | None = None) -> np.ndarray:
        """The tensor, or its rows `index`, as float32, read from the mapped file.

        Only the rows asked for are copied. bfloat16 has no NumPy type: its bits are the upper half of a float32.
        """
        values = np.array(self._mapped if index is None else self._mapped[index])
        if self.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)

    @cached_property
    def _mapped(self) -> np.ndarray:
        """The stored values in the mapped file (bfloat16 as uint16); mapped once, since decoding asks per token."""
        stored = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[self.dtype]
        mapped = np.memmap(self.shard, dtype=np.uint8, mode="r", offset=self.offset, shape=(self.length,))
        return mapped.view(stored).reshape(self.shape)


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its size and the digest of its header, which a bundle's manifest keeps."""

    name: str
    path: Path
    size: int
    header_sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory. Open one with `Checkpoint.open`."""

    path: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read config.json and all shard headers.

        Raises:
            CheckpointError: no such directory, not a checkpoint, pickles only, a damaged or truncated shard.
        """
        path = Path(path)
        if not path.is_dir():
            problem = "is not a directory" if path.exists() else "does not exist"
            raise CheckpointError(f"The checkpoint {path} {problem}.", "Name the directory that holds config.json.")
        config = read_json(path / "config.json", "A checkpoint directory has a config.json beside its weights.")
        shards, tensors = [], {}
        for name in _shard_names(path):
            shard, found = read_shard(path / name, name)
            shards.append(shard)
            if twice := sorted(tensors.keys() & found.keys()):
                raise CheckpointError(
                    f"Tensor '{twice[0]}' is in two shards of {path}: {tensors[twice[0]].shard.name} and {name}.",
                    "Remove the shard that belongs to another model.",
                )
            tensors |= found
        return cls(path, config, tuple(shards), tensors)

    @cached_property
    def facts(self) -> ModelFacts:
        return ModelFacts.from_config(self.config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @cached_property
    def tower(self) -> Tower:
        return read_tower(self.config, self.shapes)

    @cached_property
    def image(self) -> ImageFacts:
        file = self.path / "preprocessor_config.json"
        return ImageFacts.from_config(self.config, self.tower, read_json(file) if file.is_file() else None)

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of all tensors this model must have."""
        return self.facts.expected_tensors() | self.tower.expected_tensors()

    @property
    def half_precision(self) -> str:
        """The 16-bit type that fits the weights best: their own where most are stored so, else fp16."""
        stored = Counter(t.dtype for t in self.tensors.values())
        return "bf16" if stored["BF16"] > stored["F16"] + stored["F32"] else "fp16"

    def unused_tensors(self) -> list[str]:
        """Tensors that the reference stores and never uses (the tower's head)."""
        return sorted(name for name in self.tensors if _UNUSED.match(name))

    def notes(self) -> list[str]:
        """What the checkpoint holds and sfexport leaves out, a line each; `export` and `inspect` print them."""
        unused = self.unused_tensors()
        return [f"not used: {len(unused)} tensors ({unused[0]}, ...)"] if unused else []

    def validate(self) -> None:
        """Check the name, shape and dtype of every tensor that the model needs, and that a frame gives tokens.

        Of values only an SReLU's few are read: they must be finite.

        Raises:
            CheckpointError: naming the missing tensors, or the tensor with the wrong shape and both shapes, or
                the SReLU tensor that is not finite.
        """
        facts, tower = self.facts, self.tower
        if facts.projector.in_size != tower.out_size:
            raise CheckpointError(
                f"config.json: mm_hidden_size is {facts.projector.in_size}, but the vision tower's tensors give "
                f"{tower.out_size} features.",
                "config.json may belong to another model.",
            )
        expected = self.expected_tensors()
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CheckpointError(
                f"The checkpoint {self.path} lacks {', '.join(missing[:3])}{more}.",
                "The download may be incomplete, or config.json may belong to another model.",
            )
        for name, shape in expected.items():
            tensor = self.tensors[name]
            if tensor.shape != shape:
                raise CheckpointError(
                    f"Tensor '{name}' in {tensor.shard.name} has shape {list(tensor.shape)}; config.json asks for "
                    f"{list(shape)}.",
                    "config.json may belong to another model.",
                )
            if tensor.dtype not in READABLE:
                raise CheckpointError(
                    f"Tensor '{name}' in {tensor.shard.name} is stored as {tensor.dtype}; sfexport reads "
                    f"{', '.join(READABLE)}.",
                    "Save the model in one of these.",
                )
        self._check_srelu()
        self._check_frame_size()

    def _check_srelu(self) -> None:
        """Training can blow these up without a sign: a comparison with NaN just never holds."""
        for name in self.facts.projector.srelu_tensors():
            tensor = self.tensors[name]
            if not np.isfinite(tensor.rows()).all():
                raise CheckpointError(
                    f"Tensor '{name}' in {tensor.shard.name} has values that are not finite numbers.",
                    "The training of this SReLU diverged, or the file is damaged.",
                )

    def _check_frame_size(self) -> None:
        side, stride = self.tower.grid(self.image.crop), self.facts.slow_fast.video_pooling_stride
        if side < stride:
            raise CheckpointError(
                f"Frames of {self.image.crop} x {self.image.crop} pixels give {side} x {side} tokens, too few for "
                f"mm_video_pooling_stride {stride} in config.json.",
                "Correct crop_size in preprocessor_config.json.",
            )
        if isinstance(self.tower, VitTower) and self.image.crop != self.tower.image_size:
            raise CheckpointError(
                f"preprocessor_config.json makes frames of {self.image.crop} x {self.image.crop} pixels, but the "
                f"vision tower's position embeddings are for {self.tower.image_size} x {self.tower.image_size}.",
                "preprocessor_config.json may belong to another model.",
            )

    def side_files(self) -> list[Path]:
        """The files beside the weights that this checkpoint has and a bundle takes along."""
        return [self.path / name for name in SIDE_FILES if (self.path / name).is_file()]


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError saying what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.", "It may be damaged; get it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.", "It may be damaged; get it again.")
    return value


def _shard_names(path: Path) -> list[str]:
    if os.path.lexists(path / INDEX_FILE):
        weight_map = read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / INDEX_FILE} has no weight_map.", "Download it again.")
        return [_plain_name(name) for name in sorted(set(map(str, weight_map.values())))]
    if os.path.lexists(path / SINGLE_FILE):
        return [SINGLE_FILE]
    pickles = [file.name for pattern in PICKLE_PATTERNS for file in path.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"The checkpoint {path} has only pickled weights ({pickles[0]}), which can run code when opened.",
            "Convert them with transformers: model.save_pretrained(DIR, safe_serialization=True).",
        )
    raise CheckpointError(f"The checkpoint {path} has no {SINGLE_FILE} and no {INDEX_FILE}.", "Download it again.")


def _plain_name(name: str) -> str:
    if Path(name).name != name or "\0" in name or not name.isprintable():
        raise CheckpointError(
            f"{INDEX_FILE} names the shard {name!r}, which is not a plain file name.", "Download it again."
        )
    return name


def read_shard(path: Path, name: str) -> tuple[Shard, dict[str, Tensor]]:
    """A safetensors file and the tensors in its header. Raises CheckpointError where it is missing or damaged."""
    try:
        real = path.resolve(strict=True)
        size = real.stat().st_size
        with real.open("rb") as file:
            header = _read_header(file.read(8), file, path)
    except FileNotFoundError:
        what = "is a link to a file that is gone" if path.is_symlink() else "does not exist"
        raise CheckpointError(f"The shard {path} {what}.", "Download the checkpoint again.") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise CheckpointError(f"The shard {path} cannot be read: {error}.", "Download it again.") from None
    tensors = _parse_header(header, real, path)
    end = max((t.offset + t.length for t in tensors.values()), default=8 + len(header))
    if size < end:
        raise CheckpointError(
            f"The shard {path} is truncated: it has {size:,} bytes and its header promises {end:,}.",
            "Download it again.",
        )
    return Shard(name, real, size, sha256(header).hexdigest()), tensors


def _read_header(prefix: bytes, file: Any, path: Path) -> bytes:
    length = int.from_bytes(prefix, "little")
    header = file.read(length) if len(prefix) == 8 and 0 < length <= HEADER_LIMIT else b""
    if not header or len(header) < length:
        raise CheckpointError(
            f"The shard {path} is not a safetensors file, or is truncated within its header.", "Download it again."
        )
    return header


def _parse_header(header: bytes, real: Path, path: Path) -> dict[str, Tensor]:
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = [_tensor(name, entry, real, 8 + len(header)) for name, entry in entries.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"The shard {path} has a damaged safetensors header ({error}).", "Download it again."
        ) from None
    tensors.sort(key=lambda t: (t.offset, t.length))
    for first, second in pairwise(tensors):
        if second.offset < first.offset + first.length:
            raise CheckpointError(
                f"The shard {path} has a damaged safetensors header: the tensors '{first.name}' and '{second.name}' "
                "overlap.",
                "Download it again.",
            )
    return {tensor.name: tensor for tensor in tensors}


def _tensor(name: str, entry: dict[str, Any], shard: Path, data_start: int) -> Tensor:
    """Raises ValueError, TypeError or KeyError for an entry that makes no sense."""
    (begin, end), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise ValueError(f"'{name}' has shape {list(shape)} and data offsets {[begin, end]}")
    if _LAYER_SCALE.match(name):  # timm's and open_clip's spelling of the reference's '.weight'
        name = name.removesuffix("gamma") + "weight"
    length = math.prod(shape) * DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else end - begin
    if end - begin != length or length < 0:
        raise ValueError(f"'{name}' has shape {list(shape)} in {dtype} and data offsets {[begin, end]}")
    return Tensor(name, dtype, shape, shard, data_start + begin, length)
