"""The released model's size on a small machine: export, INT4, and an answer about a video, by the command line.

    python benchmarks/full_size.py VIDEO --folder DIR      24 GB of disk, 16 GB of memory; minutes
    ... --json                                             one JSON document

The checkpoint has the released model's sizes and random weights (random_checkpoint.py), so that answers mean nothing
and everything else is as with real ones. It is written once to DIR/checkpoint and read again by later runs; what is
made of it is made anew. Every command runs in a process of its own, timed from its start to its end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measuring import HERE, run, written_mb

SFEXPORT = (sys.executable, "-m", "sfexport")
QUESTION = "What happens in the video?"


def prepare(folder: Path) -> Path:
    """The checkpoint, and nothing of an earlier run."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        run([sys.executable, HERE / "random_checkpoint.py", "7b", checkpoint])
    for name in ("bundle", "int4", "engines"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return checkpoint


def step(*arguments: object, made: Path | None = None) -> dict[str, Any]:
    """Seconds, memory and written megabytes of one command."""
    done = run([*SFEXPORT, *arguments])
    found = {"seconds": done.seconds, "peak_rss_mb": done.peak_rss_mb}
    return found | ({"written_mb": written_mb(made)} if made else {"stdout": done.stdout})


def answer(engines: Path, video: Path, frames: int, tokens: int) -> dict[str, Any]:
    """One question; the first generated token comes of the prefill, each other one of a decode step."""
    options = ["--frames", frames, "--max-new-tokens", tokens, "--temperature", 0, "--json"]
    found = step("ask", engines, video, "-q", QUESTION, *options)
    document = json.loads(found.pop("stdout"))
    asked = document["questions"][0]
    seconds = {name: round(value, 2) for name, value in asked["seconds"].items()}
    rate = (asked["new_tokens"] - 1) / asked["seconds"]["decode"]
    about = {key: document[key] for key in ("frames", "fast_tokens", "slow_tokens")}
    return found | about | {"tokens": asked["new_tokens"], "tokens_per_second": round(rate, 2), "stages": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="where to work; the checkpoint there is kept")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=33, help="of the answer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    checkpoint, folder = prepare(options.folder), options.folder
    bundle, int4, engines = (folder / name for name in ("bundle", "int4", "engines"))
    results = {
        "export": step("export", checkpoint, "-o", bundle, made=bundle),
        "export --quantize int4": step("export", checkpoint, "-o", int4, "--quantize", "int4", made=int4),
        "build": step("build", int4, "-o", engines, "--backend", "onnxruntime", made=engines),
        "ask": answer(engines, options.video, options.frames, options.tokens),
    }
    print(json.dumps(results)) if options.json else show(results)


def show(results: dict[str, Any]) -> None:
    print(f"{'':26}{'seconds':>10}{'peak MB':>12}{'written MB':>14}")
    for name, found in results.items():
        print(f"{name:26}{found['seconds']:>10,.1f}{found['peak_rss_mb']:>12,.0f}{found.get('written_mb', 0):>14,.1f}")
    asked = results["ask"]
    print(f"{asked['frames']} frames, {asked['fast_tokens']} fast and {asked['slow_tokens']} slow tokens;", end=" ")
    print(f"{asked['tokens']} tokens at {asked['tokens_per_second']} per second; seconds by stage: {asked['stages']}")


if __name__ == "__main__":
    main()
