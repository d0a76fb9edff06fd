"""Tokens per second of several questions decoded together.

    python benchmarks/random_checkpoint.py 0.5b DIR
    sfexport export DIR -o BUNDLE --quantize int4
    python benchmarks/batch_decode.py BUNDLE --rows 1,2,4,8

BUNDLE runs in ONNX Runtime; an engine directory of any backend can be named in its place. Engines of TensorRT are
measured with and without CUDA graphs.

A video's prefix of 1,310 tokens and 5,184 slow tokens, both shared by all rows, random numbers throughout. Tokens are
chosen greedily. Every round goes through all numbers of rows, so that a slow spell meets them all; the best round of
each counts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from sfexport.artifacts.bundle import Bundle
from sfexport.artifacts.engines import Engines
from sfexport.artifacts.manifest_files import BUNDLE_FILE
from sfexport.engines.build import open_backend
from sfexport.engines.embedding import EmbeddingTable
from sfexport.engines.interface import Backend, DecoderStep, KeyValues
from sfexport.engines.onnxruntime_backend import OnnxRuntimeBackend

PREFIX, FRAMES, CELLS = 1310, 64, 81
STEPS, WARM_UP = 40, 5
PREFILL_CHUNK = 512  # engines take no longer prompts than they were built for


def open_decoder(path: Path) -> tuple[Bundle, Backend]:
    if (path / BUNDLE_FILE).is_file():
        bundle = Bundle.open(path)
        return bundle, OnnxRuntimeBackend(bundle.path, bundle.weights_directory, bundle.config)
    engines = Engines.open(path)
    return engines.bundle, open_backend(engines)


class Decoder:
    """A decoder with a prefilled prefix and slow K/V."""

    def __init__(self, path: Path) -> None:
        self._rng = np.random.default_rng(0)
        bundle, self.backend = open_decoder(path)
        text, self._embed = bundle.config.text, EmbeddingTable(bundle.embedding())
        slow = self._rng.standard_normal((FRAMES, CELLS, text.hidden_size), dtype=np.float32)
        self.slow = self.backend.compress(slow)[1]
        self._ids = self._rng.integers(0, text.vocab_size, PREFIX)
        self._prefix = self._prefill()

    def _prefill(self) -> KeyValues:
        prefix: KeyValues | None = None
        for start in range(0, PREFIX, PREFILL_CHUNK):
            embeds = self._embed(self._ids[start : start + PREFILL_CHUNK].tolist())
            step = DecoderStep(embeds[None], np.zeros(len(embeds), dtype=bool), prefix)
            _, new = self.backend.decode(step)
            prefix = self.backend.join([new] if prefix is None else [prefix, new])
        assert prefix is not None
        return prefix

    def tokens_per_second(self, rows: int, slow: KeyValues | None) -> float:
        """All rows' tokens per second, by the median of STEPS steps."""
        cache, seconds = self.backend.new_cache(rows, self.backend.capacity_for(STEPS)), []
        for i in range(STEPS):
            embeds = np.repeat(self._embed([int(self._ids[i])])[None], rows, axis=0)
            start = time.perf_counter()
            step = DecoderStep(embeds, np.array([slow is not None]), self._prefix, cache, slow)
            logits, new = self.backend.decode_later(step)
            cache.append(new)
            if logits.best() is None:
                logits.values().argmax(1)
            seconds.append(time.perf_counter() - start)
        return rows / float(np.median(seconds[WARM_UP:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="BUNDLE|ENGINES")
    parser.add_argument("--rows", default="1,2,4,8", help="numbers of questions, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    counts, decoder = [int(part) for part in options.rows.split(",")], Decoder(options.path)
    ways = (True, False) if hasattr(decoder.backend, "replays") else (None,)
    print("| mode | CUDA graphs | rows | tokens/s | against one row |\n|---|---|---|---|---|")
    for mode, slow in (("released", None), ("trained", decoder.slow)):
        for replays in ways:
            if replays is not None:
                decoder.backend.replays = replays  # type: ignore[attr-defined]
            found = [[decoder.tokens_per_second(rows, slow) for rows in counts] for _ in range(options.rounds)]
            best = np.max(found, axis=0)
            graphs = {True: "yes", False: "no", None: "-"}[replays]
            for rows, speed in zip(counts, best, strict=True):
                print(f"| {mode} | {graphs} | {rows} | {speed:.1f} | {speed / best[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
