"""What a bundle and an engine directory promise, and checking it before anything in them is used.

Both are directories with a JSON manifest: `sfexport.json` in a bundle, `engine.json` beside engines. May
import sfexport.checkpoint, facts, images and errors.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from sfexport import __version__
from sfexport.atomic import restore
from sfexport.checkpoint import Shard, Tensor, read_json
from sfexport.errors import BundleError, InputError
from sfexport.facts import ModelFacts
from sfexport.images import ImageFacts

FORMAT = 1
BUNDLE_FILE, ENGINE_FILE = "sfexport.json", "engine.json"
GRAPHS = ("vision_encoder", "compressor", "decoder")
# What graphs compute in, and the bytes of one such number.
PRECISIONS = {"fp32": 4, "fp16": 2, "bf16": 2}
# What a decoder's linear weights can be rounded to.
QUANTIZATIONS = ("int4",)
# Methods whose rounding a checkpoint may bring along.
TAKEN_OVER = ("gptq", "awq")
# Weights held as integers, by how they became so ('taken': the checkpoint had them), and the bits of each.
_INTEGER_BITS = {"int4": 4, "int8": 8, "taken": 4}
AGAIN = "Run the command that wrote this directory again."


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return _digest(file)


def _digest(file: Any) -> str:
    digest = sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def describe_files(directory: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """The manifest's `files` entry: size and sha256 of each file we wrote."""
    return {n: {"size": (directory / n).stat().st_size, "sha256": file_sha256(directory / n)} for n in names}


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    header = {"format": FORMAT, "sfexport": __version__}
    path.write_text(json.dumps(header | content, indent=1) + "\n", encoding="utf-8")


def place(path: Path, base: Path) -> dict[str, str]:
    """A path as a manifest stores it: relative, so that a tree can move as a whole, and absolute."""
    return {"relative": os.path.relpath(path.resolve(), base.resolve()), "absolute": str(path.resolve())}


def find_place(stored: dict[str, str], base: Path, what: str, hint: str) -> Path:
    """The stored path that exists, the relative one first."""
    for path in ((base / stored["relative"]).resolve(), Path(stored["absolute"])):
        if path.exists():
            return path
    raise BundleError(f"{base} needs {what} at {stored['absolute']}, which does not exist any more.", hint)


def _open_manifest(directory: Path, name: str, kind: str) -> dict[str, Any]:
    """Read a manifest and refuse one of another format or version.

    Raises:
        BundleError: not such a directory, damaged, another version, a file missing or changed.
    """
    restore(directory)
    if not directory.is_dir():
        problem = "is not a directory" if directory.exists() else "does not exist"
        raise BundleError(f"{directory} {problem}.", f"Name {kind}.")
    if not (directory / name).is_file():
        is_bundle = (directory / BUNDLE_FILE).is_file()
        hint = "It is a bundle: sfexport build makes engines from it." if is_bundle else f"Name {kind}."
        raise BundleError(f"{directory} is not {kind}: it has no {name}.", hint)
    try:
        content = read_json(directory / name)
    except InputError as error:
        raise BundleError(str(error), AGAIN) from None
    version = str(content.get("sfexport"))
    if content.get("format") != FORMAT or version.split(".")[:2] != __version__.split(".")[:2]:
        raise BundleError(
            f"{directory} was written by sfexport {version} (format {content.get('format')}); this is sfexport "
            f"{__version__} (format {FORMAT}).",
            "Run sfexport export and sfexport build again.",
        )
    _check_files(directory, content)
    return content


def _check_files(directory: Path, content: dict[str, Any]) -> None:
    files = content.get("files")
    if not isinstance(files, dict):
        raise BundleError(f"The manifest in {directory} is damaged: it lists no files.", AGAIN)
    for name, promised in files.items():
        if not isinstance(promised, dict) or not {"size", "sha256"} <= promised.keys():
            raise BundleError(f"The manifest in {directory} is damaged: it says nothing about {name}.", AGAIN)
        if not (directory / name).is_file():
            raise BundleError(f"{directory / name} is missing.", AGAIN)
        if file_sha256(directory / name) != promised["sha256"]:
            raise BundleError(
                f"{directory / name} was changed after it was written (its sha256 is not the manifest's).",
                AGAIN,
            )


@contextlib.contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """Says of a manifest that lacks something, or has it in another form, that it is damaged."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        problem = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"The manifest in {directory} is damaged: {problem}.", AGAIN) from None


def _expect(content: Any, names: Sequence[str]) -> None:
    """Raises KeyError for a name that is missing, TypeError for what has no names."""
    if not isinstance(content, dict):
        raise TypeError(f"it has {content!r} in the place of an object")
    for name in names:
        content[name]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: three graphs, side files, and where the weights are."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Check the manifest, every file's sha256 and every weight shard's size and header.

        Raises:
            BundleError: naming what is missing or changed.
        """
        bundle = cls(path, _open_manifest(path, BUNDLE_FILE, "a bundle"))
        with _readable(path):
            bundle._check_shards()
            bundle._check_content()
        return bundle

    @cached_property
    def weights_directory(self) -> Path:
        """The real directory that the graphs' external data lies in."""
        return find_place(
            self.content["weights"]["directory"],
            self.path,
            "its weights",
            "Export again, or export with --weights copy to get a bundle that can be moved.",
        )

    @property
    def checkpoint_path(self) -> Path:
        """The checkpoint the bundle was exported from (the bundle itself where weights were copied)."""
        hint = "Comparing with PyTorch needs the checkpoint; put it back or export again."
        return find_place(self.content["checkpoint"], self.path, "its checkpoint", hint)

    @property
    def original_checkpoint(self) -> Path | None:
        """The checkpoint directory that was exported, where it was then; None if it is gone, or not recorded."""
        stored = self.content.get("original", self.content["checkpoint"])
        places = Path(stored["absolute"]), (self.path / stored["relative"]).resolve()
        found = (path for path in places if (path / "config.json").is_file() and path != self.path.resolve())
        return next(found, None)

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    @cached_property
    def facts(self) -> ModelFacts:
        return ModelFacts.from_config(self.config)

    @cached_property
    def image(self) -> ImageFacts:
        return ImageFacts(**{k: tuple(v) if isinstance(v, list) else v for k, v in self.content["image"].items()})

    @property
    def frames(self) -> int:
        """Frames sampled from a video unless a question's caller says otherwise."""
        return self.content["options"]["frames"]

    @property
    def precision(self) -> str:
        """What the graphs compute in: a key of PRECISIONS."""
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
            name="model.embed_tokens.weight",
            dtype=stored["dtype"],
            shape=tuple(stored["shape"]),
            shard=self.weights_directory / stored["file"],
            offset=stored["offset"],
            length=stored["length"],
        )

    def generation_config(self) -> dict[str, Any]:
        file = self.path / "generation_config.json"
        return read_json(file) if file.is_file() else {}

    def _check_content(self) -> None:
        """Read everything that is read later, so that what is missing is found now."""
        content = self.content
        _expect(content["model"], ("text", "slow_fast", "tower"))
        _expect(content["tools"], ())
        _expect(content["options"], ("weights",))
        for name in ("checkpoint", *({"original"} & content.keys())):
            _expect(content[name], ("relative", "absolute"))
        for graph in GRAPHS:
            _expect(content["graphs"][graph], ("inputs", "outputs"))
        if not isinstance(content["weights"]["parameters"], int):
            raise ValueError(f"its number of parameters is {content['weights']['parameters']!r}")
        self.tokens_per_frame(single_image=True), self.tokens_per_frame(single_image=False)
        if not isinstance(self.frames, int) or self.frames < 1:
            raise ValueError(f"its number of frames is {self.frames!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"its precision is {self.precision!r}")
        if self.quantization is not None:
            self._check_quantization(self.quantization)
        self.image, self.embedding(), self.facts

    def _check_quantization(self, content: dict[str, Any]) -> None:
        _expect(content, ("lm_head", "matrices"))
        if content["method"] not in (*QUANTIZATIONS, *TAKEN_OVER):
            raise ValueError(f"its quantization is {content['method']!r}")
        for kind in _INTEGER_BITS:
            _expect(content[kind], ("plain_error", "error"))
        self.weight_bytes(1)

    def _check_shards(self) -> None:
        for shard in self.content["weights"]["shards"]:
            file = self.weights_directory / shard["file"]
            if not file.is_file():
                raise BundleError(f"The weight shard {file} is missing.", "Put it back or export again.")
            if file.stat().st_size != shard["size"] or _header_sha256(file) != shard["header_sha256"]:
                raise BundleError(
                    f"The weight shard {file} is not the one this bundle was exported from.", "Export again."
                )


def _header_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return sha256(stream.read(min(length, 100_000_000))).hexdigest()


def describe_shard(shard: Shard) -> dict[str, Any]:
    return {"file": shard.path.name, "size": shard.size, "header_sha256": shard.header_sha256}


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
        content = _open_manifest(path, ENGINE_FILE, "an engine directory")
        with _readable(path):
            stored, promised = content["bundle"], content["bundle"]["sha256"]
            where = find_place(stored, path, "the bundle it was built from", "Put it back, or build again.")
            _expect(content, ("backend", "target", "machine"))
            _expect(content["runtime"], ("name", "version"))
        bundle = Bundle.open(where)
        if file_sha256(where / BUNDLE_FILE) != promised:
            raise BundleError(
                f"The bundle {where} is not the one the engines in {path} were built from.",
                f"Build again: sfexport build {where} -o {path}",
            )
        return cls(path, content, bundle)

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
