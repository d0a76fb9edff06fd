"""Open an engine directory: one file per graph and a manifest `engine.json`.

Neither the manifest nor the files it lists are trusted: types, names, digests and places are checked at every open.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfexport.artifacts.atomic import restore
from sfexport.artifacts.bundle import GRAPHS, Bundle
from sfexport.artifacts.identity import changed_since, full_sha256
from sfexport.artifacts.manifest_fields import EngineFields, RtxFields, TensorRTFields, check_fields, damaged
from sfexport.artifacts.manifest_files import BUNDLE_FILE, ENGINE_FILE, check_files, gone, open_manifest
from sfexport.errors import BundleError


@dataclass(frozen=True)
class Engines:
    """An opened engine directory.

    Attributes:
        path: the directory.
        content: the manifest.
        bundle: the bundle that the engines were built from.
    """

    path: Path
    content: dict[str, Any]
    bundle: Bundle

    @classmethod
    def open(cls, path: Path) -> Engines:
        """Open engines and their bundle: check manifests and files. `path` may also hold exactly one engine directory.

        Raises:
            BundleError: naming what is missing, changed or of another version.
        """
        path = resolve_engines(path)
        content = open_manifest(path, ENGINE_FILE, "an engine directory")
        check_fields(content, EngineFields, path)
        if content["backend"] == "tensorrt":
            check_fields(content, TensorRTFields, path)
        if content["backend"] == "tensorrt-rtx":
            check_fields(content, RtxFields, path)
        suffix = {"onnxruntime": "onnx", "tensorrt": "engine", "tensorrt-rtx": "engine"}.get(content["backend"])
        parts = content.get("split_decoder", 1) if suffix == "engine" else 1
        graphs = [*(name for name in GRAPHS if name != "decoder"), *decoder_files(parts)]
        needed = [f"{name}.{suffix}" for name in graphs] if suffix else []
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
        """Find the bundle beside the engines, so that a copied tree is whole; else the recorded one."""
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


def decoder_files(parts: int) -> list[str]:
    """Name the decoder's engine files, without their suffix."""
    return ["decoder"] if parts == 1 else [f"decoder.{k}" for k in range(parts)]


def resolve_engines(path: Path) -> Path:
    """Return `path` itself, or the one engine directory in it.

    Raises:
        BundleError: it holds several.
    """
    if not path.is_dir() or (path / ENGINE_FILE).is_file():
        return path
    found = sorted(p for p in path.iterdir() if not p.name.startswith(".") and (p / ENGINE_FILE).is_file())
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise BundleError(f"{path} holds several engine directories ({names}).", "Name one of them.")
    return found[0] if found else path
