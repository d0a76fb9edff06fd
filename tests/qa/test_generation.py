"""Choosing tokens: the same numbers as transformers' logits processors, and the defaults of a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sfexport.errors import InputError, SfexportError
from sfexport.qa.generation import DEFAULT_MAX_NEW_TOKENS, GenerationOptions, Sampler, distribution, penalise

# Steps of 1/4 make ties; the others nearly never do.
logits = st.lists(
    st.integers(-40, 40).map(lambda n: n / 4) | st.floats(-30, 30, allow_nan=False), min_size=2, max_size=24
).map(np.array)
temperatures = st.sampled_from([0.1, 0.5, 0.7, 1.0, 1.5, 3.0])


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers")
    return pytest.importorskip("torch")


@settings(deadline=None)
@given(scores=logits, penalty=st.floats(0.5, 2.0), data=st.data())
def test_penalty_is_that_of_transformers(torch, scores: np.ndarray, penalty: float, data: st.DataObject) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    ids = data.draw(st.lists(st.integers(0, len(scores) - 1), max_size=10))
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    theirs = processor(torch.tensor([ids], dtype=torch.long), torch.tensor(scores)[None])[0].numpy()
    before = scores.copy()
    np.testing.assert_allclose(penalise(scores, ids, penalty), theirs, rtol=1e-12)
    np.testing.assert_array_equal(scores, before)


def their_distribution(torch, scores: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The warpers in the order in which transformers' generate applies them."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    out = TemperatureLogitsWarper(temperature)(None, torch.tensor(scores)[None])
    if top_k:
        out = TopKLogitsWarper(top_k)(None, out)
    if top_p < 1:
        out = TopPLogitsWarper(top_p)(None, out)
    return out.softmax(-1)[0].numpy()


@settings(deadline=None, max_examples=200)
@given(scores=logits, temperature=temperatures, top_k=st.integers(0, 30))
def test_temperature_and_top_k_are_those_of_transformers(
    torch, scores: np.ndarray, temperature: float, top_k: int
) -> None:
    theirs = their_distribution(torch, scores, temperature, top_k, 1.0)
    np.testing.assert_allclose(distribution(scores, temperature, top_k, 1.0), theirs, rtol=1e-9, atol=1e-15)


@settings(deadline=None, max_examples=200)
@given(scores=logits, temperature=temperatures, top_k=st.integers(0, 30), top_p=st.floats(0.01, 1.0))
def test_top_p_is_that_of_transformers(torch, scores: np.ndarray, temperature: float, top_k: int, top_p: float) -> None:
    mass = np.cumsum(np.sort(distribution(scores, temperature, top_k, 1.0)))
    assume(np.abs(mass - (1 - top_p)).min() > 1e-9)  # on the border the last bit of a sum decides
    ours = distribution(scores, temperature, top_k, top_p)
    theirs = their_distribution(torch, scores, temperature, top_k, top_p)
    # Of equal ones either may stay, so what stays is compared by value.
    np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=1e-9, atol=1e-15)
    assert ours.sum() == pytest.approx(1)
    untouched = distribution(scores, temperature, top_k, 1.0)
    assert untouched[ours > 0].min() >= untouched[ours == 0].max(initial=0)


@pytest.mark.parametrize(
    ("scores", "top_k", "top_p", "kept"),
    [
        ([0, 0, 0, 0], 0, 1.0, 4),
        ([0, 0, 0, 0], 0, 0.6, 3),
        ([0, 0, 0, 0], 0, 0.001, 1),
        ([0, 0, 0, 0], 2, 1.0, 4),  # all are as good as the second best
        ([3, 1, 1, 0], 2, 1.0, 3),
        ([3, 1, 1, 0], 1, 1.0, 1),
        ([50, 0, 0, 0], 0, 0.99, 1),
        ([3, 2, 1, 0], 100, 1.0, 4),
    ],
)
def test_ties_are_kept_by_top_k_and_cut_by_top_p(scores: list[int], top_k: int, top_p: float, kept: int) -> None:
    probabilities = distribution(np.array(scores, dtype=np.float64), 1.0, top_k, top_p)
    assert np.count_nonzero(probabilities) == kept
    assert probabilities.sum() == pytest.approx(1)


def test_extreme_scores_stay_finite() -> None:
    probabilities = distribution(np.array([1e5, -1e5, 1e5 - 1]), 0.01, 0, 0.9)
    np.testing.assert_array_equal(probabilities, [1, 0, 0])


# Drawing.


@given(scores=logits)
def test_greedy_takes_the_first_of_the_best(scores: np.ndarray) -> None:
    scores = scores.astype(np.float32)
    assert Sampler(GenerationOptions()).next(scores) == int(np.flatnonzero(scores == scores.max())[0])


def test_penalty_looks_at_the_answer_so_far() -> None:
    sampler = Sampler(GenerationOptions(repetition_penalty=2.0))
    scores = np.array([3.0, 2.0, -1.0], dtype=np.float32)
    assert [sampler.next(scores) for _ in range(4)] == [0, 1, 0, 0]
    assert sampler.ids == [0, 1, 0, 0]


def test_same_seed_draws_the_same() -> None:
    scores = np.zeros(1000, dtype=np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(GenerationOptions(sample=True, seed=seed))
        return [sampler.next(scores) for _ in range(5)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_frequencies_follow_the_distribution() -> None:
    sampler = Sampler(GenerationOptions(sample=True, temperature=2.0, top_k=3, seed=0))
    scores = np.array([4.0, 2.0, 0.0, -9.0], dtype=np.float32)
    counts = np.bincount([sampler.next(scores) for _ in range(5000)], minlength=4)
    expected = np.exp([2, 1, 0]) / np.exp([2, 1, 0]).sum()
    np.testing.assert_allclose(counts / 5000, [*expected, 0], atol=0.03)


@pytest.mark.parametrize("sample", [False, True])
def test_logits_that_are_not_numbers_are_refused(sample: bool) -> None:
    with pytest.raises(SfexportError, match="NaN"):
        Sampler(GenerationOptions(sample=sample)).next(np.array([1, np.nan], dtype=np.float32))


# Options.


def test_empty_configuration_is_greedy() -> None:
    options = GenerationOptions.from_config({}, fallback_stop=7)
    assert options == GenerationOptions(stop_ids=frozenset({7}))
    assert (options.sample, options.max_new_tokens) == (False, DEFAULT_MAX_NEW_TOKENS)
    assert GenerationOptions.from_config({}).stop_ids == frozenset()


def test_configuration_is_taken_over() -> None:
    config = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
        "max_new_tokens": 5,
        "eos_token_id": [3, 4],
    }
    expected = GenerationOptions(5, True, 0.7, 20, 0.8, 1.05, None, frozenset({3, 4}))
    assert GenerationOptions.from_config(config, fallback_stop=7) == expected


@pytest.mark.parametrize(("stop", "expected"), [(0, {0}), ([5, 6], {5, 6}), (None, {7}), ([], set())])
def test_end_token_may_be_one_or_several(stop: object, expected: set[int]) -> None:
    assert GenerationOptions.from_config({"eos_token_id": stop}, fallback_stop=7).stop_ids == expected


@pytest.mark.parametrize("field", ["temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens"])
def test_null_in_the_configuration_means_the_default(field: str) -> None:
    assert GenerationOptions.from_config({field: None}) == GenerationOptions()


@pytest.mark.parametrize(
    "config", [{"temperature": "hot"}, {"top_p": 3}, {"top_k": [1]}, {"eos_token_id": ["</s>"]}, {"max_new_tokens": -1}]
)
def test_configuration_without_meaning_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(InputError, match="generation_config.json"):
        GenerationOptions.from_config(config)


def test_temperature_decides_whether_to_sample() -> None:
    options = GenerationOptions(sample=True, temperature=0.7)
    assert options.override(temperature=0.0) == GenerationOptions(sample=False, temperature=1.0)
    assert options.override(temperature=0.2, top_k=3, seed=None) == GenerationOptions(256, True, 0.2, 3)
    assert options.override() == options
    assert not options.greedy().sample
