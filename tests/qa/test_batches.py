"""Several questions decoded as one batch: the answers, texts and memory of one at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import sfexport

from sfexport.checkpoint.config import DecodeMode
from sfexport.demo.clip import write_frames
from sfexport.demo.scenes import FPS, SIZE, UPSCALE, make_scene, video_frames
from sfexport.demo.shipped import SHIPPED
from sfexport.engines.build import build
from sfexport.engines.interface import DecoderStep
from sfexport.errors import InputError
from sfexport.exporting.open_or_export import ExportRequest, open_or_export
from sfexport.qa.generation import GenerationOptions
from sfexport.qa.pipeline import Pipeline
from sfexport.qa.video_session import VideoSession


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batches") / "clip.mp4"
    write_frames(path, video_frames(2026, 3), FPS, (SIZE * UPSCALE, SIZE * UPSCALE))
    return path


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    if request.param == "torch":
        pytest.importorskip("torch")
    root = tmp_path_factory.mktemp(request.param)
    bundle = open_or_export(SHIPPED, root / "bundle", root / "engines", ExportRequest("fp32"))
    return Pipeline.load(build(bundle, root / "engines", request.param).path)


@pytest.fixture(scope="module")
def session(pipeline: Pipeline, clip: Path) -> VideoSession:
    return pipeline.encode(clip)


@pytest.fixture
def options(pipeline: Pipeline) -> GenerationOptions:
    return pipeline.generation_options().greedy()


QUESTIONS = tuple(question.text for question in make_scene(2026, 3).questions())


@pytest.mark.parametrize("mode", DecodeMode)
@pytest.mark.parametrize("batch", [2, 3, 8])
def test_tokens_are_those_of_one_question_at_a_time(
    batch: int, mode: str, session: VideoSession, options: GenerationOptions
) -> None:
    alone = [session.ask(question, options, mode) for question in QUESTIONS]
    together = session.ask_many(QUESTIONS, options, mode, batch=batch)
    assert [a.ids for a in together] == [a.ids for a in alone]
    assert [a.answer for a in together] == [a.answer for a in alone]
    assert len({len(a.ids) for a in together}) > 1, "rows end at different times"


def test_rows_of_long_answers_grow_beyond_the_first_capacity(session: VideoSession, options: GenerationOptions) -> None:
    endless = replace(options, stop_ids=frozenset(), max_new_tokens=70)
    alone = [session.ask(question, endless).ids for question in QUESTIONS[:2]]
    assert [a.ids for a in session.ask_many(QUESTIONS[:2], endless)] == alone
    assert {len(ids) for ids in alone} == {70}


def test_each_row_samples_as_if_it_were_alone(session: VideoSession, options: GenerationOptions) -> None:
    sampled = {"temperature": 1.5, "seed": 7, "max_new_tokens": 6}
    alone = [session.ask(question, options, **sampled).ids for question in QUESTIONS[:4]]
    assert [a.ids for a in session.ask_many(QUESTIONS[:4], options, **sampled)] == alone


def test_texts_stream_by_question_and_end_with_an_empty_piece(
    session: VideoSession, options: GenerationOptions
) -> None:
    pieces: dict[int, list[str]] = {}
    found = session.ask_many(
        QUESTIONS[:3], options, on_text=lambda i, text: pieces.setdefault(i, []).append(text), batch=2
    )
    assert ["".join(pieces[i]).strip() for i in range(3)] == [a.answer for a in found]
    assert all(p[-1] == "" and "" not in p[:-1] for p in pieces.values())


def test_the_first_question_alone_counts_the_video(pipeline: Pipeline, clip: Path, options: GenerationOptions) -> None:
    session = pipeline.encode(clip)
    found = session.ask_many(QUESTIONS[:3], options)
    assert [a.frames_encoded for a in found] == [session.frames, 0, 0]
    assert [a.prefill_tokens for a in found][1:] == [len(pipeline.tokenizer.prompt(q).after) for q in QUESTIONS[1:3]]
    assert all(a.seconds["decode"] > 0 and a.seconds["prefill"] > 0 for a in found)


def test_a_question_that_cannot_be_asked_is_refused_before_any_is_answered(session: VideoSession) -> None:
    answered: list[str] = []
    with pytest.raises(InputError, match="question is empty"):
        session.ask_many([QUESTIONS[0], " "], on_text=lambda i, text: answered.append(text))
    assert answered == []


@pytest.mark.parametrize("batch", [0, -1, 2.5, True])
def test_a_batch_is_a_whole_number(batch: object, session: VideoSession) -> None:
    with pytest.raises(InputError, match="The batch must be"):
        session.ask_many(QUESTIONS[:2], batch=batch)


def test_one_text_is_no_list_of_questions(session: VideoSession) -> None:
    """Its letters would be asked."""
    with pytest.raises(InputError, match="a list of questions"):
        session.ask_many("Why?")


def test_questions_may_come_from_any_iterable(session: VideoSession, options: GenerationOptions) -> None:
    found = session.ask_many((question for question in QUESTIONS[:2]), options)
    assert [a.question for a in found] == list(QUESTIONS[:2])


def test_no_question_has_no_answer(session: VideoSession) -> None:
    assert session.ask_many([]) == []


def test_a_step_of_several_rows_is_each_row_alone(pipeline: Pipeline) -> None:
    """With a shared prefix, own positions of different lengths and shared slow tokens."""
    backend, rng = pipeline.backend, np.random.default_rng(0)
    text = backend.config.text
    slow_tokens = rng.standard_normal((4, 9, text.hidden_size)).astype(np.float32)
    _, slow = backend.compress(slow_tokens)

    def embeds(*shape: int) -> np.ndarray:
        return rng.standard_normal((*shape, text.hidden_size)).astype(np.float32)

    _, prefix = backend.decode(DecoderStep(embeds(1, 5), np.ones(5, dtype=bool), slow=slow))
    lengths, cache = (3, 1, 0), backend.new_cache(3, 64)
    alone = [backend.new_cache(1, 64) for _ in lengths]
    for row, length in enumerate(lengths):
        if length:
            _, own = backend.decode(DecoderStep(embeds(1, length), np.ones(length, dtype=bool), prefix, slow=slow))
            cache.append(own, row)
            alone[row].append(own)
    assert cache.lengths.tolist() == list(lengths)
    token, attends = embeds(3, 1), np.ones(1, dtype=bool)
    logits, new = backend.decode(DecoderStep(token, attends, prefix, cache, slow))
    for row in range(3):
        found, own = backend.decode(DecoderStep(token[row : row + 1], attends, prefix, alone[row], slow))
        np.testing.assert_allclose(logits[row], found[0], atol=1e-4)
        for several, single in zip(backend.to_numpy(new), backend.to_numpy(own), strict=True):
            np.testing.assert_allclose(several[row], single[0], atol=1e-4)
    cache.append(new)
    smaller = cache.resize([2, 0], 128)
    assert (smaller.capacity, smaller.lengths.tolist()) == (128, [1, 4])
    again, _ = backend.decode(DecoderStep(token[:2], attends, prefix, smaller, slow))
    assert again.shape == (2, text.vocab_size)


def test_the_command_shows_answers_in_the_order_of_their_questions(pipeline: Pipeline, clip: Path) -> None:
    asked = [part for question in QUESTIONS[:3] for part in ("-q", question)]
    outputs = {}
    for batch in ("1", "3"):
        result = sfexport("ask", pipeline.engines.path, clip, *asked, "--batch", batch)
        assert result.exit_code == 0, result.output
        outputs[batch] = result.stdout
    assert outputs["1"] == outputs["3"]
    lines = outputs["3"].splitlines()
    assert lines[::2] == [f"Q: {question}" for question in QUESTIONS[:3]]
    assert all(line.startswith("A: ") for line in lines[1::2])
    refused = sfexport("ask", pipeline.engines.path, clip, *asked, "--batch", "0")
    assert refused.exit_code == 2
    assert "The batch must be at least 1, not 0. Change --batch." in refused.stderr
