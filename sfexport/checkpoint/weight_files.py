"""Choose which of a directory's files hold the model's weights, in transformers' order, and name the others.

model.safetensors comes first, then the shards of model.safetensors.index.json; a pickle can run code when it is
opened and is never read.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sfexport.checkpoint.small_files import is_present, read_json
from sfexport.errors import CheckpointError
from sfexport.fields import shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
MERGE_HINT = (
    "Merge it first: peft.PeftModel.from_pretrained(model, ADAPTER).merge_and_unload().save_pretrained(DIR); "
    "where the weights are merged already, remove the adapter's files."
)
_PICKLES = re.compile(r".+\.(bin|pth|pt|ckpt)")
_WEIGHTS = re.compile(r".+\.(safetensors|bin|pth|pt|ckpt|gguf|h5|msgpack|distcp)(\.index\.json)?")
# What trainers leave beside a model: no weights of it.
_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_NAMED = 6  # files that a line names


@dataclass(frozen=True)
class WeightFiles:
    """The files that the weights are read from.

    Attributes:
        indexed: model.safetensors.index.json names them.
        ignored: other files of weights in the same directory.
    """

    names: tuple[str, ...]
    indexed: bool
    ignored: tuple[str, ...]

    def notes(self) -> list[str]:
        """Return a line for people, where files were ignored."""
        if not self.ignored:
            return []
        taken = INDEX_FILE if self.indexed else SINGLE_FILE
        more = f" and {len(self.ignored) - _NAMED} more" if len(self.ignored) > _NAMED else ""
        names = ", ".join(shown(name)[1:-1] for name in self.ignored[:_NAMED])
        return [f"weights are read from {taken}, which transformers takes first too; ignored: {names}{more}"]


def choose_weights(path: Path) -> WeightFiles:
    """Choose the weight files of the checkpoint in a directory.

    Raises:
        CheckpointError: none that can be read, an index that makes no sense, or an adapter that is to be merged.
    """
    refuse_adapter(path)
    try:
        present = sorted(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error}.") from None
    if distributed := [name for name in present if _DISTRIBUTED.fullmatch(name)]:
        raise CheckpointError(
            f"The checkpoint {path} has distributed weights ({distributed[0]}), which transformers takes before any "
            "others.",
            "Save the model with save_pretrained into a new directory.",
        )
    if (path / SINGLE_FILE).is_file():
        return _with_ignored((SINGLE_FILE,), False, present)
    if is_present(path / INDEX_FILE):
        return _with_ignored(_shard_names(path / INDEX_FILE), True, present)
    if os.path.lexists(path / SINGLE_FILE):
        return WeightFiles((SINGLE_FILE,), False, ())  # a dangling link or a directory: reading it says so
    _refuse_others(path, present)
    raise CheckpointError(f"The checkpoint {path} has no {SINGLE_FILE} and no {INDEX_FILE}.", "Download it again.")


def refuse_adapter(path: Path) -> None:
    """Refuse a directory with an adapter (CheckpointError): transformers with peft would apply it to the model."""
    if not os.path.lexists(path / ADAPTER_FILE):
        return
    base = read_json(path / ADAPTER_FILE).get("base_model_name_or_path") if is_present(path / ADAPTER_FILE) else None
    whole = any(os.path.lexists(path / name) for name in (SINGLE_FILE, INDEX_FILE))
    what = "has an adapter beside its weights" if whole else "holds an adapter and not a whole model"
    of = f", made for {shown(base)}" if isinstance(base, str) and base else ""
    raise CheckpointError(f"{path} {what} ({ADAPTER_FILE}{of}); sfexport does not apply it.", MERGE_HINT)


def _with_ignored(names: tuple[str, ...], indexed: bool, present: list[str]) -> WeightFiles:
    used = {*names, INDEX_FILE} if indexed else set(names)
    ignored = [n for n in present if n not in used and _WEIGHTS.fullmatch(n) and not _TRAINING.fullmatch(n)]
    return WeightFiles(names, indexed, tuple(ignored))


def _refuse_others(path: Path, present: list[str]) -> None:
    others = [name for name in present if _WEIGHTS.fullmatch(name) and not _TRAINING.fullmatch(name)]
    if adapters := [name for name in others if name.startswith(("adapter_model", "non_lora_trainables"))]:
        raise CheckpointError(f"{path} holds an adapter ({adapters[0]}) and not a whole model.", MERGE_HINT)
    pickles = [name for name in others if _PICKLES.fullmatch(name)]
    if "mm_projector.bin" in pickles and len(pickles) == 1:
        raise CheckpointError(
            f"{path} has the projector's weights only (mm_projector.bin): the first stage of a training.",
            "Name the checkpoint of the whole model.",
        )
    if pickles:
        raise CheckpointError(
            f"The checkpoint {path} has only pickled weights ({pickles[0]}), which can run code when opened.",
            "Convert them with transformers: model.save_pretrained(DIR, safe_serialization=True).",
        )
    if others:
        raise CheckpointError(
            f"The checkpoint {path} has no {SINGLE_FILE} and no {INDEX_FILE}, only {shown(others[0])[1:-1]}.",
            "Save the model with transformers: model.save_pretrained(DIR).",
        )


def _shard_names(index: Path) -> tuple[str, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.", "Download it again.")
    return tuple(_plain_name(name) for name in sorted(set(map(str, weight_map.values()))))


def _plain_name(name: str) -> str:
    if Path(name).name != name or "\0" in name or not name.isprintable():
        raise CheckpointError(
            f"{INDEX_FILE} names the shard {name!r}, which is not a plain file name.", "Download it again."
        )
    return name
