"""Prompts against the reference's, character for character."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfexport.demo.tokenizer import train_tokenizer
from sfexport.errors import InputError
from sfexport.qa.prompt import ChatTokenizer, build_prompt

PROMPTS = json.loads((Path(__file__).parent / "golden" / "prompts.json").read_text())
SPECIAL = {
    "__two_rounds__ Q1/A1/Q2": build_prompt("Q2", rounds=[("Q1", "A1")]),
    "__text_only__ hello": build_prompt("hello", video=False),
}


@pytest.mark.parametrize("question", PROMPTS)
def test_prompts_are_the_references(question: str) -> None:
    found = SPECIAL[question] if question.startswith("__") else build_prompt(question)
    assert found == PROMPTS[question]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(train_tokenizer())


def test_each_side_of_the_video_is_tokenised_by_itself(tokenizer: ChatTokenizer) -> None:
    before, after = PROMPTS["Please describe this video in detail."].split("<image>")
    ids = tokenizer.prompt("Please describe this video in detail.")
    assert ids.before == tokenizer.encode(before)
    assert ids.after == tokenizer.encode(after)


def test_all_questions_share_what_comes_before_the_video(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.prompt("a?").before == tokenizer.prompt("Something else entirely.").before


def test_the_video_may_be_marked() -> None:
    text = build_prompt("Q", marked=True)
    assert "<|im_start|>user\n<im_start><image><im_end>\nQ<|im_end|>" in text


@pytest.mark.parametrize("question", ["", "  \n", "What is <image>?"])
def test_unusable_questions_are_refused(question: str, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(InputError):
        tokenizer.prompt(question)
