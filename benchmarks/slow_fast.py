"""Measure what slow tokens contribute: the demo model with and without them, on held-out clips as video files.

    python benchmarks/slow_fast.py --clips 300 --plain RUN/checkpoint [--gelu RUN/checkpoint] -o docs/benchmarks

Writes slow_fast.md and slow_fast.svg. Models: the shipped one in its modes and with the slow tokens of another
clip; `plain`, of the same size and training without slow branch (examples/shapes/train.py --plain); optionally
one with a GELU projector (--projector mlp2x_gelu).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from shapes_accuracy import OTHER_CLIP, check_seed, evaluate, load

from sfexport.demo.scenes import COLOURS, CORNERS, DIGITS, DIRECTIONS, NUMBERS, SHAPES
from sfexport.demo.shipped import SHIPPED

CHANCE = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "count": 1 / len(NUMBERS),
    "direction": 1 / len(DIRECTIONS),
    "colour_direction": 1 / len(COLOURS) / len(DIRECTIONS),
    "digit": 1 / len(DIGITS),
    "corner": 1 / len(CORNERS),
    "flash_colour": 1 / len(COLOURS),
    "digit_corner": 1 / len(DIGITS) / len(CORNERS),
}
COLUMNS = ("trained", "released", "slow_off", OTHER_CLIP, "plain", "gelu")
Results = dict[str, dict[str, float]]


def chance(kind: str) -> float:
    return CHANCE[kind.removesuffix("_sampled").removesuffix("_unsampled")]


def markdown(results: Results, note: str) -> str:
    """The table, kinds as rows."""
    columns = [c for c in COLUMNS if c in results]
    lines = ["# What slow tokens contribute to answers", "", note, ""]
    lines += ["| kind | chance | " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
    lines += ["|---" * (len(columns) + 2) + "|"]
    for kind in results[columns[0]]:
        cells = [f"{results[c][kind]:.3f}" for c in columns]
        lines.append(f"| {kind.replace('_', ' ')} | {chance(kind):.3f} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "![accuracy by kind](slow_fast.svg)", ""])


def plot(results: Results, file: Path) -> None:
    """Bars by kind: slow-fast, slow branch off, plain; chance as a tick."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sfexport"
    from matplotlib import pyplot

    kinds = [k for k in results["trained"] if not k.endswith("_sampled") and k not in ("digit", "corner")]
    kinds = [k for k in kinds if k not in ("flash_colour", "digit_corner")]
    columns = [c for c in ("trained", "slow_off", "plain") if c in results]
    names = {"trained": "slow-fast", "slow_off": "slow-fast, slow branch off", "plain": "no slow branch"}
    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(columns)
    for i, column in enumerate(columns):
        at = [k + (i - (len(columns) - 1) / 2) * width for k in range(len(kinds))]
        axes.bar(at, [results[column][kind] for kind in kinds], width, label=names[column])
    axes.plot(range(len(kinds)), [chance(kind) for kind in kinds], "k_", markersize=24, label="chance")
    axes.set_xticks(range(len(kinds)), [k.replace("_unsampled", "*").replace("_", "\n") for k in kinds])
    axes.set_ylabel("exact match")
    axes.set_title("* about one frame that the fast path never sees", fontsize=9, loc="left")
    figure.legend(loc="outside upper right", ncols=4, fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--plain", type=Path, help="checkpoint of the model without slow branch")
    parser.add_argument("--gelu", type=Path, help="checkpoint of the model with a GELU projector")
    parser.add_argument("--remark", default="", help="a sentence to print above the table")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    check_seed(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = (folder, options.seed, options.clips)
        results = evaluate(load(SHIPPED, folder), *run, extra=True).accuracies()
        for column, checkpoint in (("plain", options.plain), ("gelu", options.gelu)):
            if checkpoint:
                found = evaluate(load(checkpoint, folder / column), *run).accuracies()
                results[column] = found.get("plain") or found["trained"]
    command = f"python benchmarks/slow_fast.py --seed {options.seed} --clips {options.clips}"
    note = f"`{command}`: exact match on {options.clips} held-out clips, real video files, ONNX Runtime in float32."
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "slow_fast.md").write_text(markdown(results, f"{note} {options.remark}".strip()))
    plot(results, options.output / "slow_fast.svg")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
