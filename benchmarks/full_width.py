"""Engines at the released model's width, built by TensorRT for RTX without a GPU: bytes, memory, seconds.

    python benchmarks/full_width.py --folder DIR                12 GB of disk, 10 GB of memory; minutes
    ... --only decoder-bf16 vision-fp16                         some of the builds
    ... --json                                                  one JSON document

Pieces of the 7 B model with random weights: two and four decoder layers at its width with a vocabulary of 32,000, the
whole ConvNeXt-XXL tower with the projector, and the compressor of two layers. Profiles are those of 64 frames. Every
build runs in a process of its own. `activations` is the builder's "Total Activation Memory", of the profile that has
most, beside what sfexport computes from the graph. Checkpoints in DIR are kept and read again by later runs.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import HERE, main_or_child, measure, run

sys.path.insert(0, str(HERE.parent))
FRAMES, VOCABULARY = 64, 32_000
SAMPLED = 0.02  # seconds between two looks at this process's memory
# What the builder logs at its highest level, once for each profile.
SAID = {
    "weights_said": re.compile(r"Total Weights Memory: (\d+)"),
    "activations": re.compile(r"Total Activation Memory: (\d+)"),
}


@dataclass(frozen=True)
class Piece:
    """One engine: of a checkpoint with `layers` decoder layers, exported with `options`.

    TensorRT for RTX has no plugins: with `plugin`, cross-attention is left out, so that the rest can be measured.
    """

    layers: int
    graph: str
    options: tuple[str, ...]
    plugin: bool = False


PIECES = {
    "decoder-bf16": Piece(2, "decoder", ("--precision", "bf16")),
    "decoder-fp16": Piece(2, "decoder", ("--precision", "fp16")),
    "decoder-fp32": Piece(2, "decoder", ("--precision", "fp32")),
    "decoder-int4-bf16": Piece(2, "decoder", ("--precision", "bf16", "--quantize", "int4")),
    "decoder-int4-fp16": Piece(2, "decoder", ("--precision", "fp16", "--quantize", "int4")),
    "decoder-bf16-without-cross-attention": Piece(2, "decoder", ("--precision", "bf16"), plugin=True),
    "decoder-4-layers-bf16": Piece(4, "decoder", ("--precision", "bf16")),
    "decoder-4-layers-fp16": Piece(4, "decoder", ("--precision", "fp16")),
    "decoder-4-layers-int4-bf16": Piece(4, "decoder", ("--precision", "bf16", "--quantize", "int4")),
    "vision-bf16": Piece(2, "vision_encoder", ("--precision", "bf16")),
    "vision-fp16": Piece(2, "vision_encoder", ("--precision", "fp16")),
    "compressor-bf16": Piece(2, "compressor", ("--precision", "bf16")),
    "compressor-fp16": Piece(2, "compressor", ("--precision", "fp16")),
}


def write_checkpoint(path: str, layers: str) -> dict[str, Any]:
    """In a process of its own: write a random checkpoint of some layers; only that of two has the whole tower."""
    import random_checkpoint

    config, tower, pixels = random_checkpoint.SIZES["7b"]
    changes = {"num_hidden_layers": int(layers), "cross_attn_max_layer_depth": int(layers), "vocab_size": VOCABULARY}
    if layers != "2":
        _, tower, pixels = random_checkpoint.SIZES["0.5b"]
        changes["mm_hidden_size"] = tower.out_size
    random_checkpoint.SIZES["piece"] = (config | changes, tower, pixels)
    return {"bytes": random_checkpoint.write_random_checkpoint(Path(path), "piece")}


def build(directory: str, graph: str, out: str, plugin: str) -> dict[str, Any]:
    """In a process of its own: build one graph as sfexport does; bytes, memory and what builder and engine say."""
    import onnx
    import onnx.inliner

    from sfexport.artifacts.bundle import Bundle
    from sfexport.engines.memory import estimate_memory
    from sfexport.engines.profiles import Limits, resolve_profiles
    from sfexport.engines.tensorrt import builder
    from sfexport.engines.tensorrt.graph_file import tensorrt_graph
    from sfexport.engines.tensorrt.rtx_library import library

    trt, bundle = library(), Bundle.open(Path(directory))
    profiles = resolve_profiles(bundle, Limits(FRAMES))
    memory = estimate_memory(bundle, profiles, mapped_weights=True, plugin=plugin == "True")
    estimate = next(g for g in memory.graphs if g.name == graph)
    model = tensorrt_graph(bundle, graph)
    if plugin == "True":
        leave_out_cross_attention(model)
    model = onnx.inliner.inline_local_functions(model)
    file = Path(out).with_suffix(".onnx")
    onnx.save(model, file)
    lines = keep_log(builder, trt)
    with PeakMemory() as peak:
        builder.build_engine(trt, file, bundle.weights_directory, Path(out), profiles[graph], builder.BuildOptions())
    said = {name: [int(n) for line in lines for n in pattern.findall(line)] for name, pattern in SAID.items()}
    return {
        "engine": Path(out).stat().st_size,
        "weights": estimate.weights,
        **{name: max(numbers, default=None) for name, numbers in said.items()},
        "activations_of_profiles": said["activations"],
        "start": peak.start,
        "anonymous": peak.highest,
        "activations_computed": estimate.activations,
        "version": str(trt.__version__),
    }


def leave_out_cross_attention(model: Any) -> None:
    """Pass the query on in place of each cross-attention: it has the shape and the type of what a plugin gives."""
    for node in model.graph.node:
        if node.op_type == "CrossAttention":
            node.op_type, node.domain = "Identity", ""
            del node.input[1:], node.attribute[:]


def keep_log(builder: Any, trt: Any) -> list[str]:
    """Make the driver of the builder log at every level; returns the list that gets the lines."""
    lines: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            lines.append(message)
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    builder.make_logger = lambda *_: Logger()
    return lines


class PeakMemory:
    """Samples this process's anonymous memory; unlike its resident memory, it leaves out pages of mapped files."""

    def __init__(self) -> None:
        self.start = self.highest = anonymous_memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLED):
            self.highest = max(self.highest, anonymous_memory())


def anonymous_memory() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure_piece(name: str, folder: Path) -> dict[str, Any]:
    """Export what a piece needs, where it is not there, and build it."""
    piece = PIECES[name]
    checkpoint = folder / f"checkpoint-{piece.layers}"
    if not (checkpoint / "model.safetensors.index.json").exists():
        shutil.rmtree(checkpoint, ignore_errors=True)
        measure(__file__, "checkpoint", checkpoint, piece.layers)
    bundle, engine = folder / f"bundle-{name}", folder / f"{name}.engine"
    shutil.rmtree(bundle, ignore_errors=True)
    run([sys.executable, "-m", "sfexport", "export", checkpoint, "-o", bundle, *piece.options])
    found = measure(__file__, "build", bundle, piece.graph, engine, piece.plugin)
    shutil.rmtree(bundle)
    engine.unlink()
    engine.with_suffix(".onnx").unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work; checkpoints there are kept")
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in options.only:
        print(name, file=sys.stderr)
        results[name] = measure_piece(name, options.folder)
    print(json.dumps(results)) if options.json else show(results)


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print a Markdown table; megabytes are 10^6 bytes."""
    columns = ("weights, MB", "engine, MB", "ratio", "peak resident, MB", "of it anonymous", "activations, MB")
    print(f"| piece | {' | '.join(columns)} | computed | seconds |\n|---|{'---|' * 8}")
    for name, found in results.items():
        said = found["activations"]
        sizes = [found["weights"], found["engine"], None, 1e6 * found["peak_rss_mb"], found["anonymous"], said]
        cells = ["-" if size is None else f"{size / 1e6:,.1f}" for size in (*sizes, found["activations_computed"])]
        cells[2] = f"{found['engine'] / found['weights']:.3f}"
        print(f"| {name} | {' | '.join(cells)} | {found['seconds']:.0f} |")


if __name__ == "__main__":
    main_or_child(main, {"checkpoint": write_checkpoint, "build": build})
