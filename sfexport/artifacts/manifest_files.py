"""Write, find and check the manifests of bundles, engine directories and build directories, and the files they list."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

from sfexport.__version__ import __version__
from sfexport.artifacts.atomic import restore
from sfexport.artifacts.identity import full_sha256
from sfexport.artifacts.manifest_fields import AGAIN, damaged, read_manifest
from sfexport.artifacts.ownership import DROPPINGS
from sfexport.errors import BundleError

FORMAT = 3  # 3: the decoder takes a shared prefix and a cache of fixed capacity
BUNDLE_FILE, ENGINE_FILE = "sfexport.json", "engine.json"
# Files that some reader would take for a part of a bundle, if they lay in one.
_READ_BY_SUFFIX = (
    *(".onnx", ".engine", ".safetensors", ".bin", ".data", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf"),
    *(".json", ".jinja", ".model", ".py", ".ptx"),
)
_READ_BY_NAME = ("merges.txt", "vocab.txt")


def describe_files(directory: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Make the manifest's `files` entry: size and sha256 of each file we wrote."""
    return {n: {"size": (directory / n).stat().st_size, "sha256": full_sha256(directory / n)} for n in names}


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write a manifest with its own digest, so that any later edit of it shows."""
    content = {"format": FORMAT, "sfexport": __version__} | content
    text = json.dumps(content | {"digest": content_digest(content)}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def content_digest(content: dict[str, Any]) -> str:
    """Compute the sha256 of a manifest's content without its digest, however it is laid out."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def place(path: Path, base: Path) -> dict[str, str]:
    """Describe a path for a manifest: relative, so that a tree can move as a whole, and absolute."""
    return {"relative": os.path.relpath(path.resolve(), base.resolve()), "absolute": str(path.resolve())}


def places(stored: dict[str, str], base: Path) -> list[Path]:
    """List the existing directories that a stored path can stand for: as recorded first, then beside `base`.

    What lay in `base` itself is never looked for elsewhere.
    """
    relative = Path(os.path.realpath(base / stored["relative"]))
    found = [relative] if stored["relative"] == "." else [Path(stored["absolute"]), relative]
    return [path for path in dict.fromkeys(found) if path.is_absolute() and path.is_dir()]


def gone(stored: dict[str, str], base: Path, what: str, hint: str) -> BundleError:
    return BundleError(f"{base} needs {what} at {stored['absolute']}, which does not exist any more.", hint)


def open_manifest(directory: Path, name: str, kind: str) -> dict[str, Any]:
    """Read a manifest; refuse one of another format or version, or one that was edited.

    Raises:
        BundleError: not such a directory, damaged, another version.
    """
    restore(directory)
    if not directory.is_dir():
        problem = "is not a directory" if directory.exists() else "does not exist"
        raise BundleError(f"{directory} {problem}.", f"Name {kind}.")
    if not (directory / name).is_file():
        is_bundle = (directory / BUNDLE_FILE).is_file()
        hint = "It is a bundle: sfexport build makes engines from it." if is_bundle else f"Name {kind}."
        raise BundleError(f"{directory} is not {kind}: it has no {name}.", hint)
    content = read_manifest(directory / name)
    version = str(content.get("sfexport"))
    if content.get("format") != FORMAT or version.split(".")[:2] != __version__.split(".")[:2]:
        raise BundleError(
            f"{directory} was written by sfexport {version} (format {content.get('format')}); this is sfexport "
            f"{__version__} (format {FORMAT}).",
            "Run sfexport export and sfexport build again.",
        )
    if "digest" in content and content["digest"] != content_digest(content):
        raise BundleError(f"{directory / name} was changed after it was written.", AGAIN)
    return content


def check_files(directory: Path, listed: dict[str, Any], own: str, needed: list[str], elsewhere: set[str]) -> None:
    """Compare a directory with the files that its manifest lists.

    Args:
        own: the manifest's name.
        needed: files that must be listed.
        elsewhere: files that are checked apart: weights.

    Raises:
        BundleError: a file is missing, not listed or changed.
    """
    for name in needed:
        if name not in listed:
            raise damaged(directory, f"it does not list {name}")
    for name, promised in listed.items():
        if not (directory / name).is_file():
            raise BundleError(f"{directory / name} is missing.", AGAIN)
        if (directory / name).stat().st_size != promised["size"] or full_sha256(directory / name) != promised["sha256"]:
            raise BundleError(
                f"{directory / name} was changed after it was written (its sha256 is not the manifest's).", AGAIN
            )
    for entry in os.scandir(directory):
        is_known = entry.name in listed or entry.name in elsewhere or entry.name == own or entry.name in DROPPINGS
        if not is_known and (entry.name.lower().endswith(_READ_BY_SUFFIX) or entry.name in _READ_BY_NAME):
            raise BundleError(f"{entry.path} is not one of the files that sfexport wrote there.", "Move it away.")
