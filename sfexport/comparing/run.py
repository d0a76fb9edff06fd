"""Run engines and the PyTorch model on the same frames and compare their outputs.

Graph by graph, each engine gets PyTorch's inputs, so that a difference comes from that graph alone; for the answers
each side uses its own outputs, from the pixels to the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sfexport.checkpoint.config import Attending, DecodeMode
from sfexport.comparing.compare import Comparison, Tolerance, compare, worst
from sfexport.comparing.parity_report import AnswerPair, ParityReport
from sfexport.engines.interface import VISION_CHUNK, Backend, Cache, DecoderStep, KeyValues
from sfexport.engines.torch_backend import TorchBackend
from sfexport.exporting.dequantize import rounded_matrices
from sfexport.progress import OnStep, no_step
from sfexport.qa.pipeline import Pipeline
from sfexport.qa.video_session import VideoSession
from sfexport.values import whole_number

DEFAULT_QUESTION = "What happens in the video?"


def run_parity(
    pipeline: Pipeline,
    video: str | Path | None,
    question: str = DEFAULT_QUESTION,
    frames: int | None = None,
    max_new_tokens: int = 16,
    tolerance: Tolerance | None = None,
    on_step: OnStep = no_step,
) -> ParityReport:
    """Compare the engines of `pipeline` with the PyTorch model of the checkpoint they came from.

    PyTorch reads the checkpoint that was exported, even if the bundle has a copy of its weights, so that a wrong
    choice of weights is found. If the checkpoint is gone, it reads the copy, and the report says so.

    Args:
        video: a clip; default frames of noise.
        tolerance: default that of the engines' precision.

    Raises:
        MissingDependency: torch is not installed.
        BundleError: the checkpoint is gone.
    """
    tolerance = tolerance or tolerance_for(pipeline)
    whole_number(max_new_tokens, "--max-new-tokens")
    pixels, rows = _pixels(pipeline, video, frames)
    pipeline.check_question(question, len(rows))
    on_step("loading the PyTorch model")
    source = pipeline.bundle.original_checkpoint or pipeline.bundle.checkpoint_path
    oracle = TorchBackend(source)
    engine = pipeline.backend
    single = len(rows) == 1
    on_step(f"vision encoder on {len(pixels)} frames")
    engine_tokens, torch_tokens = (encode_chunks(backend, pixels, single) for backend in (engine, oracle))
    comparisons = [compare("vision_encoder", "slow_tokens", engine_tokens, torch_tokens, tolerance)]
    engine_slow, slow = engine_tokens[rows], torch_tokens[rows]
    on_step("compressor")
    fast, key_values, found = _compare_compressor(engine, oracle, slow, tolerance)
    comparisons += found
    rounding = None
    if pipeline.bundle.quantization and engine.name != oracle.name:
        on_step("rounding PyTorch's weights as the engines'")
        rounding = _round(pipeline, oracle, fast, key_values, question, tolerance)
    on_step("decoder")
    comparisons += _compare_decoder(pipeline, oracle, fast, key_values, question, max_new_tokens, tolerance)
    on_step("answers")
    recorded = _Recorded(oracle)
    ours, theirs = _session(pipeline, engine, engine_slow), _session(pipeline, recorded, slow)
    answers = [
        _answers(pipeline, ours, theirs, recorded, question, mode, max_new_tokens, tolerance) for mode in DecodeMode
    ]
    return ParityReport(
        engine.name,
        tolerance,
        len(rows),
        comparisons,
        answers,
        rounding,
        checkpoint=str(source),
        is_copy=pipeline.bundle.original_checkpoint is None,
    )


def _round(
    pipeline: Pipeline,
    oracle: TorchBackend,
    fast: np.ndarray,
    slow: KeyValues | None,
    question: str,
    tolerance: Tolerance,
) -> Comparison:
    """Give PyTorch the engines' rounded weights, and compare its logits with those before."""
    embeds, attends = prompt_inputs(pipeline, fast, question)
    step = DecoderStep(embeds[None], attends, slow=slow)
    exact, _ = oracle.decode(step)
    oracle.use_rounded(rounded_matrices(pipeline.bundle))
    return compare("decoder", "prefill logits", oracle.decode(step)[0][0], exact[0], tolerance)


def tolerance_for(pipeline: Pipeline, atol: float | None = None, rtol: float | None = None) -> Tolerance:
    """Return the tolerance for the engines' precision, with atol and rtol replaced where given."""
    is_oracle = pipeline.engines.content["backend"] == TorchBackend.name  # which is float32 whatever the graphs are
    if is_oracle:
        return Tolerance.for_precision("fp32", atol, rtol)
    rounded = pipeline.bundle.quantization is not None
    return Tolerance.for_precision(pipeline.bundle.precision, atol, rtol, rounded)


def _pixels(pipeline: Pipeline, video: str | Path | None, frames: int | None) -> tuple[np.ndarray, np.ndarray]:
    if video is not None:
        return pipeline.read_frames(video, frames, "linspace")
    count, size = min(pipeline.bundle.frames, VISION_CHUNK) if frames is None else frames, pipeline.bundle.image.crop
    pipeline.check_frames(pipeline.frame_count(count))
    noise = np.random.default_rng(0).normal(size=(count, 3, size, size)).astype(np.float32)
    return noise, np.arange(count)


def encode_chunks(backend: Backend, pixels: np.ndarray, single: bool) -> np.ndarray:
    """Encode all frames into slow tokens [frames, P, H].

    Args:
        pixels: float32 [frames, 3, S, S].
        single: the one frame is a picture, whose tokens are not pooled.
    """
    chunks = [pixels[i : i + VISION_CHUNK] for i in range(0, len(pixels), VISION_CHUNK)]
    return np.concatenate([backend.encode_frames(chunk, single) for chunk in chunks])


def _compare_compressor(
    engine: Backend, oracle: Backend, slow: np.ndarray, tolerance: Tolerance
) -> tuple[np.ndarray, KeyValues | None, list[Comparison]]:
    engine_fast, engine_kv = engine.compress(slow)
    fast, key_values = oracle.compress(slow)
    found = [compare("compressor", "fast_tokens", engine_fast, fast, tolerance)]
    if key_values is not None:
        assert engine_kv is not None  # both have the slow branch, or neither has
        pairs = zip(engine.to_numpy(engine_kv), oracle.to_numpy(key_values), strict=True)
        for i, pair in enumerate(pairs):
            name = f"slow_key_values.{i // 2}.{('key', 'value')[i % 2]}"
            found.append(compare("compressor", name, *pair, tolerance))
    return fast, key_values, found


def _compare_decoder(
    pipeline: Pipeline,
    oracle: Backend,
    fast: np.ndarray,
    slow: KeyValues | None,
    question: str,
    steps: int,
    tolerance: Tolerance,
) -> list[Comparison]:
    """Compare a prefill of the whole prompt, then decode steps fed PyTorch's greedy tokens, in both modes."""
    engine = pipeline.backend
    sides = (engine, oracle)
    slow_of = {oracle.name: slow, engine.name: slow and engine.from_numpy(oracle.to_numpy(slow))}
    if engine.name == oracle.name:
        slow_of = {oracle.name: slow}
    embeds, attends = prompt_inputs(pipeline, fast, question)
    prefill = [b.decode(DecoderStep(embeds[None], attends, slow=slow_of[b.name])) for b in sides]
    found = [compare("decoder", "prefill logits", prefill[0][0][0], prefill[1][0][0], tolerance)]
    found += _compare_layers(sides, [p[1] for p in prefill], tolerance)
    for mode in DecodeMode:
        found.append(_compare_steps(pipeline, sides, prefill, slow_of, steps, mode, tolerance))
    return found


def prompt_inputs(pipeline: Pipeline, fast: np.ndarray, question: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompt's merged embeddings [L, H] and its attending positions, bool [L]."""
    ids, embed = pipeline.tokenizer.prompt(question), pipeline.embedding
    embeds = np.concatenate([embed(ids.before), fast, embed(ids.after)])
    attends = pipeline.bundle.config.slow_fast.attends
    before, visual, after = len(ids.before), len(fast), len(ids.after)
    return embeds, np.repeat(
        [attends != Attending.TEXT_AFTER_VIDEO, attends == Attending.ALL, True], [before, visual, after]
    )


def _compare_layers(sides: tuple[Backend, Backend], present: list[KeyValues], tolerance: Tolerance) -> list[Comparison]:
    """Compare K and V of every layer; return the worst comparison alone, or the first that fails."""
    pairs = zip(sides[0].to_numpy(present[0]), sides[1].to_numpy(present[1]), strict=True)
    found = [
        compare("decoder", f"layer {i // 2} {('key', 'value')[i % 2]}", *pair, tolerance)
        for i, pair in enumerate(pairs)
    ]
    failed = [c for c in found if not c.passed]
    return failed[:1] or [worst(found)]


def _compare_steps(
    pipeline: Pipeline,
    sides: tuple[Backend, Backend],
    prefill: list[tuple[np.ndarray, KeyValues]],
    slow_of: dict[str, KeyValues | None],
    steps: int,
    mode: str,
    tolerance: Tolerance,
) -> Comparison:
    vocabulary = pipeline.tokenizer.vocabulary_size
    last = prefill[1][0][0]
    logits: list[list[np.ndarray]] = [[], []]
    trained = mode == DecodeMode.TRAINED
    caches = [backend.new_cache(1, backend.capacity_for(steps)) for backend in sides]
    for _ in range(steps):
        embeds = pipeline.embedding([int(last[:vocabulary].argmax())])[None]
        for side, backend in enumerate(sides):
            slow = slow_of[backend.name] if trained else None
            step = DecoderStep(embeds, np.array([trained]), prefill[side][1], caches[side], slow)
            found, new = backend.decode(step)
            caches[side].append(new)
            logits[side].append(found[0])
        last = logits[1][-1]
    return compare("decoder", f"{mode} decode logits", np.stack(logits[0]), np.stack(logits[1]), tolerance)


def _session(pipeline: Pipeline, backend: Backend, slow: np.ndarray) -> VideoSession:
    return VideoSession(backend, pipeline.tokenizer, pipeline.embedding, *backend.compress(slow))


class _Recorded(Backend):
    """Runs another backend and keeps the logits of its decoder steps."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self.name, self.config = backend, backend.name, backend.config
        self.logits: list[np.ndarray] = []

    def encode_frames(self, pixel_values: np.ndarray, single_image: bool) -> np.ndarray:
        return self._backend.encode_frames(pixel_values, single_image)

    def compress(self, slow_tokens: np.ndarray) -> tuple[np.ndarray, KeyValues | None]:
        return self._backend.compress(slow_tokens)

    def to_numpy(self, tensors: KeyValues) -> list[np.ndarray]:
        return self._backend.to_numpy(tensors)

    def from_numpy(self, arrays: list[np.ndarray]) -> KeyValues:
        return self._backend.from_numpy(arrays)

    def decode(self, step: DecoderStep) -> tuple[np.ndarray, KeyValues]:
        logits, new = self._backend.decode(step)
        self.logits.append(logits[0])
        return logits, new

    def join(self, parts: Sequence[KeyValues]) -> KeyValues:
        return self._backend.join(parts)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        return self._backend.new_cache(rows, capacity)


def _answers(
    pipeline: Pipeline,
    engine: VideoSession,
    oracle: VideoSession,
    recorded: _Recorded,
    question: str,
    mode: str,
    max_new_tokens: int,
    tolerance: Tolerance,
) -> AnswerPair:
    options = pipeline.generation_options().greedy().override(max_new_tokens=max_new_tokens)
    ours = engine.ask(question, options, mode)
    recorded.logits.clear()
    theirs = oracle.ask(question, options, mode)
    equal = next(
        (i for i, (x, y) in enumerate(zip(ours.ids, theirs.ids, strict=False)) if x != y),
        min(len(ours.ids), len(theirs.ids)),
    )
    tie = None
    if equal < min(len(ours.ids), len(theirs.ids)):
        tie = tie_within(recorded.logits[equal], theirs.ids[equal], ours.ids[equal], tolerance)
    same = ours.ids == theirs.ids or tie is not None
    return AnswerPair(mode, question, ours.answer, theirs.answer, len(theirs.ids), equal, same, tie)


def tie_within(logits: np.ndarray, chosen: int, other: int, tolerance: Tolerance) -> float | None:
    """Return by how much the chosen token's logit exceeds the other's, if each may be off by half of it; else None."""
    gap = float(logits[chosen] - logits[other])
    allowed = tolerance.atol + tolerance.rtol * float(np.abs(logits).max())
    return gap if gap <= 2 * allowed else None
