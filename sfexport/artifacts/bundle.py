"""Open a bundle: a directory with three graphs and a manifest `sfexport.json`.

Neither the manifest nor the files it lists are trusted: types, names, digests and places are checked at every open.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sfexport.artifacts.identity import has_content, has_weights
from sfexport.artifacts.manifest_fields import BundleFields, check_fields, damaged, is_finite
from sfexport.artifacts.manifest_files import BUNDLE_FILE, check_files, gone, open_manifest, places
from sfexport.checkpoint.checkpoint import Checkpoint, Tensor, read_json
from sfexport.checkpoint.config import ModelConfig
from sfexport.checkpoint.image_processor import FILE as PROCESSOR
from sfexport.checkpoint.image_processor import ImageProcessorConfig
from sfexport.checkpoint.safetensors import read_shard
from sfexport.checkpoint.vision_tower import tower_from_sizes
from sfexport.errors import BundleError, CheckpointError, InputError

GRAPHS = ("vision_encoder", "compressor", "decoder")
# Formats that a decoder's linear weights can be rounded to.
QUANTIZATIONS = ("int4",)
# Bits of the weights that are held as integers ('taken', manifests' word for prequantized: the checkpoint's own codes).
_INTEGER_BITS = {"int4": 4, "int8": 8, "taken": 4}
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: three graphs, side files, and where the weights are.

    Attributes:
        path: the directory.
        content: the manifest.
    """

    path: Path
    content: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Open a bundle: check the manifest, every file's sha256, every weight file's size and sampled content.

        Raises:
            BundleError: naming what is missing or changed.
        """
        content = open_manifest(path, BUNDLE_FILE, "a bundle")
        check_fields(content, BundleFields, path)
        if not is_finite(content):
            raise damaged(path, "a number in it is not finite")
        bundle = cls(path, content)
        inside = bundle._weight_files if content["weights"]["directory"]["relative"] == "." else {}
        needed = ["config.json", *(f"{name}.onnx" for name in GRAPHS)]
        check_files(path, content["files"], BUNDLE_FILE, needed, set(inside))
        _ = bundle.weights_directory  # raises where no directory has the weights
        bundle._check_content()
        return bundle

    @cached_property
    def weights_directory(self) -> Path:
        """The real directory that the graphs' external data lies in: the first whose files have the right content."""
        stored = self.content["weights"]["directory"]
        problems = []
        for directory in places(stored, self.path):
            problem = self._weights_problem(directory)
            if problem is None:
                return directory
            problems.append(problem)
        if problems:
            raise problems[0]
        hint = "Export again, or export with --weights copy to get a bundle that can be moved."
        raise gone(stored, self.path, "its weights", hint)

    @property
    def _weight_files(self) -> dict[str, dict[str, Any]]:
        return {shard["file"]: shard for shard in self.content["weights"]["shards"]}

    @property
    def weight_sizes(self) -> dict[str, int]:
        """Bytes of each file in `weights_directory` that belongs to this bundle."""
        return {name: shard["size"] for name, shard in self._weight_files.items()}

    @property
    def weight_digests(self) -> dict[str, str | None]:
        """sha256 of all bytes of each weight file; None where the export did not read them all."""
        return {name: shard["sha256"] for name, shard in self._weight_files.items()}

    @property
    def checkpoint_path(self) -> Path:
        """The checkpoint the bundle was exported from (the bundle itself where weights were copied).

        Raises:
            BundleError: it is gone, or its weights are others.
        """
        stored, hint = self.content["checkpoint"], "Put it back, or export again."
        found = places(stored, self.path)
        for path in found:
            if self._has_weights(path):
                return path
        if found:
            raise BundleError(f"The checkpoint {found[0]} is not the one {self.path} was exported from.", hint)
        raise gone(stored, self.path, "its checkpoint", hint)

    @property
    def original_checkpoint(self) -> Path | None:
        """The checkpoint directory that was exported, where it was then, whatever is in it now; None if it is gone.

        Where the tree has moved and another checkpoint stands at the old place, the one that moved along.
        """
        own = Path(os.path.realpath(self.path))
        found = [path for path in places(self.content["original"], self.path) if path != own]
        found = [path for path in found if (path / "config.json").is_file()]
        if len(found) > 1:
            found.sort(key=lambda path: not self._has_weights(path))
        return found[0] if found else None

    def _has_weights(self, checkpoint: Path) -> bool:
        """Tell whether a directory holds the checkpoint that was exported."""
        try:
            return has_weights(Checkpoint.open(checkpoint).shards, self.content["checkpoint"]["shards"])
        except (InputError, OSError):
            return False

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """The checkpoint's config.json as it is."""
        return read_json(self.path / "config.json")

    @cached_property
    def config(self) -> ModelConfig:
        """The model as its graphs are: config.json may tie a head that the checkpoint stores all the same."""
        config = ModelConfig.from_dict(self.raw_config)
        tied = config.text.tie_word_embeddings and self.content["model"]["text"].get("tie_word_embeddings") is not False
        return replace(config, text=replace(config.text, tie_word_embeddings=tied))

    @cached_property
    def image(self) -> ImageProcessorConfig:
        """Preprocessing of frames."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.content["image"].items()
        }
        return ImageProcessorConfig(**fields)

    @property
    def frames(self) -> int:
        """Frames sampled from a video unless a question's caller says otherwise."""
        frames: int = self.content["options"]["frames"]
        return frames

    @property
    def precision(self) -> str:
        """Type the graphs compute in: one of dtypes.PRECISIONS."""
        precision: str = self.content["options"]["precision"]
        return precision

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The manifest's account of the rounding: method, lm_head, errors; None: nothing was rounded."""
        return self.content.get("quantization")

    def weight_bytes(self, width: int) -> int:
        """Compute the bytes of the weights with floats in `width` bytes each and integers as they are stored."""
        floats: int = self.content["weights"]["parameters"]
        integers = 0
        if quantization := self.quantization:
            for kind, bits in _INTEGER_BITS.items():
                weights, scales = (quantization[kind][part] for part in ("weights", "scales"))
                floats, integers = floats - weights + scales, integers + weights * bits // 8
        return width * floats + integers

    def tokens_per_frame(self, single_image: bool) -> int:
        """Return the number of slow tokens of a frame: pooled for a video, all for a single image."""
        count: int = self.content["tokens_per_frame"]["image" if single_image else "video"]
        return count

    def graph_file(self, name: str) -> Path:
        """Return the path of the graph `name`, one of GRAPHS."""
        return self.path / f"{name}.onnx"

    def embedding(self) -> Tensor:
        """Find the token embedding's place in its shard; rows are read one by one, never the whole table."""
        stored = self.content["weights"]["embedding"]
        return Tensor(
            name=EMBEDDING,
            dtype=stored["dtype"],
            shape=tuple(stored["shape"]),
            shard=self.weights_directory / stored["file"],
            offset=stored["offset"],
            length=stored["length"],
        )

    def generation_config(self) -> dict[str, Any]:
        """Read generation_config.json; empty where the checkpoint has none."""
        name = "generation_config.json"
        return read_json(self.path / name) if name in self.content["files"] else {}

    def _weights_problem(self, directory: Path) -> BundleError | None:
        """Find out why a directory's files are not this bundle's weights; None: they are."""
        for name, promised in self._weight_files.items():
            if not (directory / name).is_file():
                return BundleError(f"The weight shard {directory / name} is missing.", "Put it back or export again.")
            if not has_content(directory / name, promised):
                return BundleError(
                    f"The weight shard {directory / name} is not the one this bundle was exported from: its content "
                    "has changed.",
                    "Export again.",
                )
        return None

    def _check_content(self) -> None:
        """Refuse a manifest that contradicts itself or the bundle's other files."""
        content = self.content
        try:
            tower = tower_from_sizes(content["model"].get("tower"))
            check_fields(content["model"]["tower"], type(tower), self.path)
            processor = read_json(self.path / PROCESSOR) if PROCESSOR in content["files"] else None
            image = ImageProcessorConfig.from_dict(self.raw_config, tower, processor)
        except CheckpointError as error:
            raise damaged(self.path, str(error).rstrip(".")) from None
        for name, found in (("model", {**asdict(self.config), "tower": asdict(tower)}), ("image", asdict(image))):
            if json.loads(json.dumps(found)) != content[name]:
                raise damaged(self.path, f"its '{name}' is not what config.json and {PROCESSOR} say")
        side, pooling = tower.grid(self.image.crop), self.config.slow_fast.video_pooling_stride
        if content["tokens_per_frame"] != {"image": side**2, "video": (side // pooling) ** 2}:
            raise damaged(self.path, "its 'tokens_per_frame' do not fit the size of its frames")
        self._check_embedding()
        if content["weights"]["directory"]["relative"] == "." and None in self.weight_digests.values():
            raise damaged(self.path, "it has no sha256 of its own weights")
        if self.weight_bytes(1) < 0:
            raise damaged(self.path, "more of its weights are rounded than there are")

    def _check_embedding(self) -> None:
        """Check that the table is a tensor of a weight file: rows are read from there without another check."""
        said, text = self.embedding(), self.config.text
        if said.shard.name not in self._weight_files or said.shape != (text.vocab_size, text.hidden_size):
            raise damaged(self.path, "its token embedding is in no weight file, or has not the model's shape")
        found = read_shard(said.shard, said.shard.name)[1].get(EMBEDDING)
        if found is None or (found.dtype, found.shape, found.offset, found.length) != (
            *(said.dtype, said.shape, said.offset, said.length),
        ):
            raise damaged(self.path, f"its token embedding is not at this place of {said.shard.name}")


def describe_embedding(tensor: Tensor) -> dict[str, Any]:
    """Describe the token embedding's place for a manifest."""
    return {
        "file": tensor.shard.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "offset": tensor.offset,
        "length": tensor.length,
    }
