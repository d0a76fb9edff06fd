"""INT4 weights: seconds, memory and error of making them, and what they do to answers and to speed.

    python benchmarks/quantization.py                        a random 0.5 B model (needs 6 GB of disk, 4 GB of memory)
    python benchmarks/quantization.py --demo                 the shipped model: right answers, logits against fp32
    python benchmarks/quantization.py --goldens              the tests' recorded models: logits against fp32
    ... --json                                               one JSON document

Everything is measured in a process of its own. Random weights say how large errors of weights are, little of what they
do to a model: for that there is --demo; for the released model's size, full_size.py. `plain` is rounding by max/7.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import HERE, main_or_child, measure, run

sys.path.insert(0, str(HERE.parent))
from sfexport.engines.huge_pages import SETTING, TUNABLES  # noqa: E402

PREFILL, STEPS, TIMED, SLOW = 64, 8, 24, (16, 16)  # tokens; frames and tokens of each
TORCH = "torch eager fp32"
PAGES = {"": {TUNABLES: ""}, ", huge pages": {TUNABLES: SETTING}}
GOLDENS, TOKENIZER = HERE.parent / "tests" / "golden", HERE.parent / "sfexport" / "demo" / "model"
# name -> options of the export; 'plain' is no option of sfexport: the search is switched off.
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"weights": "reference"},
    "int4": {"quantize": "int4"},
    "int4 plain": {"quantize": "int4"},
    "int4, head fp16": {"quantize": "int4", "lm_head": "fp16"},
}


def export_variant(checkpoint: str, out: str, variant: str) -> dict[str, Any]:
    from sfexport.checkpoint.checkpoint import Checkpoint
    from sfexport.exporting import rounding as quantize
    from sfexport.exporting.export import ExportOptions, export

    if variant == "int4 plain":
        quantize.SHRINK = (1.0,)
    bundle = export(Checkpoint.open(checkpoint), Path(out), ExportOptions(**VARIANTS[variant]))
    written = sum(f.stat().st_size for f in Path(out).iterdir())
    about = {k: v for k, v in (bundle.quantization or {}).items() if k in ("int4", "int8")}
    return {"written_mb": round(written / 1e6, 1), **about}


class Decoder:
    """A backend fed with random tokens and slow tokens, the same for every variant."""

    def __init__(self, backend: str, path: str) -> None:
        from sfexport.artifacts.bundle import Bundle
        from sfexport.checkpoint.checkpoint import Checkpoint
        from sfexport.engines.embedding import EmbeddingTable

        start = time.perf_counter()
        if backend == "torch":
            from sfexport.engines.torch_backend import TorchBackend

            self.backend = TorchBackend(Path(path))
            table = Checkpoint.open(path).tensors["model.embed_tokens.weight"]
        else:
            from sfexport.engines.onnxruntime_backend import OnnxRuntimeBackend

            bundle = Bundle.open(Path(path))
            self.backend = OnnxRuntimeBackend(bundle.path, bundle.weights_directory, bundle.config)
            table = bundle.embedding()
        self.load_seconds = time.perf_counter() - start
        self.embed = EmbeddingTable(table)
        rng = np.random.default_rng(0)
        text = self.backend.config.text
        slow = rng.standard_normal((*SLOW, text.hidden_size), dtype=np.float32)
        self.slow = self.backend.compress(slow)[1]
        self.ids = rng.integers(0, text.vocab_size, PREFILL + STEPS)
        self.prefix, self.cache = None, None

    def feed(self, ids: Any) -> np.ndarray:
        """Logits after some more tokens, all of which attend to the slow tokens. The first ones are the prefix."""
        from sfexport.engines.interface import DecoderStep

        attends = np.ones(len(ids), dtype=bool)
        step = DecoderStep(self.embed(ids)[None], attends, self.prefix, self.cache, self.slow)
        logits, new = self.backend.decode(step)
        if self.prefix is None:
            self.prefix, self.cache = new, self.backend.new_cache(1, self.backend.capacity_for(STEPS + TIMED + 4))
        else:
            self.cache.append(new)
        return logits[0]


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
    }


def compare(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    cosines = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    same = (found.argmax(1) == wanted.argmax(1)).mean()
    return {"cosine": round(float(cosines.mean()), 5), "same_token": round(float(same), 3)}


def run_half_billion(folder: Path, rounds: int) -> dict[str, Any]:
    """A 0.5 B model: every variant's export, logits and speed, and PyTorch's speed."""
    checkpoint = folder / "checkpoint-0.5b"
    if not checkpoint.exists():
        run([sys.executable, HERE / "random_checkpoint.py", "0.5b", checkpoint])
    variants: dict[str, Any] = {}
    for variant in VARIANTS:
        bundle = _place(folder, variant)
        variants[variant] = {"export": measure(__file__, "export", checkpoint, bundle, variant)}
        measure(__file__, "logits", bundle, folder / f"{variant}.npy")
    wanted = np.load(folder / "fp32.npy")
    for variant in VARIANTS:
        variants[variant]["logits"] = compare(np.load(folder / f"{variant}.npy"), wanted)
    contestants = {v: ("onnxruntime", _place(folder, v)) for v in VARIANTS if v != "int4 plain"}
    race = _race({TORCH: ("torch", checkpoint), **contestants}, rounds)
    tokens = {name: best.pop("tokens") for name, best in race.items()}
    for name, best in race.items():
        same = sum(ours == theirs for ours, theirs in zip(tokens[name], tokens[TORCH], strict=True))
        best["tokens_as_torch"] = f"{same} of {len(tokens[TORCH])}"
        best["against_torch"] = round(best["tokens_per_second"] / race[TORCH]["tokens_per_second"], 2)
        variants.setdefault(name, {})["decode"] = best
    return {"size": "0.5b", "cores": os.cpu_count(), "variants": variants}


def _race(contestants: dict[str, tuple[str, Path]], rounds: int) -> dict[str, dict[str, Any]]:
    """Each one's best of some rounds in which they take turns, so that other work on the machine hits all alike.

    Everyone with the system's pages and with huge ones (as `sfexport ask` has them).
    """
    best: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name, (backend, path) in contestants.items():
            for suffix, extra in PAGES.items():
                found = measure(__file__, "speed", backend, path, extra=extra)
                before = best.get(name + suffix, found)
                best[name + suffix] = max(before, found, key=lambda run: run["tokens_per_second"])
    return best


def _place(folder: Path, variant: str) -> Path:
    return folder / variant.replace(", ", "-").replace(" ", "-")


def demo(variant: str, folder: str, clips: str) -> dict[str, Any]:
    """Right answers of the shipped model, and its logits after every question of the clips."""
    from shapes_accuracy import clips as make_clips

    from sfexport.artifacts.bundle import Bundle
    from sfexport.demo.shipped import SHIPPED
    from sfexport.engines.build import build
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
        out["variants"][variant] = measure(__file__, "demo", variant, place, clips)
    wanted = np.load(folder / "fp32" / "logits.npy")
    for variant, found in out["variants"].items():
        found["logits"] = compare(np.load(folder / variant / "logits.npy"), wanted)
    return out


def run_goldens(folder: Path) -> dict[str, Any]:
    """Logits of the test suite's recorded models, as far as one has matrices that can be rounded."""
    from sfexport.testing.random_checkpoint import preprocessor_config

    out: dict[str, Any] = {"size": "goldens", "variants": {}}
    for golden in sorted(path.parent for path in GOLDENS.glob("*/model.safetensors")):
        checkpoint = folder / golden.name
        shutil.copytree(golden, checkpoint)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TOKENIZER / name, checkpoint / name)
        with np.load(golden / "inputs.npz") as inputs:
            pixels = inputs["pixel_values_0"].shape[-1]
        (checkpoint / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(pixels)))
        for variant in ("fp32", "int4", "int4 plain"):
            bundle = folder / f"{golden.name}-{variant}"
            exported = measure(__file__, "export", checkpoint, bundle, variant)
            measure(__file__, "logits", bundle, folder / f"{variant}.npy")
            found = compare(np.load(folder / f"{variant}.npy"), np.load(folder / "fp32.npy"))
            if variant != "fp32" and exported["int4"]["weights"]:
                out["variants"][f"{golden.name}, {variant}"] = {"export": exported, "logits": found}
    return out


def show(results: dict[str, Any]) -> None:
    head = "export s|peak MB|written MB|weights off by|logits cosine|tokens/s|x torch|load s|MB"
    rows = [("", *head.split("|"))]
    for variant, found in results["variants"].items():
        exported, decode = found.get("export", {}), found.get("decode", {})
        error = (found if "int4" in found else exported).get("int4", {})
        cells = [exported.get(key, "") for key in ("seconds", "peak_rss_mb", "written_mb")]
        cells += [f"{error['error']:.2%}" if error else "", found.get("logits", {}).get("cosine", "")]
        cells += [decode.get(key, "") for key in ("tokens_per_second", "against_torch", "load_seconds", "peak_rss_mb")]
        if "right" in found:
            cells.append(f"{found['right']} of {found['asked']} right")
        rows.append((variant, *map(str, cells)))
    for row in rows:
        print(f"{row[0]:30}" + "".join(f"{cell:>16}" for cell in row[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; what is there is kept")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--goldens", action="store_true")
    parser.add_argument("--clips", type=int, default=40, help="of --demo")
    parser.add_argument("--rounds", type=int, default=3, help="of decoding; each one's best counts")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if options.goldens:
            results = run_goldens(folder)
        elif options.demo:
            results = run_demo(folder, options.clips)
        else:
            results = run_half_billion(folder, options.rounds)
    print(json.dumps(results)) if options.json else show(results)


if __name__ == "__main__":
    main_or_child(main, {"export": export_variant, "logits": logits, "speed": speed, "demo": demo})
