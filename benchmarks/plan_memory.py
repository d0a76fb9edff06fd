"""`sfexport plan --target cpu` against the peak memory of a real run.

    python benchmarks/plan_memory.py            random models too: one of 0.5 B, and one whose tower is as wide as the
                                                released one's, a block to a stage (9 GB of memory, 6 GB of disk)
    python benchmarks/plan_memory.py --demo     the shipped model only
    ... --json                                  one JSON document

For every way of storing the weights: engines are built, then a process of its own loads them, encodes a clip and
answers a question; its peak resident memory stands beside the plan's figure. Exit code 1 if one is off by
more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import HERE, main_or_child, measure

sys.path.insert(0, str(HERE.parent))
TOLERANCE = 0.15
NEW_TOKENS = 4
# What each of the plan's precisions is called when a checkpoint is exported.
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "int4+fp16": {"precision": "fp32", "quantize": "int4", "lm_head": "fp16"},
    "int4+int8": {"precision": "fp32", "quantize": "int4", "lm_head": "int8"},
}


def answer(engines: str, clip: str, frames: str) -> dict[str, Any]:
    """In a process of its own: load engines, encode, answer."""
    from sfexport.qa.pipeline import Pipeline

    pipeline = Pipeline.load(engines)
    options = pipeline.generation_options().override(max_new_tokens=NEW_TOKENS)
    pipeline.encode(clip, int(frames)).ask("What happens in the video?", options)
    return {"peak": own_peak()}


def own_peak() -> int:
    """Peak resident bytes of this process.

    From /proc where there is one: this benchmark's parent has exported and built before, and Linux's getrusage counts
    what a parent had when it started a process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_noise(file: Path, frames: int = 64) -> None:
    import numpy as np

    from sfexport.demo.clip import write_frames

    rng = np.random.default_rng(0)
    write_frames(file, (rng.integers(0, 256, (240, 320, 3), np.uint8) for _ in range(frames)), 8, (320, 240))


def compare(
    checkpoint: Path, name: str, clip: Path, frames: int, folder: Path, precisions: Sequence[str] = tuple(OPTIONS)
) -> list[dict[str, Any]]:
    """One row per way of storing the weights: bytes planned and measured."""
    from sfexport.checkpoint.checkpoint import Checkpoint
    from sfexport.engines.build import build
    from sfexport.exporting.export import ExportOptions, export
    from sfexport.planning.plan import plan

    found = {f.storage.name: f.memory.run for f in plan(checkpoint, "cpu", frames).targets[0].figures}
    rows = []
    for precision in precisions:
        print(f"{name}, {frames} frames: {precision}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            bundle = export(Checkpoint.open(checkpoint), Path(made) / "bundle", ExportOptions(**OPTIONS[precision]))
            engines = build(bundle, Path(made) / "engines", "onnxruntime")
            measured = measure(__file__, "answer", engines.path, clip, frames)["peak"]
        row = {"model": name, "frames": frames, "precision": precision, "planned": found[precision]}
        rows.append(row | {"measured": measured, "off": found[precision] / measured - 1})
    return rows


def compare_large(clip: Path, folder: Path, frames: int) -> list[dict[str, Any]]:
    """A decoder that is mostly weights, and a tower that is mostly activations."""
    import random_checkpoint

    from sfexport.checkpoint.vision_tower import CONVNEXT_XXL

    write = random_checkpoint.write_random_checkpoint
    write(folder / "decoder", "0.5b")
    rows = compare(folder / "decoder", "0.5 B", clip, frames, folder)
    tower = replace(CONVNEXT_XXL, depths=(1, 1, 1, 1))
    config = random_checkpoint.QWEN2_SMALL | {"num_hidden_layers": 2, "cross_attn_max_layer_depth": 2}
    config |= {"mm_hidden_size": tower.out_size, "vocab_size": 8192}
    random_checkpoint.SIZES["tower"] = (config, tower, 576)
    write(folder / "tower", "tower")
    for count in (8, 16):
        rows += compare(folder / "tower", "tower", clip, count, folder, ["fp32"])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="the shipped model only")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from sfexport.demo.shipped import SHIPPED

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = folder / "clip.mp4"
        write_noise(clip)
        rows = compare(SHIPPED, "demo", clip, options.frames, folder)
        if not options.demo:
            rows += compare_large(clip, folder, options.frames)
    if options.json:
        print(json.dumps(rows))
    else:
        print(f"{'model':8}{'frames':8}{'stored':12}{'planned, MB':>12}{'measured':>10}{'off':>8}")
        for row in rows:
            figures = f"{row['planned'] / 1e6:>12,.0f}{row['measured'] / 1e6:>10,.0f}{row['off']:>8.1%}"
            print(f"{row['model']:8}{row['frames']:<8}{row['precision']:12}{figures}")
    return int(any(abs(row["off"]) > TOLERANCE for row in rows))


if __name__ == "__main__":
    main_or_child(main, {"answer": answer})
