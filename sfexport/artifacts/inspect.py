"""Describe a checkpoint, a bundle or an engine directory as one plain document (`sfexport inspect`)."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfexport.artifacts.atomic import restore
from sfexport.artifacts.bundle import Bundle
from sfexport.artifacts.engines import Engines, resolve_engines
from sfexport.artifacts.manifest_files import BUNDLE_FILE, ENGINE_FILE
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.config import TOWER_PREFIX
from sfexport.checkpoint.weight_files import refuse_adapter
from sfexport.errors import InputError
from sfexport.printable import size_text

PARTS = (
    ("vision tower", TOWER_PREFIX),
    ("projector", "model.mm_projector"),
    ("token embedding", "model.embed_tokens."),
    ("language-model head", "lm_head."),
)


def inspect(path: Path) -> dict[str, Any]:
    """Describe a directory; its `kind` is 'checkpoint', 'bundle' or 'engines'.

    Raises:
        InputError: it is none of them, or damaged.
    """
    restore(path)
    if not path.is_dir():
        raise InputError(f"{path} {'is not a directory' if path.exists() else 'does not exist'}.")
    path = resolve_engines(path)
    if (path / ENGINE_FILE).is_file():
        return _engines(Engines.open(path))
    if (path / BUNDLE_FILE).is_file():
        return _bundle(Bundle.open(path))
    refuse_adapter(path)
    if os.path.lexists(path / "config.json"):
        return _checkpoint(Checkpoint.open(path))
    raise InputError(
        f"{path} is neither a checkpoint (config.json), a bundle ({BUNDLE_FILE}) nor an engine directory "
        f"({ENGINE_FILE})."
    )


def _checkpoint(stored: Checkpoint) -> dict[str, Any]:
    from sfexport.checkpoint.gptq_awq import read_prequantized

    checkpoint, _ = read_prequantized(stored)
    checkpoint.validate()
    return {
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "model": asdict(checkpoint.config) | {"tower": asdict(checkpoint.tower)},
        "image": asdict(checkpoint.image),
        "parameters": _parameters(checkpoint),
        "dtypes": dict(Counter(t.dtype for t in stored.tensors.values())),
        "unused_tensors": checkpoint.unused_tensors(),
        "notes": checkpoint.notes(),
        "shards": [{"file": s.name, "size": s.size} for s in checkpoint.shards],
        "side_files": [file.name for file in checkpoint.side_files()],
    }


def _parameters(checkpoint: Checkpoint) -> dict[str, int]:
    """Count parameters by part; tensors that are never used are not counted."""
    counts: Counter[str] = Counter()
    for name in checkpoint.expected_tensors():
        counts[_part(name)] += math.prod(checkpoint.tensors[name].shape)
    return {**counts, "total": sum(counts.values())}


def _part(name: str) -> str:
    if "cross_attn" in name:
        return "cross-attention"
    return next((part for part, prefix in PARTS if name.startswith(prefix)), "decoder")


def _bundle(bundle: Bundle) -> dict[str, Any]:
    content, weights = bundle.content, bundle.content["weights"]
    return {
        "kind": "bundle",
        "path": str(bundle.path),
        "sfexport": content["sfexport"],
        "model": content["model"],
        "image": content["image"],
        "options": content["options"],
        "graphs": content["graphs"],
        "weights": {
            "directory": str(bundle.weights_directory),
            "shards": [{"file": s["file"], "size": s["size"]} for s in weights["shards"]],
        },
        "files": {name: entry["size"] for name, entry in content["files"].items()},
        "tools": content["tools"],
    }


def _engines(engines: Engines) -> dict[str, Any]:
    content = engines.content
    return {
        "kind": "engines",
        "path": str(engines.path),
        "sfexport": content["sfexport"],
        **{key: content[key] for key in ("backend", "target", "machine", "runtime")},
        **{key: content[key] for key in ("gpu", "cuda", "compute_capabilities", "plugin", "limits") if key in content},
        "files": {name: entry["size"] for name, entry in content["files"].items()},
        "bundle": _bundle(engines.bundle),
    }


def rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the document as lines of a table for people; graphs' inputs and outputs are listed apart."""
    kind = document["kind"]
    bundle = document.get("bundle", {}) if kind == "engines" else document
    lines = [("path", document["path"])]
    if kind == "engines":
        runtime = document["runtime"]
        lines += [("runs on", f"{document['target']} ({document['machine']}), {runtime['name']} {runtime['version']}")]
        lines += [("built from", bundle["path"])]
        lines += _tensorrt_rows(document) if "limits" in document else []
    lines += _model_rows(bundle["model"], bundle["image"])
    if kind == "checkpoint":
        lines += [(f"parameters: {part}", f"{n:,}") for part, n in document["parameters"].items()]
        lines += [("stored as", ", ".join(f"{n} {dtype}" for dtype, n in document["dtypes"].items()) + " tensors")]
        lines += [("note", note) for note in document["notes"]]
        lines += [("shards", _sizes(document["shards"])), ("side files", ", ".join(document["side_files"]))]
    else:
        lines += [(key, str(bundle["options"][key])) for key in ("precision", "frames")]
        lines += [("weights", f"{_sizes(bundle['weights']['shards'])} in {bundle['weights']['directory']}")]
        lines += [("written by", f"sfexport {document['sfexport']}")]
        lines += [("tools", ", ".join(f"{k} {v}" for k, v in bundle["tools"].items()))]
    return lines


def _tensorrt_rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    limits = document["limits"]
    tokens = f"{limits['question_tokens']} prompt tokens, {limits['new_tokens']} new tokens"
    takes = ("takes up to", f"{limits['frames']} frames, {tokens}, {limits['rows']} questions together")
    if "compute_capabilities" in document:
        return [("built for", ", ".join(document["compute_capabilities"]) or "every RTX card from SM 8.0 on"), takes]
    gpu = document["gpu"]
    return [
        ("built on", f"{gpu['name']} (SM {gpu['sm'] / 10:.1f}), CUDA {document['cuda']['newest']}"),
        takes,
        ("plugin", {"ahead": "in the engine", "python": "Python"}.get(document["plugin"], "none")),
    ]


def _model_rows(model: dict[str, Any], image: dict[str, Any]) -> list[tuple[str, str]]:
    text, slow, tower = model["text"], model["slow_fast"], model["tower"]
    fast = slow["fast"]
    sizes = tower.get("widths") or tower.get("width")
    return [
        ("vision tower", f"{tower['kind']} {sizes}, {image['crop']} x {image['crop']} pixels"),
        (
            "decoder",
            f"{text['num_layers']} layers, width {text['hidden_size']}, {text['num_heads']} heads "
            f"({text['num_kv_heads']} kv), vocabulary {text['vocab_size']:,}, at most {text['max_length']} positions",
        ),
        ("hybrid layers", f"{list(slow['hybrid_layers'])}, queried by: {slow['attends']}"),
        (
            "fast path",
            f"sampling stride {fast['sampling_stride']}, temporal stride {fast['temporal_stride']}, spatial stride "
            f"{fast['spatial_stride']}, at least {fast['min_frames']} frames",
        ),
        ("decode mode", slow["decode_mode"]),
    ]


def _sizes(shards: list[dict[str, Any]]) -> str:
    total = sum(shard["size"] for shard in shards)
    return f"{len(shards)} file{'s' if len(shards) > 1 else ''}, {size_text(total)}"


def graph_rows(document: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """List (graph, direction, name, dtype, shape) per input and output; per-layer K/V tensors take one line."""
    bundle = document["bundle"] if document["kind"] == "engines" else document
    lines = []
    for graph, entry in bundle.get("graphs", {}).items():
        for direction, values in (("in", entry["inputs"]), ("out", entry["outputs"])):
            lines += [(graph, direction, *line) for line in _folded(values)]
    return lines


def _folded(values: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for value in values:
        head = value["name"].split(".")[0]
        groups.setdefault(head, []).append(value)
    return [
        (
            head if len(group) == 1 else f"{head}.<layer>.key / .value ({len(group)} tensors)",
            group[0]["dtype"],
            str(group[0]["shape"]).replace("'", ""),
        )
        for head, group in groups.items()
    ]
