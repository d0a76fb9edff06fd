"""Measure prefill cost against the number of frames: slow-fast against all frames in self-attention.

    python benchmarks/frames.py -o docs/benchmarks      frames.md and frames.svg (2 GB of disk, 5 GB of memory)
    python benchmarks/frames.py --computed              the released model's FLOPs only: nothing is run
    python benchmarks/frames.py --quick                 a small run, to see whether it works

Computed: FLOPs of the released 7 B decoder's prefill, from sfexport/planning/flops.py. Measured: seconds of the
decoder's prefill under ONNX Runtime, for a random decoder as wide as Qwen2-0.5B. Strides are such that 16 frames' worth
of fast tokens stay, as in the paper. Every repetition goes through all settings; the best of each counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
from frames_plot import Line, draw  # noqa: E402
from sparse_checkpoint import QWEN2_7B  # noqa: E402

from sfexport.checkpoint.config import ModelConfig  # noqa: E402
from sfexport.planning.flops import Lengths, decoder_flops, prefill_calls, slow_key_value_flops  # noqa: E402

FRAMES = (16, 32, 64, 96, 128, 256, 512, 1024, 1536)
ALL_FRAMES = (16, 32, 64, 128)  # measured with all frames in self-attention
FEWEST = 16
CELLS, BEFORE, QUESTION = 81, 14, 86  # slow tokens of a frame; text tokens, 100 in all as in the paper's reckoning
LAYERS = 8  # one hybrid layer, as every eighth of the released model is


def slow_fast_lengths(frames: int) -> Lengths:
    """16 frames' worth of fast tokens, all frames' slow tokens."""
    return Lengths(frames, BEFORE, FEWEST * CELLS, QUESTION, frames * CELLS)


def all_frames_lengths(frames: int) -> Lengths:
    """All frames' tokens in the prompt, no slow branch."""
    return Lengths(frames, BEFORE, frames * CELLS, QUESTION, 0)


def prompt_flops(config: ModelConfig, at: Lengths) -> tuple[int, int]:
    """Of the decoder, the whole prompt in one call, its text attending to the slow tokens; and of the slow K/V."""
    decoder = decoder_flops(config, at.prompt, slow=at.slow, rows=at.before + at.question).total
    return decoder, slow_key_value_flops(config, at.slow)


@dataclass(frozen=True)
class Seconds:
    """Of a setting: slow K/V (with the fast tokens), and the decoder's prefill."""

    compressor: float
    decoder: float

    @property
    def whole(self) -> float:
        return self.compressor + self.decoder


class Decoder:
    """A random decoder under ONNX Runtime. Frames are stood in for by random slow tokens."""

    def __init__(self, folder: Path) -> None:
        import random_checkpoint

        from sfexport.checkpoint.checkpoint import Checkpoint
        from sfexport.engines.onnxruntime_backend import OnnxRuntimeBackend
        from sfexport.exporting.export import ExportOptions, export

        config, tower, size = random_checkpoint.SIZES["0.5b"]
        config = config | {"num_hidden_layers": LAYERS, "cross_attn_max_layer_depth": LAYERS}
        random_checkpoint.SIZES["frames"] = (config, tower, size)
        random_checkpoint.write_random_checkpoint(folder / "checkpoint", "frames")
        checkpoint = Checkpoint.open(folder / "checkpoint")
        bundle = export(checkpoint, folder / "bundle", ExportOptions(weights="reference"))
        self._backend = OnnxRuntimeBackend(bundle.path, bundle.weights_directory, bundle.config)
        self.config = bundle.config
        self._rng = np.random.default_rng(0)

    def _embeds(self, *shape: int) -> np.ndarray:
        return self._rng.standard_normal((*shape, self.config.text.hidden_size), dtype=np.float32)

    def prefill(self, at: Lengths) -> Seconds:
        """A session's calls on random embeddings: before the video, its fast tokens, the question."""
        slow, compressor = self._compress(at) if at.slow else (None, 0.0)
        calls = prefill_calls(self.config, at)
        pieces = [(piece, call.slow) for call in calls.values() for piece in _pieces(call.positions)]
        past, total = None, 0.0
        for positions, attends in pieces:
            embeds = self._embeds(1, positions)
            start = time.perf_counter()
            past = self._step(embeds, past, slow if attends else None)
            total += time.perf_counter() - start
        return Seconds(compressor, total)

    def _compress(self, at: Lengths) -> tuple[Any, float]:
        fast = replace(self.config.slow_fast.fast, temporal_stride=at.frames // FEWEST)
        self._backend.config = replace(self.config, slow_fast=replace(self.config.slow_fast, fast=fast))
        tokens = self._embeds(at.frames, CELLS)
        start = time.perf_counter()
        fast_tokens, slow = self._backend.compress(tokens)
        seconds = time.perf_counter() - start
        if len(fast_tokens) != at.fast or slow.length != at.slow:
            raise AssertionError(f"{len(fast_tokens)} fast and {slow.length} slow tokens for {at}")
        return slow, seconds

    def _step(self, embeds: np.ndarray, past: Any, slow: Any) -> Any:
        from sfexport.engines.interface import DecoderStep

        positions = embeds.shape[1]
        attends = np.full(positions, slow is not None)
        _, new = self._backend.decode(DecoderStep(embeds, attends, past, slow=slow))
        return self._backend.join([past, new]) if past else new


def _pieces(positions: int) -> list[int]:
    """Runs of at most 16 frames' tokens: the scores of all positions at once would not fit into memory."""
    most = FEWEST * CELLS
    return [min(most, positions - start) for start in range(0, positions, most)]


def measure(run: Callable[[Lengths], Seconds], settings: list[Lengths], repeats: int) -> dict[Lengths, Seconds]:
    """The best of each; every repetition goes through all settings, so that a slow spell meets them all."""
    found: dict[Lengths, list[Seconds]] = {at: [] for at in settings}
    for i in range(repeats):
        for at in settings:
            found[at].append(run(at))
            print(f"{i + 1}/{repeats}: {at}: {found[at][-1]}", file=sys.stderr, flush=True)
    return {at: min(runs, key=lambda seconds: seconds.whole) for at, runs in found.items()}


def computed_table(config: ModelConfig) -> list[str]:
    """Both sides against their own 16 frames."""

    def flops(at: Lengths) -> int:
        return sum(prompt_flops(config, at))

    ours, theirs = (flops(lengths(FEWEST)) for lengths in (slow_fast_lengths, all_frames_lengths))
    rows = []
    for frames in FRAMES:
        slow_fast, everything = flops(slow_fast_lengths(frames)), flops(all_frames_lengths(frames))
        rows.append(
            f"| {frames:,} | {slow_fast / 1e12:,.2f} | {_growth(slow_fast / ours)} "
            f"| {everything / 1e12:,.1f} | {_growth(everything / theirs)} | {everything / slow_fast:,.1f}x |"
        )
    head = "| frames | slow-fast, TFLOP | against 16 | all in self-attention, TFLOP | against 16 | ratio |"
    return [head, "|---:" * 6 + "|", *rows]


def measured_table(config: ModelConfig, seconds: dict[Lengths, Seconds]) -> list[str]:
    """Both sides against their own 16 frames; FLOPs of the same decoder beside."""
    first, plain = slow_fast_lengths(FEWEST), seconds[all_frames_lengths(FEWEST)].decoder
    rows = []
    for frames in sorted({at.frames for at in seconds}):
        at, every = slow_fast_lengths(frames), seconds.get(all_frames_lengths(frames))
        ours = seconds[at]
        growths = [
            ours.decoder / seconds[first].decoder,
            ours.whole / seconds[first].whole,
            sum(prompt_flops(config, at)) / sum(prompt_flops(config, first)),
        ]
        others = ["", "", ""]
        if every:
            others = [f"{every.decoder:.2f}", _growth(every.decoder / plain), f"{every.decoder / ours.whole:.1f}x"]
        cells = [f"{frames:,}", f"{ours.compressor:.3f}", f"{ours.decoder:.3f}", *map(_growth, growths), *others]
        rows.append(f"| {' | '.join(cells)} |")
    slow_fast = "slow K/V, s | prefill, s | prefill against 16 | with slow K/V | FLOPs"
    head = f"| frames | {slow_fast} | all in self-attention, s | against 16 | ratio |"
    return [head, "|---:" * 9 + "|", *rows]


def against_plain(config: ModelConfig, seconds: dict[Lengths, Seconds]) -> str:
    """A sentence: 128 frames against 16 in self-attention, the paper's comparison."""
    most, plain = slow_fast_lengths(128), all_frames_lengths(FEWEST)
    computed = sum(prompt_flops(config, most)) / sum(prompt_flops(config, plain))
    text = f"Against 16 frames in self-attention, without slow branch, 128 frames cost {_growth(computed)} FLOPs in 7 B"
    if most not in seconds:
        return text + "."
    base = seconds[plain].decoder
    whole, alone = _growth(seconds[most].whole / base), _growth(seconds[most].decoder / base)
    return f"{text} and {alone} seconds here ({whole} with slow K/V)."


def _growth(ratio: float) -> str:
    return f"{ratio - 1:+.1%}" if ratio < 10 else f"x{ratio:,.0f}"


def lines(config: ModelConfig, seconds: dict[Lengths, Seconds]) -> list[Line]:
    """The plot's lines, relative to 16 frames in self-attention."""

    def computed(of: ModelConfig, lengths: Callable[[int], Lengths]) -> list[tuple[float, float]]:
        base = prompt_flops(of, all_frames_lengths(FEWEST))[0]
        return [(n, sum(prompt_flops(of, lengths(n))) / base) for n in FRAMES]

    plain = seconds[all_frames_lengths(FEWEST)].decoder
    ours = [(at.frames, s.whole / plain) for at, s in seconds.items() if at.slow]
    theirs = [(at.frames, s.decoder / plain) for at, s in seconds.items() if not at.slow]
    return [
        Line("all frames in self-attention, 7 B, FLOPs", "#c44e52", computed(config, all_frames_lengths), dashed=True),
        Line("all frames in self-attention, measured", "#c44e52", sorted(theirs), points=True),
        Line("slow-fast, 7 B, FLOPs", "#4c72b0", computed(config, slow_fast_lengths), dashed=True),
        Line("slow-fast, measured", "#4c72b0", sorted(ours), points=True),
    ]


def page(computed: list[str], measured: list[str], remark: str, repeats: int, about: str) -> str:
    intro = (
        f"`python benchmarks/frames.py --repeats {repeats}`. {about} Prompts: 100 tokens of text and the video; "
        f"slow-fast keeps 16 frames' worth of fast tokens ({FEWEST * CELLS:,}) by its strides, and its text attends to "
        f"{CELLS} slow tokens of every frame by cross-attention. The alternative has all frames' tokens in the prompt. "
        "The figures leave out the vision tower, whose cost grows with the frames either way."
    )
    about_computed = (
        "Decoder and slow K/V, from `sfexport/planning/flops.py`; both sides against their own 16 frames. The model "
        "takes 4,096 positions: 64 frames in self-attention exceed them."
    )
    about_measured = (
        f"A random decoder as wide as Qwen2-0.5B ({LAYERS} layers, one of them hybrid, float32), called as a session "
        f"calls it. The best of {repeats} interleaved repetitions. FLOPs: by the same formulas, for this decoder."
    )
    blocks = [
        "# Prefill cost against the number of frames",
        intro,
        "![prefill against 16 frames](frames.svg)",
        "## FLOPs of the released 7 B model's prefill (computed)",
        about_computed,
        "\n".join(computed),
        "## Seconds under ONNX Runtime (measured)",
        about_measured,
        "\n".join(measured),
        remark,
    ]
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--computed", action="store_true", help="print the computed table and run nothing")
    parser.add_argument("--quick", action="store_true", help="16 and 32 frames, once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="directory for frames.md and frames.svg")
    options = parser.parse_args()
    config = ModelConfig.from_dict(QWEN2_7B)
    if options.computed:
        print("\n".join(computed_table(config)))
        return
    frames = (16, 32) if options.quick else FRAMES
    repeats = 1 if options.quick else options.repeats
    settings = [slow_fast_lengths(n) for n in frames]
    settings += [all_frames_lengths(n) for n in ALL_FRAMES if n in frames]
    with tempfile.TemporaryDirectory() as folder:
        decoder = Decoder(Path(folder))
        decoder.prefill(slow_fast_lengths(FEWEST))  # not timed
        seconds = measure(decoder.prefill, settings, repeats)
        measured = measured_table(decoder.config, seconds)
    remark = against_plain(config, seconds)
    print("\n".join([*measured, remark]))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        text = page(computed_table(config), measured, remark, repeats, _about())
        (options.output / "frames.md").write_text(text)
        plot = draw(lines(config, seconds), "frames", "prefill, times 16 frames' in self-attention")
        (options.output / "frames.svg").write_text(plot)


def _about() -> str:
    import os
    import platform

    import onnxruntime

    today = time.strftime("%Y-%m-%d")
    return f"{today}: {os.cpu_count()} {platform.machine()} cores, no GPU, ONNX Runtime {onnxruntime.__version__}."


if __name__ == "__main__":
    main()
