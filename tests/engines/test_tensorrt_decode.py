"""What the TensorRT backend calls to decode a token, on host memory (tests/engines/gpu.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu import played_gpu

from sfexport.artifacts.bundle import Bundle
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.shipped import SHIPPED
from sfexport.engines.build import build
from sfexport.engines.interface import DecoderStep, KeyValues, Logits
from sfexport.engines.tensorrt.backend import TensorRTBackend
from sfexport.engines.tensorrt.build import TensorRTOptions
from sfexport.errors import SfexportError
from sfexport.exporting.export import ExportOptions, export
from sfexport.graphs import names
from sfexport.qa.pipeline import Pipeline

pytest.importorskip("triton", reason="the plugin's kernel is written in Triton, which is not installed")
QUESTIONS = ("How many shapes are there?", "Describe the circle.", "Where does the circle move?")
COPIES = {"cuMemcpyHtoDAsync": 2, "cuMemcpyDtoHAsync": 2}  # position of the size among the arguments


class Decoding:
    """A pipeline whose decode steps note what was called since the one before.

    Attributes:
        steps: by step, the calls of TensorRT and of the driver, in order, with the driver's arguments.
    """

    def __init__(self, played: Any, pipeline: Pipeline) -> None:
        self.played, self.pipeline = played, pipeline
        self.steps: list[list[tuple[str, tuple[Any, ...]]]] = []

    def mark(self) -> None:
        self.played.driver.calls.clear()
        self.played.recorder.calls.clear()

    def note(self) -> None:
        calls = [(call.name, ()) for call in self.played.recorder.calls]
        self.steps.append(calls + list(self.played.driver.calls))
        self.mark()

    def run(self, questions: list[str], mode: str = "released", **changes: Any) -> list[list[int]]:
        options = replace(self.pipeline.generation_options(), stop_ids=frozenset(), max_new_tokens=6, **changes)
        session = self.pipeline.encode(np.zeros((4, 96, 96, 3), np.uint8))
        self.steps.clear()
        self.mark()
        return [answer.ids for answer in session.ask_many(questions, options, mode)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(Checkpoint.open(SHIPPED), tmp_path_factory.mktemp("decode") / "bundle", ExportOptions())


@pytest.fixture
def decoding(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoding]:
    with played_gpu(monkeypatch, "10.16", tmp_path / "cache", bundle) as played:
        build(bundle, tmp_path / "engines", "tensorrt", tensorrt=TensorRTOptions(new_tokens=8, rows=3))
        found = Decoding(played, Pipeline.load(tmp_path / "engines"))
        plain = TensorRTBackend.decode_later

        def noted(self: TensorRTBackend, step: DecoderStep) -> tuple[Logits, KeyValues]:
            if step.cache is not None:
                found.note()
            return plain(self, step)

        monkeypatch.setattr(TensorRTBackend, "decode_later", noted)
        yield found
        found.mark()


@pytest.mark.parametrize("mode", ["released", "trained"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_further_token_is_one_replayed_graph(rows: int, mode: str, decoding: Decoding) -> None:
    decoding.run(list(QUESTIONS[:rows]), mode)
    _, first, second, *later = decoding.steps
    executes = "IExecutionContext.execute_async_v3"
    assert [name for name, _ in first].count(executes) == 1
    # The second token's step is captured, which asks for no shape and no memory either.
    assert [name for name, _ in second].count(executes) == 1
    assert [name for name, _ in second if "Graph" in name or "Capture" in name] == [
        *("cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy", "cuGraphLaunch"),
    ]
    for step in (second, *later):
        called = {name for name, _ in step}
        assert not called & {"cuMemAlloc", "cuMemHostAlloc", "cuMemFree", "cuMemcpy2DAsync"}
        assert not {name for name in called if "shape" in name or "address" in name or "profile" in name}
        for name, arguments in step:
            assert name not in COPIES or arguments[COPIES[name]] <= 4096 * rows
    for step in later:
        assert [name for name, _ in step] == [
            *["cuMemcpyHtoDAsync"] * 3,  # embeddings, positions, lengths
            "cuGraphLaunch",
            *["cuMemcpy3DAsync"] * rows,  # the new K and V of all layers
            *["cuMemcpyDtoHAsync"] * 2,  # tokens, and whether all logits are finite
            "cuStreamSynchronize",
        ]


def test_the_next_question_replays_the_same_graph(decoding: Decoding) -> None:
    session = decoding.pipeline.encode(np.zeros((4, 96, 96, 3), np.uint8))
    options = replace(decoding.pipeline.generation_options(), stop_ids=frozenset(), max_new_tokens=6)
    first = session.ask("Describe the circle.", options).ids
    decoding.steps.clear()
    assert session.ask("Describe the circle.", options).ids == first
    names = [name for step in decoding.steps[1:] for name, _ in step]
    assert "cuGraphInstantiate" not in names and names.count("cuGraphLaunch") >= 3


def test_greedy_tokens_are_those_of_the_logits(decoding: Decoding, monkeypatch: pytest.MonkeyPatch) -> None:
    found = decoding.run(list(QUESTIONS))
    monkeypatch.setattr("sfexport.engines.tensorrt.backend._DeviceLogits.best", lambda self: None)
    assert decoding.run(list(QUESTIONS)) == found


@pytest.mark.parametrize("changes", [{"sample": True, "seed": 1}, {"repetition_penalty": 1.3}, {"min_new_tokens": 2}])
def test_what_changes_logits_gets_them_all(changes: dict[str, Any], decoding: Decoding) -> None:
    decoding.run(["Describe the circle."], **changes)
    vocabulary = decoding.pipeline.backend.config.text.vocab_size
    for step in decoding.steps[2:]:
        assert [a[2] for name, a in step if name == "cuMemcpyDtoHAsync"] == [4 * vocabulary]


def test_an_engine_that_cannot_be_captured_runs_all_the_same(
    decoding: Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decoding.run(["Describe the circle."])
    decoding.pipeline.backend._parts[0]._states.clear()
    monkeypatch.setattr(decoding.played.driver, "cuGraphInstantiate", lambda graph, flags: (1, 0))
    assert decoding.run(["Describe the circle."]) == expected
    called = [name for step in decoding.steps for name, _ in step]
    assert "cuGraphLaunch" not in called and called.count("cuStreamBeginCapture") == 1


def test_logits_that_are_no_numbers_are_an_error_in_greedy_decoding_too(
    decoding: Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TensorRTBackend.download_outputs

    def damaged(self: TensorRTBackend, outputs: Any, *wanted: str) -> list[np.ndarray]:
        found = plain(self, outputs, *wanted)
        return [np.full_like(v, np.nan) if n != names.BEST_TOKENS else v for n, v in zip(wanted, found, strict=True)]

    session = decoding.pipeline.encode(np.zeros((4, 96, 96, 3), np.uint8))
    monkeypatch.setattr(TensorRTBackend, "download_outputs", damaged)
    with pytest.raises(SfexportError, match="not numbers"):
        session.ask("Describe the circle.")
