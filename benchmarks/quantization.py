"""INT4 weights: seconds, memory and error of making them, and what they do to answers and to speed.

    python benchmarks/quantization.py                        a random 0.5 B model (needs 6 GB of disk, 4 GB of memory)
    python benchmarks/quantization.py --size 7b --folder DIR the released model's size (24 GB of disk, 16 GB of memory)
    python benchmarks/quantization.py --demo                 the shipped model: right answers, logits against fp32
    ... --json                                               one JSON document

Everything is measured in a process of its own. Random weights say how large errors of weights are, little of what they
do to a model: for that there is --demo. `plain` is rounding by max/7, `searched` what sfexport does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
PREFILL, STEPS, TIMED, SLOW = 64, 8, 24, (16, 16)  # tokens; frames and tokens of each
TORCH = "torch eager fp32"
# name -> options of the export; 'plain' is no option of sfexport: the search is switched off.
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"weights": "reference"},
    "int4": {"quantize": "int4"},
    "int4 plain": {"quantize": "int4"},
    "int4, head fp16": {"quantize": "int4", "lm_head": "fp16"},
}


def measure(mode: str, *arguments: object) -> dict[str, Any]:
    """Run this file as `mode` in a new process; its JSON line, with seconds from outside added."""
    start = time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve()), "--child", mode, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"seconds": round(time.perf_counter() - start, 2), **json.loads(done.stdout.splitlines()[-1])}


def peak_mb() -> float:
    """ru_maxrss is in KiB on Linux, in bytes on macOS."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def export_variant(checkpoint: str, out: str, variant: str) -> dict[str, Any]:
    from sfexport.checkpoint import Checkpoint
    from sfexport.graphs import quantize
    from sfexport.graphs.bundle import ExportOptions, export

    if variant == "int4 plain":
        quantize.SHRINK = (1.0,)
    bundle = export(Checkpoint.open(checkpoint), Path(out), ExportOptions(**VARIANTS[variant]))
    written = sum(f.stat().st_size for f in Path(out).iterdir())
    about = {k: v for k, v in (bundle.quantization or {}).items() if k in ("int4", "int8")}
    return {"peak_rss_mb": peak_mb(), "written_mb": round(written / 1e6, 1), **about}


class Decoder:
    """A backend fed with random tokens and slow tokens, the same for every variant."""

    def __init__(self, backend: str, path: str) -> None:
        from sfexport.checkpoint import Checkpoint
        from sfexport.engines.embedding import EmbeddingTable
        from sfexport.manifest import Bundle

        start = time.perf_counter()
        if backend == "torch":
            from sfexport.engines.torch_backend import TorchBackend

            self.backend = TorchBackend(Path(path))
            table = Checkpoint.open(path).tensors["model.embed_tokens.weight"]
        else:
            from sfexport.engines.onnxruntime_backend import OnnxRuntimeBackend

            bundle = Bundle.open(Path(path))
            self.backend = OnnxRuntimeBackend(bundle.path, bundle.weights_directory, bundle.facts)
            table = bundle.embedding()
        self.load_seconds = time.perf_counter() - start
        self.embed = EmbeddingTable(table)
        rng = np.random.default_rng(0)
        text = self.backend.facts.text
        slow = rng.standard_normal((*SLOW, text.hidden_size), dtype=np.float32)
        self.slow = self.backend.compress(slow)[1]
        self.ids = rng.integers(0, text.vocab_size, PREFILL + STEPS)
        self.past, self.length = None, 0

    def feed(self, ids: Any) -> np.ndarray:
        """Logits after some more tokens, all of which attend to the slow tokens."""
        from sfexport.engines.interface import DecoderStep

        attends = np.ones(len(ids), dtype=bool)
        step = DecoderStep(self.embed(ids)[None], self.length, attends, self.past, self.slow)
        logits, self.past = self.backend.decode(step)
        self.length += len(ids)
        return logits


def logits(bundle: str, out: str) -> dict[str, Any]:
    """Logits after the prompt and after each of STEPS given tokens."""
    decoder = Decoder("onnxruntime", bundle)
    rows = [decoder.feed(decoder.ids[:PREFILL])]
    rows += [decoder.feed([token]) for token in decoder.ids[PREFILL:]]
    np.save(out, np.stack(rows))
    return {}


def speed(backend: str, path: str) -> dict[str, Any]:
    """Tokens per second after a prompt, greedily."""
    decoder, tokens = Decoder(backend, path), []
    logits = decoder.feed(decoder.ids[:PREFILL])
    for count in (4, TIMED):  # the first few warm up
        start = time.perf_counter()
        for _ in range(count):
            tokens.append(int(logits.argmax()))
            logits = decoder.feed(tokens[-1:])
        seconds = time.perf_counter() - start
    return {
        "tokens": tokens,
        "tokens_per_second": round(TIMED / seconds, 2),
        "load_seconds": round(decoder.load_seconds, 1),
        "peak_rss_mb": peak_mb(),
    }


def compare(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    cosines = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    same = (found.argmax(1) == wanted.argmax(1)).mean()
    return {"cosine": round(float(cosines.mean()), 5), "same_token": round(float(same), 3)}


def run_size(size: str, folder: Path, rounds: int) -> dict[str, Any]:
    small = size != "7b"
    checkpoint = folder / f"checkpoint-{size}"
    if not checkpoint.exists():
        subprocess.run([sys.executable, str(HERE / "random_checkpoint.py"), size, str(checkpoint)], check=True)
    # In float32 the large one does not fit into a small machine's memory.
    variants = list(VARIANTS) if small else ["int4"]
    out: dict[str, Any] = {"size": size, "cores": os.cpu_count(), "variants": {}}
    for variant in variants:
        bundle = _place(folder, variant)
        out["variants"][variant] = {"export": measure("export", checkpoint, bundle, variant)}
        if small:
            measure("logits", bundle, folder / f"{variant}.npy")
    contestants = {v: ("onnxruntime", _place(folder, v)) for v in variants if v != "int4 plain"}
    if small:
        wanted = np.load(folder / "fp32.npy")
        for variant in variants:
            out["variants"][variant]["logits"] = compare(np.load(folder / f"{variant}.npy"), wanted)
        contestants[TORCH] = ("torch", checkpoint)
    race = _race(contestants, rounds)
    tokens = {name: best.pop("tokens") for name, best in race.items()}
    for name, best in race.items():
        if small:
            same = sum(ours == theirs for ours, theirs in zip(tokens[name], tokens[TORCH], strict=True))
            best |= {"tokens_as_torch": f"{same} of {len(tokens[TORCH])}"}
            best |= {"against_torch": round(best["tokens_per_second"] / race[TORCH]["tokens_per_second"], 2)}
        out["variants"].setdefault(name, {})["decode"] = best
    return out


def _race(contestants: dict[str, tuple[str, Path]], rounds: int) -> dict[str, dict[str, Any]]:
    """Each one's best of some rounds in which they take turns, so that other work on the machine hits all alike."""
    best: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name, (backend, path) in contestants.items():
            found = measure("speed", backend, path)
            if name not in best or found["tokens_per_second"] > best[name]["tokens_per_second"]:
                best[name] = found
    return best


def _place(folder: Path, variant: str) -> Path:
    return folder / variant.replace(", ", "-").replace(" ", "-")


def demo(variant: str, folder: str, clips: str) -> dict[str, Any]:
    """Right answers of the shipped model, and its logits after every question of the clips."""
    from shapes_accuracy import clips as make_clips

    from sfexport.demo.shipped import SHIPPED
    from sfexport.engines.build import build
    from sfexport.manifest import Bundle
    from sfexport.qa.pipeline import Pipeline

    bundle = Path(folder) / "bundle"
    export_variant(str(SHIPPED), str(bundle), variant)
    pipeline = Pipeline.load(build(Bundle.open(bundle), Path(folder) / "engines", "onnxruntime").path)
    options, rows, right = pipeline.generation_options().greedy(), [], []
    inner = pipeline.backend.decode

    def decode(step: Any) -> Any:
        logits, key_values = inner(step)
        rows.append(logits)
        return logits, key_values

    pipeline.backend.decode = decode
    first = []
    for path, questions in make_clips(Path(folder), 7, int(clips)):
        session = pipeline.encode(path)
        for question in questions:
            before = len(rows)
            right.append(session.ask(question.text, options).answer == question.answer)
            first.append(rows[before])
    np.save(Path(folder) / "logits.npy", np.stack(first))
    return {"right": sum(right), "asked": len(right), **_errors(Bundle.open(bundle))}


def _errors(bundle: Any) -> dict[str, Any]:
    return {kind: bundle.quantization[kind] for kind in ("int4", "int8")} if bundle.quantization else {}


def run_demo(folder: Path, clips: int) -> dict[str, Any]:
    out: dict[str, Any] = {"size": "demo", "variants": {}}
    for variant in VARIANTS:
        place = folder / variant
        place.mkdir()
        out["variants"][variant] = measure("demo", variant, place, clips)
    wanted = np.load(folder / "fp32" / "logits.npy")
    for variant, found in out["variants"].items():
        found["logits"] = compare(np.load(folder / variant / "logits.npy"), wanted)
    return out


def show(results: dict[str, Any]) -> None:
    rows = [("", "export s", "peak MB", "written MB", "weights off by", "logits cosine", "tokens/s", "load s", "MB")]
    for variant, found in results["variants"].items():
        exported, decode = found.get("export", {}), found.get("decode", {})
        error = (found if "int4" in found else exported).get("int4", {})
        cells = [exported.get(key, "") for key in ("seconds", "peak_rss_mb", "written_mb")]
        cells += [f"{error['error']:.2%}" if error else "", found.get("logits", {}).get("cosine", "")]
        cells += [decode.get(key, "") for key in ("tokens_per_second", "load_seconds", "peak_rss_mb")]
        if "right" in found:
            cells.append(f"{found['right']} of {found['asked']} right")
        rows.append((variant, *map(str, cells)))
    for row in rows:
        print(f"{row[0]:18}" + "".join(f"{cell:>16}" for cell in row[1:]))


CHILDREN = {"export": export_variant, "logits": logits, "speed": speed, "demo": demo}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("0.5b", "7b"), default="0.5b")
    parser.add_argument("--folder", type=Path, help="where to work; what is there is kept")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--clips", type=int, default=40, help="of --demo")
    parser.add_argument("--rounds", type=int, default=3, help="of decoding; each one's best counts")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = run_demo(folder, options.clips) if options.demo else run_size(options.size, folder, options.rounds)
    print(json.dumps(results)) if options.json else show(results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        # Libraries print too; only the last line is read.
        print(json.dumps(CHILDREN[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
