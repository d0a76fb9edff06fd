"""The shipped model: small, in the released layout, right, and right because of its slow tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.run import demo_questions
from sfexport.demo.scenes import DETAIL, OVERVIEW
from sfexport.demo.shipped import SHIPPED

SEED, CLIPS = 4242, 40


def test_it_is_a_small_checkpoint_in_the_released_layout() -> None:
    checkpoint = Checkpoint.open(SHIPPED)
    checkpoint.validate()
    assert checkpoint.config.slow_fast.hybrid_layers == (0, 2)
    assert {t.dtype for t in checkpoint.tensors.values()} == {"BF16"}
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 8_000_000


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory: pytest.TempPathFactory) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        from shapes_accuracy import evaluate, load

        folder = tmp_path_factory.mktemp("shipped")
        return evaluate(load(SHIPPED, folder), folder, SEED, CLIPS, extra=True).accuracies()


@pytest.mark.parametrize("kind", [*OVERVIEW, *DETAIL, *(f"{k}_unsampled" for k in DETAIL)])
def test_it_answers(kind: str, accuracies: dict) -> None:
    """Forty clips: far from chance; the figures proper are in docs/benchmarks/slow_fast.md."""
    assert accuracies["trained"][kind] >= 0.75


def test_released_mode_loses_what_later_answer_tokens_would_look_up(accuracies: dict) -> None:
    """A corner's name has two words, and in released mode only the first is said while the slow tokens are there."""
    assert accuracies["slow_off"]["corner"] < accuracies["released"]["corner"] < accuracies["trained"]["corner"]


@pytest.mark.parametrize("mode", ["slow_off", "slow_of_another_clip"])
@pytest.mark.parametrize("kind", DETAIL)
def test_details_come_from_the_slow_tokens(kind: str, mode: str, accuracies: dict) -> None:
    assert accuracies[mode][f"{kind}_unsampled"] <= 0.55
    assert accuracies["slow_off"]["colour"] >= 0.75


def test_modes_agree_on_answers_of_one_token(accuracies: dict) -> None:
    """The first answer token comes from the prefill, in which both modes are the same."""
    for kind in ("colour", "shape", "count", "direction", "digit", "flash_colour"):
        assert accuracies["trained"][kind] == accuracies["released"][kind]


def test_the_demo_asks_an_overview_and_a_detail_question() -> None:
    overview, detail = demo_questions()
    assert overview.kind in OVERVIEW
    assert detail.kind in DETAIL
