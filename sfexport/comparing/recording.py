"""PyTorch's recorded outputs for the demo, which engines are compared with where PyTorch is not installed.

`record` makes a `Recording` with PyTorch; `compare_with` runs engines on its frames and compares. NumPy only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sfexport.checkpoint.config import DecodeMode
from sfexport.checkpoint.image_processor import ImageProcessorConfig
from sfexport.comparing.compare import Comparison, Tolerance, compare, worst
from sfexport.comparing.parity_report import AnswerPair, ParityReport
from sfexport.comparing.run import encode_chunks, prompt_inputs
from sfexport.engines.interface import Backend, DecoderStep, KeyValues
from sfexport.qa.pipeline import Pipeline
from sfexport.qa.video_session import VideoSession
from sfexport.video.preprocessing import preprocess

KEPT = 1024  # values of an output that are recorded; of a larger one evenly spaced values, at least so many
Outputs = dict[tuple[str, str], np.ndarray]  # by graph and output


@dataclass(frozen=True)
class Source:
    """The versions and the question that a recording was made with.

    Attributes:
        torch: version of PyTorch.
        transformers: version of transformers.
        question: the question that was asked.
        steps: number of decode steps, and largest number of tokens of an answer.
    """

    torch: str
    transformers: str
    question: str
    steps: int


@dataclass(frozen=True)
class Answered:
    """PyTorch's greedy answer in one decode mode: its text and its token ids."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Recording:
    """Frames, and PyTorch's outputs and answers for them.

    Attributes:
        frames: uint8 [frames, S, S, 3], RGB, already of the vision tower's size.
        tokens: ids fed to the decode steps, by decode mode.
        shapes: full shape of each output, by graph and output.
        samples: float32, evenly spaced values of the flattened output (all of them if it is small).
    """

    source: Source
    frames: np.ndarray
    tokens: dict[str, list[int]]
    answers: dict[str, Answered]
    shapes: dict[tuple[str, str], tuple[int, ...]]
    samples: Outputs

    def save(self, file: Path) -> None:
        """Write the recording as an .npz file."""
        notes = {
            "source": asdict(self.source),
            "tokens": self.tokens,
            "answers": {mode: asdict(answer) for mode, answer in self.answers.items()},
            "shapes": [[*key, list(shape)] for key, shape in self.shapes.items()],
        }
        arrays = {"/".join(key): values for key, values in self.samples.items()}
        stored: dict[str, Any] = {"notes": np.array(json.dumps(notes)), "frames": self.frames, **arrays}
        np.savez_compressed(file, **stored)

    @classmethod
    def load(cls, file: Path) -> Recording:
        """Read a recording that `save` wrote."""
        with np.load(file, allow_pickle=False) as stored:
            notes = json.loads(str(stored["notes"]))
            shapes = {(graph, name): tuple(shape) for graph, name, shape in notes["shapes"]}
            samples = {key: stored["/".join(key)] for key in shapes}
            frames = stored["frames"]
        answers = {mode: Answered(**answer) for mode, answer in notes["answers"].items()}
        return cls(Source(**notes["source"]), frames, notes["tokens"], answers, shapes, samples)


def record(pipeline: Pipeline, oracle: Backend, frames: np.ndarray, source: Source) -> Recording:
    """Run PyTorch on the frames and keep its outputs, the larger ones in part.

    Args:
        pipeline: engines made from the checkpoint of `oracle`: their tokenizer and embeddings are used.
        frames: uint8 [frames, S, S, 3] of the vision tower's size.
    """
    tokens: dict[str, list[int]] = {}
    outputs, answers = _run(pipeline, oracle, frames, source, tokens)
    shapes = {key: values.shape for key, values in outputs.items()}
    return Recording(source, frames, tokens, answers, shapes, {key: _sample(x) for key, x in outputs.items()})


def compare_with(recording: Recording, pipeline: Pipeline, tolerance: Tolerance) -> ParityReport:
    """Run the engines on the recorded frames and compare their outputs with PyTorch's.

    Unlike in `run_parity`, every engine gets the output of the engine before it, so that differences add up.
    """
    outputs, answers = _run(pipeline, pipeline.backend, recording.frames, recording.source, recording.tokens)
    found = [
        _compare(*key, outputs[key], shape, recording.samples[key], tolerance)
        for key, shape in recording.shapes.items()
    ]
    pairs = [
        _pair(mode, recording.source.question, answers[mode], recorded) for mode, recorded in recording.answers.items()
    ]
    oracle = f"PyTorch's recorded outputs (torch {recording.source.torch})"
    return ParityReport(
        pipeline.backend.name, tolerance, len(recording.frames), _worst_layer(found), pairs, oracle=oracle
    )


def _run(
    pipeline: Pipeline, backend: Backend, frames: np.ndarray, source: Source, tokens: dict[str, list[int]]
) -> tuple[Outputs, dict[str, Answered]]:
    """Run every graph on the output of the one before; `tokens` is filled greedily if it is empty."""
    slow_tokens = encode_chunks(backend, preprocess(list(frames), pipeline.bundle.image), single=False)
    fast, slow = backend.compress(slow_tokens)
    outputs: Outputs = {("vision_encoder", "slow_tokens"): slow_tokens, ("compressor", "fast_tokens"): fast}
    if slow is not None:
        outputs |= _named("compressor", "slow_key_values.{}.{}", backend.to_numpy(slow))
    embeds, attends = prompt_inputs(pipeline, fast, source.question)
    prefill = backend.decode(DecoderStep(embeds[None], attends, slow=slow))
    outputs["decoder", "prefill logits"] = prefill[0][0]
    outputs |= _named("decoder", "layer {} {}", backend.to_numpy(prefill[1]))
    for mode in DecodeMode:
        fed = tokens.setdefault(mode, [])
        logits = _decode(pipeline, backend, prefill, slow if mode == DecodeMode.TRAINED else None, fed, source.steps)
        outputs["decoder", f"{mode} decode logits"] = logits
    session = VideoSession(backend, pipeline.tokenizer, pipeline.embedding, fast, slow)
    return outputs, {mode: _answer(pipeline, session, source, mode) for mode in DecodeMode}


def _named(graph: str, name: str, arrays: list[np.ndarray]) -> Outputs:
    """Name the arrays k0, v0, k1, v1, ...; `name` takes the layer and 'key' or 'value'."""
    return {(graph, name.format(i // 2, ("key", "value")[i % 2])): array for i, array in enumerate(arrays)}


def _decode(
    pipeline: Pipeline,
    backend: Backend,
    prefill: tuple[np.ndarray, KeyValues],
    slow: KeyValues | None,
    tokens: list[int],
    steps: int,
) -> np.ndarray:
    """Return the logits [steps, V] of decode steps fed `tokens`; greedy tokens are added if there are too few."""
    (logits, prefix), rows = prefill, []
    cache = backend.new_cache(1, backend.capacity_for(steps))
    for i in range(steps):
        if i == len(tokens):
            tokens.append(int(logits[0, : pipeline.tokenizer.vocabulary_size].argmax()))
        embeds = pipeline.embedding([tokens[i]])[None]
        logits, new = backend.decode(DecoderStep(embeds, np.array([slow is not None]), prefix, cache, slow))
        cache.append(new)
        rows.append(logits[0])
    return np.stack(rows)


def _answer(pipeline: Pipeline, session: VideoSession, source: Source, mode: str) -> Answered:
    options = pipeline.generation_options().greedy().override(max_new_tokens=source.steps)
    answer = session.ask(source.question, options, mode)
    return Answered(answer.answer, answer.ids)


def _sample(values: np.ndarray) -> np.ndarray:
    # The step is odd, so that on axes whose lengths are powers of two every index is visited.
    step = max(1, values.size // KEPT)
    return values.ravel()[:: step - (step % 2 == 0)].astype(np.float32)


def _compare(
    graph: str, name: str, values: np.ndarray, shape: tuple[int, ...], sample: np.ndarray, tolerance: Tolerance
) -> Comparison:
    if values.shape != shape:
        return compare(graph, name, values, np.empty(shape), tolerance)
    return replace(compare(graph, name, _sample(values), sample, tolerance), shape=shape)


def _worst_layer(found: list[Comparison]) -> list[Comparison]:
    """Keep one comparison of all layers' K and V: the worst, or the first that fails."""
    layers = [c for c in found if c.name.startswith("layer ")]
    shown = next((c for c in layers if not c.passed), worst(layers))
    return [c for c in found if c is shown or c not in layers]


def _pair(mode: str, question: str, engine: Answered, torch: Answered) -> AnswerPair:
    pairs = zip(engine.ids, torch.ids, strict=False)
    shorter = min(len(engine.ids), len(torch.ids))
    equal = next((i for i, (x, y) in enumerate(pairs) if x != y), shorter)
    return AnswerPair(mode, question, engine.text, torch.text, len(torch.ids), equal, engine.ids == torch.ids)


def unprepare(pixels: np.ndarray, image: ImageProcessorConfig) -> np.ndarray:
    """Recover the resized frames from preprocessed pixels: float32 [n, 3, S, S] -> uint8 [n, S, S, 3]."""
    mean, std = (np.array(values, np.float32) for values in (image.mean, image.std))
    frames: np.ndarray = np.rint((pixels.transpose(0, 2, 3, 1) * std + mean) * 255)
    return frames.astype(np.uint8)


def largest_difference(frames: np.ndarray, others: np.ndarray) -> int:
    """Return the largest difference between two sets of frames, at most 255; 255 if their shapes differ."""
    if frames.shape != others.shape:
        return 255
    return int(np.abs(frames.astype(np.int16) - others.astype(np.int16)).max())
