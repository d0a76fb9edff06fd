"""What a checkpoint is, read without torch: the model's facts and where each tensor lies on disk.

Reads config.json and the headers of the safetensors shards; never the weights themselves. Only safetensors
are read: a pickle can run code when it is opened, so pickled weights are refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from sfexport.errors import CheckpointError, InputError
from sfexport.facts import TOWER_PREFIX, ModelFacts
from sfexport.towers import ImageFacts, Tower, read_tower

SINGLE_FILE = "model.safetensors"
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
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
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
        stored = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[self.dtype]
        mapped = np.memmap(self.shard, dtype=np.uint8, mode="r", offset=self.offset, shape=(self.length,))
        values = mapped.view(stored).reshape(self.shape)
        values = np.array(values if index is None else values[index])
        if self.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)


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
            raise CheckpointError(f"The checkpoint {path} {problem}.")
        config = read_json(path / "config.json", "A checkpoint directory has a config.json beside its weights.")
        shards, tensors = [], {}
        for name in _shard_names(path):
            shard, found = _read_shard(path / name, name)
            shards.append(shard)
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

    def unused_tensors(self) -> list[str]:
        """Tensors that the reference stores and never uses (the tower's head)."""
        return sorted(name for name in self.tensors if _UNUSED.match(name))

    def validate(self) -> None:
        """Check every tensor's name and shape.

        Raises:
            CheckpointError: naming the missing tensors, or the tensor with the wrong shape and both shapes.
        """
        facts, tower = self.facts, self.tower
        if facts.projector.in_size != tower.out_size:
            raise CheckpointError(
                f"config.json: mm_hidden_size is {facts.projector.in_size}, but the vision tower's tensors give "
                f"{tower.out_size} features."
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
            if self.tensors[name].shape != shape:
                raise CheckpointError(
                    f"Tensor '{name}' in {self.tensors[name].shard.name} has shape {list(self.tensors[name].shape)}; "
                    f"config.json asks for {list(shape)}."
                )

    def side_files(self) -> list[Path]:
        """The files beside the weights that this checkpoint has and a bundle takes along."""
        return [self.path / name for name in SIDE_FILES if (self.path / name).is_file()]

    def read_side_file(self, name: str) -> dict[str, Any]:
        """A side file's content, or an empty dictionary where the checkpoint has none."""
        return read_json(self.path / name) if (self.path / name).is_file() else {}


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError saying what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return value


def _shard_names(path: Path) -> list[str]:
    if (path / INDEX_FILE).is_file():
        weight_map = read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / INDEX_FILE} has no weight_map.")
        return sorted(set(weight_map.values()))
    if (path / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    pickles = [file.name for pattern in PICKLE_PATTERNS for file in path.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"The checkpoint {path} has only pickled weights ({pickles[0]}), which can run code when opened.",
            "Convert them with transformers: model.save_pretrained(DIR, safe_serialization=True).",
        )
    raise CheckpointError(f"The checkpoint {path} has no {SINGLE_FILE} and no {INDEX_FILE}.")


def _read_shard(path: Path, name: str) -> tuple[Shard, dict[str, Tensor]]:
    if Path(name).name != name:
        raise CheckpointError(f"{INDEX_FILE} names the shard {name!r}, which is not a plain file name.")
    try:
        real = path.resolve(strict=True)
        size = real.stat().st_size
        with real.open("rb") as file:
            header = _read_header(file.read(8), file, path)
    except FileNotFoundError:
        what = "is a link to a file that is gone" if path.is_symlink() else "does not exist"
        raise CheckpointError(f"The shard {path} {what}.", "Download the checkpoint again.") from None
    except OSError as error:
        raise CheckpointError(f"The shard {path} cannot be read: {error}.") from None
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
        raise CheckpointError(f"The shard {path} is not a safetensors file, or is truncated within its header.")
    return header


def _parse_header(header: bytes, real: Path, path: Path) -> dict[str, Tensor]:
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        return {t.name: t for t in (_tensor(name, e, real, 8 + len(header)) for name, e in entries.items())}
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"The shard {path} has a damaged safetensors header ({error}).") from None


def _tensor(name: str, entry: dict[str, Any], shard: Path, data_start: int) -> Tensor:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if _LAYER_SCALE.match(name):  # timm's and open_clip's spelling of the reference's '.weight'
        name = name.removesuffix("gamma") + "weight"
    if dtype not in DTYPE_BYTES and not _UNUSED.match(name):
        raise CheckpointError(
            f"Tensor '{name}' in {shard.name} is stored as {dtype}.", "sfexport reads F32, F16 and BF16 weights."
        )
    if begin < 0 or end - begin != int(np.prod(shape, dtype=np.int64)) * DTYPE_BYTES.get(dtype, 0):
        raise CheckpointError(f"Tensor '{name}' in {shard.name}: shape {list(shape)} and data offsets disagree.")
    return Tensor(name, dtype, shape, shard, data_start + begin, end - begin)
