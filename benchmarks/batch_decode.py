"""Tokens per second of several questions decoded together, in ONNX Runtime.

    python benchmarks/random_checkpoint.py 0.5b DIR
    sfexport export DIR -o BUNDLE --quantize int4
    python benchmarks/batch_decode.py BUNDLE --rows 1,2,4,8

A video's prefix of 1,310 tokens and 5,184 slow tokens, both shared by all rows, random numbers throughout. Every round
goes through all numbers of rows, so that a slow spell meets them all; the best round of each counts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from sfexport.artifacts.bundle import Bundle
from sfexport.engines.embedding import EmbeddingTable
from sfexport.engines.interface import DecoderStep, KeyValues
from sfexport.engines.onnxruntime_backend import OnnxRuntimeBackend

PREFIX, FRAMES, CELLS = 1310, 64, 81
STEPS, WARM_UP = 40, 5


class Decoder:
    """A bundle's decoder with a prefilled prefix and slow K/V."""

    def __init__(self, path: Path) -> None:
        bundle, self._rng = Bundle.open(path), np.random.default_rng(0)
        self._backend = OnnxRuntimeBackend(bundle.path, bundle.weights_directory, bundle.config)
        text, self._embed = bundle.config.text, EmbeddingTable(bundle.embedding())
        slow = self._rng.standard_normal((FRAMES, CELLS, text.hidden_size), dtype=np.float32)
        self.slow = self._backend.compress(slow)[1]
        self._ids = self._rng.integers(0, text.vocab_size, PREFIX)
        _, prefix = self._backend.decode(DecoderStep(self._embed(self._ids)[None], np.zeros(PREFIX, dtype=bool)))
        self._prefix = self._backend.join([prefix])

    def tokens_per_second(self, rows: int, slow: KeyValues | None) -> float:
        """All rows' tokens per second, by the median of STEPS steps."""
        cache, seconds = self._backend.new_cache(rows, self._backend.capacity_for(STEPS)), []
        for step in range(STEPS):
            embeds = np.repeat(self._embed([int(self._ids[step])])[None], rows, axis=0)
            start = time.perf_counter()
            _, new = self._backend.decode(DecoderStep(embeds, np.array([slow is not None]), self._prefix, cache, slow))
            cache.append(new)
            seconds.append(time.perf_counter() - start)
        return rows / float(np.median(seconds[WARM_UP:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", default="1,2,4,8", help="numbers of questions, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    counts, decoder = [int(part) for part in options.rows.split(",")], Decoder(options.bundle)
    print("| mode | rows | tokens/s | against one row |\n|---|---|---|---|")
    for mode, slow in (("released", None), ("trained", decoder.slow)):
        found = [[decoder.tokens_per_second(rows, slow) for rows in counts] for _ in range(options.rounds)]
        best = np.max(found, axis=0)
        for rows, speed in zip(counts, best, strict=True):
            print(f"| {mode} | {rows} | {speed:.1f} | {speed / best[0]:.2f} |")


if __name__ == "__main__":
    main()
