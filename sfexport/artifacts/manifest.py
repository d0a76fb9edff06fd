"""What a bundle and an engine directory promise, and checking it before anything in them is used.

Both are directories with a JSON manifest: `sfexport.json` in a bundle, `engine.json` beside engines. Neither the
manifests nor what they list are trusted: types, names, digests and places are checked at every open.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sfexport.artifacts.atomic import restore
from sfexport.artifacts.identity import changed_since, full_sha256, has_content, has_weights
from sfexport.artifacts.manifest_fields import (
    BundleFields,
    EngineFields,
    TensorRTFields,
    check_fields,
    damaged,
    is_finite,
)
from sfexport.artifacts.manifest_files import BUNDLE_FILE, ENGINE_FILE, check_files, gone, open_manifest, places
from sfexport.checkpoint.checkpoint import Checkpoint, Tensor, read_json
from sfexport.checkpoint.config import ModelConfig
from sfexport.checkpoint.image_processor import FILE as PROCESSOR
from sfexport.checkpoint.image_processor import ImageProcessorConfig
from sfexport.checkpoint.safetensors import read_shard
from sfexport.checkpoint.vision_tower import tower_from_sizes
from sfexport.errors import BundleError, CheckpointError, InputError

GRAPHS = ("vision_encoder", "compressor", "decoder")
# What a decoder's linear weights can be rounded to.
QUANTIZATIONS = ("int4",)
# Weights held as integers, by how they became so ('taken': the checkpoint had them), and the bits of each.
_INTEGER_BITS = {"int4": 4, "int8": 8, "taken": 4}
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: three graphs, side files, and where the weights are."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Check the manifest, every file's sha256, and every weight file's size and sampled content.

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
        bundle.weights_directory, bundle._check_content()
        return bundle

    @cached_property
    def weights_directory(self) -> Path:
        """The real directory that the graphs' external data lies in: the first whose files have the right content."""
        stored = self.content["weights"]["directory"]
        found = places(stored, self.path)
        problems = [self._weights_problem(directory) for directory in found]
        if None in problems:
            return found[problems.index(None)]
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
        """Whether a directory holds the checkpoint that was exported."""
        try:
            return has_weights(Checkpoint.open(checkpoint).shards, self.content["checkpoint"]["shards"])
        except (InputError, OSError):
            return False

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    @cached_property
    def config(self) -> ModelConfig:
        """The model as its graphs are: config.json may tie a head that the checkpoint stores all the same."""
        config = ModelConfig.from_dict(self.raw_config)
        tied = config.text.tie_word_embeddings and self.content["model"]["text"].get("tie_word_embeddings") is not False
        return replace(config, text=replace(config.text, tie_word_embeddings=tied))

    @cached_property
    def image(self) -> ImageProcessorConfig:
        return ImageProcessorConfig(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in self.content["image"].items()}
        )

    @property
    def frames(self) -> int:
        """Frames sampled from a video unless a question's caller says otherwise."""
        return self.content["options"]["frames"]

    @property
    def precision(self) -> str:
        """What the graphs compute in: one of PRECISIONS."""
        return self.content["options"]["precision"]

    @property
    def quantization(self) -> dict[str, Any] | None:
        """What rounding did to the weights, or None where they were not rounded: method, lm_head, errors."""
        return self.content.get("quantization")

    def weight_bytes(self, width: int) -> int:
        """Bytes of the graphs' weights where floats are held in `width` bytes each and integers as they are stored."""
        floats, integers = self.content["weights"]["parameters"], 0
        for kind, bits in _INTEGER_BITS.items() if self.quantization else ():
            weights, scales = (self.quantization[kind][part] for part in ("weights", "scales"))
            floats, integers = floats - weights + scales, integers + weights * bits // 8
        return width * floats + integers

    def tokens_per_frame(self, single_image: bool) -> int:
        """Slow tokens of a frame: pooled for a video, all for a single image."""
        return self.content["tokens_per_frame"]["image" if single_image else "video"]

    def graph_file(self, name: str) -> Path:
        return self.path / f"{name}.onnx"

    def embedding(self) -> Tensor:
        """The token embedding's place in its shard; rows are read one by one, never the whole table."""
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
        name = "generation_config.json"
        return read_json(self.path / name) if name in self.content["files"] else {}

    def _weights_problem(self, directory: Path) -> BundleError | None:
        """Why a directory's files are not this bundle's weights."""
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
        """Compare what the manifest says twice, or what the bundle's other files say too."""
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
        """The table is a tensor of one of the weight files: rows are read from there without another check."""
        said, text = self.embedding(), self.config.text
        if said.shard.name not in self._weight_files or said.shape != (text.vocab_size, text.hidden_size):
            raise damaged(self.path, "its token embedding is in no weight file, or has not the model's shape")
        found = read_shard(said.shard, said.shard.name)[1].get(EMBEDDING)
        if found is None or (found.dtype, found.shape, found.offset, found.length) != (
            *(said.dtype, said.shape, said.offset, said.length),
        ):
            raise damaged(self.path, f"its token embedding is not at this place of {said.shard.name}")


def describe_embedding(tensor: Tensor) -> dict[str, Any]:
    return {
        "file": tensor.shard.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "offset": tensor.offset,
        "length": tensor.length,
    }


@dataclass(frozen=True)
class Engines:
    """An opened engine directory and the bundle it was built from."""

    path: Path
    content: dict[str, Any]
    bundle: Bundle

    @classmethod
    def open(cls, path: Path) -> Engines:
        """Check manifests and files. `path` may also hold exactly one engine directory.

        Raises:
            BundleError: naming what is missing, changed or of another version.
        """
        path = resolve_engines(path)
        content = open_manifest(path, ENGINE_FILE, "an engine directory")
        check_fields(content, EngineFields, path)
        if content["backend"] == "tensorrt":
            check_fields(content, TensorRTFields, path)
        suffix = {"onnxruntime": "onnx", "tensorrt": "engine"}.get(content["backend"])
        needed = [f"{name}.{suffix}" for name in GRAPHS] if suffix else []
        check_files(path, content["files"], ENGINE_FILE, needed, set())
        where, promised = cls._find_bundle(path, content["bundle"]), content["bundle"]["sha256"]
        bundle = Bundle.open(where)
        if full_sha256(where / BUNDLE_FILE) != promised:
            raise BundleError(
                f"The bundle {where} is not the one the engines in {path} were built from.",
                f"Build again: sfexport build {where} -o {path}",
            )
        if content["weights_read"].keys() != bundle.weight_sizes.keys():
            raise damaged(path, "its 'weights_read' are not the bundle's weight files")
        return cls(path, content, bundle)

    def check_weights(self) -> None:
        """Refuse weights that were edited in place after the build, also where no sampled block shows it."""
        for name, read in self.content["weights_read"].items():
            file = self.bundle.weights_directory / name
            if changed_since(file, read):
                raise BundleError(
                    f"The weight shard {file} is not the one that the engines in {self.path} were built with: its "
                    "content has changed.",
                    "Put it back, or export and build again.",
                )

    @staticmethod
    def _find_bundle(path: Path, stored: dict[str, str]) -> Path:
        """The bundle beside the engines, so that a copied tree is whole; else the recorded one."""
        beside = Path(os.path.realpath(path / stored["relative"]))
        for found in (beside, Path(stored["absolute"])):
            restore(found)
            if found.exists():
                return found
        raise gone(stored, path, "the bundle it was built from", "Put it back, or build again.")

    def check_runtime(self, name: str, version: str) -> None:
        """Refuse engines of another runtime or version, before any is deserialised."""
        built = self.content["runtime"]
        if built["name"] != name or built["version"] != version:
            raise BundleError(
                f"The engines in {self.path} were built with {built['name']} {built['version']}; this machine has "
                f"{name} {version}.",
                f"Build again: sfexport build {self.bundle.path} -o {self.path}",
            )


def resolve_engines(path: Path) -> Path:
    """`path` itself, or the one engine directory in it."""
    if not path.is_dir() or (path / ENGINE_FILE).is_file():
        return path
    found = sorted(p for p in path.iterdir() if not p.name.startswith(".") and (p / ENGINE_FILE).is_file())
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise BundleError(f"{path} holds several engine directories ({names}).", "Name one of them.")
    return found[0] if found else path
