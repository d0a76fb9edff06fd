"""Sessions: what is computed once must be what is computed anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sfexport.checkpoint.config import DecodeMode
from sfexport.errors import InputError
from sfexport.qa import pipeline as pipeline_module
from sfexport.qa.generation import GenerationOptions
from sfexport.qa.pipeline import Pipeline
from sfexport.qa.video_session import VideoSession

QUESTIONS = ("What happens?", "Which colour is the circle, and where does it go?")


@pytest.fixture(scope="module")
def pipeline(tree) -> Pipeline:
    return Pipeline.load(tree.engines)


@pytest.fixture(scope="module")
def options(pipeline: Pipeline) -> GenerationOptions:
    return pipeline.generation_options().override(max_new_tokens=8)


@pytest.mark.parametrize("mode", DecodeMode)
def test_a_second_question_is_answered_as_if_it_were_the_first(mode: str, tree, pipeline, options) -> None:
    first, second = QUESTIONS
    session = pipeline.encode(tree.clip)
    session.ask(first, options, mode)
    again = session.ask(second, options, mode)
    fresh = pipeline.encode(tree.clip).ask(second, options, mode)
    assert again.ids == fresh.ids
    assert (again.frames_encoded, fresh.frames_encoded) == (0, session.frames)
    assert again.prefill_tokens == len(pipeline.tokenizer.prompt(second).after)
    assert fresh.prefill_tokens == again.prefill_tokens + fresh_prefix(pipeline, session)


def fresh_prefix(pipeline: Pipeline, session: VideoSession) -> int:
    return len(pipeline.tokenizer.prompt("?").before) + session.fast_tokens


@pytest.mark.parametrize("mode", DecodeMode)
def test_the_session_answers_as_the_model_does_on_the_whole_prompt(mode: str, tree, pipeline, options) -> None:
    """transformers' generate recomputes everything; the session shares prefix and slow K/V."""
    torch = pytest.importorskip("torch")
    from sfexport.model import LlavaQwenSlowFastForCausalLM

    model = LlavaQwenSlowFastForCausalLM.from_pretrained(tree.checkpoint, dtype=torch.float32).eval()
    pixels, rows = pipeline.read_frames(tree.clip, None, "linspace")
    session = pipeline.encode(tree.clip)
    for question in QUESTIONS:
        ids = pipeline.tokenizer.prompt(question)
        prompt = torch.tensor([[*ids.before, -200, *ids.after]])
        expected = model.generate(
            prompt, images=[torch.from_numpy(pixels[rows])], decode_mode=mode, max_new_tokens=8, do_sample=False
        )
        assert session.ask(question, options, mode).ids == expected[0].tolist()


def test_frames_of_a_short_clip_are_encoded_once_each(tree, pipeline: Pipeline, options) -> None:
    count = 20  # the clip's own length
    session = pipeline.encode(tree.clip, frames=3 * count)
    answer = session.ask(QUESTIONS[0], options)
    assert (session.frames, answer.frames_encoded) == (3 * count, count)
    pixels, rows = pipeline.read_frames(tree.clip, 3 * count, "linspace")
    slow = pipeline.backend.encode_frames(pixels[rows], single_image=False)
    whole = VideoSession(pipeline.backend, pipeline.tokenizer, pipeline.embedding, *pipeline.backend.compress(slow))
    assert whole.ask(QUESTIONS[0], options).ids == answer.ids


def test_the_size_of_chunks_does_not_matter(tree, pipeline: Pipeline, options, monkeypatch) -> None:
    answers = []
    for chunk in (1, 5, 64):
        monkeypatch.setattr(pipeline_module, "VISION_CHUNK", chunk)
        answers.append(pipeline.encode(tree.clip).ask(QUESTIONS[0], options).ids)
    assert answers[0] == answers[1] == answers[2]


def test_a_picture_is_one_image_with_all_its_tokens(pipeline: Pipeline, options, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(picture)
    session = pipeline.encode(picture)
    assert session.slow_tokens == session.fast_tokens == 16
    assert session.ask(QUESTIONS[0], options).frames_encoded == 1


def test_eval_sampling_takes_other_frames(tree, pipeline: Pipeline) -> None:
    assert pipeline.encode(tree.clip, frames=3, sampling="eval").frames == 3
    with pytest.raises(InputError, match="random"):
        pipeline.encode(tree.clip, sampling="random")


def test_streamed_text_is_the_answer(tree, pipeline: Pipeline, options) -> None:
    session, pieces = pipeline.encode(tree.clip), []
    answer = session.ask(QUESTIONS[0], options, on_text=pieces.append)
    assert "".join(pieces).strip() == answer.answer
    assert len(pieces) > 1


def test_stop_tokens_end_the_answer_and_are_not_shown(tree, pipeline: Pipeline, options) -> None:
    session = pipeline.encode(tree.clip)
    ids = session.ask(QUESTIONS[0], options).ids
    stopped = session.ask(QUESTIONS[0], options.override(stop_ids=frozenset([ids[2]])))
    assert stopped.ids == ids[: ids.index(ids[2]) + 1]
    assert stopped.answer == pipeline.tokenizer.decode(stopped.ids[:-1]).strip()


def test_ids_beyond_the_tokenizer_are_never_drawn(tree, pipeline: Pipeline) -> None:
    hot = pipeline.generation_options().override(temperature=50.0, seed=1, max_new_tokens=64)
    ids = pipeline.encode(tree.clip).ask(QUESTIONS[0], hot).ids
    assert max(ids) < pipeline.tokenizer.vocabulary_size < pipeline.backend.config.text.vocab_size


def test_an_unknown_mode_is_refused(tree, pipeline: Pipeline, options) -> None:
    with pytest.raises(InputError, match="paper"):
        pipeline.encode(tree.clip).ask(QUESTIONS[0], options, "paper")
