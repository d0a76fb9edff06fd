"""Open a checkpoint without torch: its config, and where each tensor lies on disk.

Reads config.json and the headers of the safetensors shards; of the weights themselves, `validate` looks at an
SReLU's few numbers and at nothing else. Only safetensors are read: a pickle can run code when it is opened, so
pickled weights are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sfexport.checkpoint.config import TOWER_PREFIX, ModelConfig
from sfexport.checkpoint.config_fields import ConfigFields
from sfexport.checkpoint.generation_config import generation_notes
from sfexport.checkpoint.image_processor import ImageProcessorConfig, image_notes
from sfexport.checkpoint.safetensors import Shard, Tensor, read_shard
from sfexport.checkpoint.small_files import is_present, read_json, read_optional_json
from sfexport.checkpoint.tokenizer_files import tokenizer_notes
from sfexport.checkpoint.vision_tower import Tower, VitTower, read_tower
from sfexport.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE, WeightFiles, choose_weights, refuse_adapter
from sfexport.dtypes import Precision
from sfexport.errors import CheckpointError
from sfexport.fields import shown, unknown_fields
from sfexport.values import as_path

__all__ = [
    "INDEX_FILE",
    "NO_NUMBERS",
    "SIDE_FILES",
    "SINGLE_FILE",
    "Checkpoint",
    "Shard",
    "Tensor",
    "read_json",
    "read_shard",
]

# The hint for weights that are not finite.
NO_NUMBERS = "The training diverged, or the file is damaged: get it again."
# Files besides the weights that a bundle takes along.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
READABLE = tuple(precision.safetensors for precision in Precision)
_NAMED = 6  # names in a line
HEAD = "lm_head.weight"
# Stored by the reference or by transformers, and never used.
_NEVER_USED = re.compile(
    re.escape(TOWER_PREFIX) + r"(head\.|vision_model\.(head|post_layernorm|encoder\.layers)\.|.*position_ids$)"
    r"|.*\.rotary_emb\.inv_freq$"
)
# Parts that config.json turns on and off: their tensors say that it should have.
_CROSS_ATTENTION = re.compile(r"model\.layers\.\d+\.self_attn\.cross_attn_")
_PROJECTOR = re.compile(r"model\.mm_projector\.")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory. Open one with `Checkpoint.open`."""

    path: Path
    raw_config: dict[str, Any]
    shards: tuple[Shard, ...] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)
    weight_files: WeightFiles | None = field(default=None, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a checkpoint: read config.json and all shard headers.

        Raises:
            CheckpointError: no such directory, not a checkpoint, pickles only, an adapter that is not merged, a
                damaged or truncated shard.
        """
        path = as_path(path, "A checkpoint")
        if not path.is_dir():
            problem = "is not a directory" if path.exists() else "does not exist"
            raise CheckpointError(f"The checkpoint {path} {problem}.", "Name the directory that holds config.json.")
        config = _read_config(path)
        shards: list[Shard] = []
        tensors: dict[str, Tensor] = {}
        weight_files = choose_weights(path)
        for name in weight_files.names:
            shard, found = read_shard(path / name, name)
            shards.append(shard)
            if twice := sorted(tensors.keys() & found.keys()):
                raise CheckpointError(
                    f"Tensor '{twice[0]}' is in two shards of {path}: {tensors[twice[0]].shard.name} and {name}.",
                    "Remove the shard that belongs to another model.",
                )
            tensors |= found
        return cls(path, config, tuple(shards), tensors, weight_files)

    @cached_property
    def config(self) -> ModelConfig:
        """The model as its tensors are: a stored head is used even where config.json ties it, as transformers does."""
        config = ModelConfig.from_dict(self.raw_config)
        if config.text.tie_word_embeddings and HEAD in self.tensors:
            return replace(config, text=replace(config.text, tie_word_embeddings=False))
        return config

    @property
    def fields(self) -> ConfigFields:
        return ConfigFields.read(self.raw_config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @cached_property
    def tower(self) -> Tower:
        return read_tower(self.raw_config, self.shapes)

    @cached_property
    def processor(self) -> dict[str, Any] | None:
        """The image processor's fields, where the checkpoint has them; processor_config.json's come first."""
        whole = read_optional_json(self.path / "processor_config.json") or {}
        nested = whole.get("image_processor")
        return nested if isinstance(nested, dict) else read_optional_json(self.path / "preprocessor_config.json")

    @cached_property
    def image(self) -> ImageProcessorConfig:
        return ImageProcessorConfig.from_dict(self.raw_config, self.tower, self.processor)

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """List all tensors this model must have: name -> shape."""
        return self.config.expected_tensors() | self.tower.expected_tensors()

    @property
    def half_precision(self) -> str:
        """The 16-bit type that fits the weights best: their own where most are stored so, else fp16."""
        stored = Counter(t.dtype for t in self.tensors.values())
        return "bf16" if stored["BF16"] > stored["F16"] + stored["F32"] else "fp16"

    def unused_tensors(self) -> list[str]:
        """List stored tensors that the model does not have or never uses (the tower's head)."""
        return sorted(self.tensors.keys() - self.expected_tensors().keys())

    def notes(self) -> list[str]:
        """List what the checkpoint holds and sfexport leaves out, one line each, for `export` and `inspect`."""
        notes = self.weight_files.notes() if self.weight_files else []
        if self.fields.tie_word_embeddings and HEAD in self.tensors:
            notes.append(f"config.json ties the head to the embedding; the stored {HEAD} is used, as transformers does")
        if unknown := unknown_fields(ConfigFields, self.raw_config):
            more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
            notes.append(f"config.json: not known and not used: {', '.join(map(shown, unknown[:_NAMED]))}{more}")
        notes += [f"{name} is not used: no weights are rounded" for name in self._stale_settings()]
        notes += image_notes(self.raw_config, self.tower, self.processor)
        unused = self.unused_tensors()
        known = [name for name in unused if _NEVER_USED.match(name)]
        if known:
            notes.append(f"not used, as in the reference: {len(known)} tensors ({_folded(known)})")
        if others := sorted(set(unused) - set(known)):
            notes.append(f"not used, as transformers leaves them out: {len(others)} tensors ({_folded(others)})")
        return notes + tokenizer_notes(self.path) + generation_notes(self.path)

    def validate(self) -> None:
        """Check the name, shape and dtype of every tensor that the model needs, and that a frame gives tokens.

        Of values only an SReLU's few are read: they must be finite.

        Raises:
            CheckpointError: naming the missing tensors, or the tensor with the wrong shape and both shapes, or
                the SReLU tensor that is not finite.
        """
        config, tower = self.config, self.tower
        if config.projector.in_size != tower.out_size:
            raise CheckpointError(
                f"config.json: mm_hidden_size is {config.projector.in_size}, but the vision tower's tensors give "
                f"{tower.out_size} features.",
                "config.json may belong to another model.",
            )
        self._check_counts()
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
        self._check_left_out()
        self._check_srelu()
        self._check_frame_size()

    def _stale_settings(self) -> list[str]:
        if any(name.endswith(".qweight") for name in self.tensors) or self.raw_config.get("quantization_config"):
            return []
        return [name for name in ("quantize_config.json", "quant_config.json") if (self.path / name).is_file()]

    def _check_counts(self) -> None:
        """Check, before any loop over a count of config.json, that there is a tensor of each counted part."""
        projector, layers = self.config.projector, self.config.text.num_layers
        last = f"model.layers.{layers - 1}.input_layernorm.weight"
        if layers > len(self.tensors):
            raise CheckpointError(
                f"The checkpoint {self.path} lacks {last}: config.json has {layers:,} num_hidden_layers.",
                "The download may be incomplete, or config.json may belong to another model.",
            )
        if projector.kind == "identity" and projector.in_size != self.config.text.hidden_size:
            raise CheckpointError(
                f"config.json: mm_projector_type 'identity' cannot make {self.config.text.hidden_size} features of "
                f"{projector.in_size}.",
                "config.json may belong to another model.",
            )

    def _check_left_out(self) -> None:
        """Refuse tensors of a part that config.json turns off, or makes smaller than it is stored."""
        for name in self.unused_tensors():
            if _CROSS_ATTENTION.match(name):
                field = "cross_attn_gating_type" if name.endswith("warm_up_gate") else "cross_attn_*"
                part = f"the cross-attention ({field})"
            elif _PROJECTOR.match(name):
                part = "the projector (mm_projector_type)"
            elif name == "lm_head.qweight":
                part = "the head (tie_word_embeddings)"
            else:
                continue
            raise CheckpointError(
                f"The checkpoint has the tensor '{name}', which {part} in config.json leaves out.",
                "config.json may have been changed, or belong to another model.",
            )

    def _check_srelu(self) -> None:
        """Check that an SReLU's numbers are finite: comparisons with NaN are false, so outputs would not show it."""
        for name in self.config.projector.srelu_tensors():
            tensor = self.tensors[name]
            if not np.isfinite(tensor.rows()).all():
                raise CheckpointError(
                    f"Tensor '{name}' in {tensor.shard.name} has values that are not finite numbers.",
                    "The training of this SReLU diverged, or the file is damaged.",
                )

    def _check_frame_size(self) -> None:
        side, stride = self.tower.grid(self.image.crop), self.config.slow_fast.video_pooling_stride
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
        """List the files beside the weights that a bundle takes along.

        Raises:
            CheckpointError: one is a link to nothing or out of the checkpoint, too large, or not a JSON object.
        """
        files = [self.path / name for name in SIDE_FILES if is_present(self.path / name)]
        for file in files:
            if file.suffix == ".json":
                read_json(file)
        return files


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not is_present(file):
        refuse_adapter(path)
    return read_json(file, "A checkpoint directory has a config.json beside its weights.")


def _folded(names: list[str]) -> str:
    """Fold names that differ in numbers only, 'model.layers.*.self_attn.q_norm.weight, ...', and keep the first few."""
    folded = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))
    more = ", ..." if len(folded) > _NAMED else ""
    return ", ".join(shown(name)[1:-1] for name in folded[:_NAMED]) + more
