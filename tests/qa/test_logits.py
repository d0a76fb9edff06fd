"""Which tokens are allowed, and how likely each is: equal to transformers' processors in transformers' order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sfexport.errors import SfexportError
from sfexport.qa.generation import GenerationOptions, Sampler
from sfexport.qa.logits import softmax

SIZE, ENDS, PROMPT = 200, [3, 7], 11
ANSWERS = ((), (5,), (5, 9), (5, 9, 5, 9, 1, 2, 5), tuple(range(20, 32)), (4,) * 9)


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def warpers(transformers: Any, config: dict[str, Any]) -> list[Any]:
    """What `generate` builds of a configuration when sampling, in its order; defaults as it fills them in."""
    made = []
    if (temperature := config.get("temperature", 1.0)) != 1.0:
        made.append(transformers.TemperatureLogitsWarper(temperature))
    if (top_h := config.get("top_h")) is not None:
        made.append(transformers.generation.logits_process.TopHLogitsWarper(top_h))
    top_k = config.get("top_k")
    if (top_k := 50 if top_k is None else top_k) != 0:
        made.append(transformers.TopKLogitsWarper(top_k))
    if (top_p := config.get("top_p", 1.0)) < 1.0:
        made.append(transformers.TopPLogitsWarper(top_p))
    if (min_p := config.get("min_p")) is not None:
        made.append(transformers.MinPLogitsWarper(min_p))
    if (typical := config.get("typical_p", 1.0)) < 1.0:
        made.append(transformers.TypicalLogitsWarper(typical))
    if (epsilon := config.get("epsilon_cutoff", 0.0)) > 0:
        made.append(transformers.EpsilonLogitsWarper(epsilon))
    if (eta := config.get("eta_cutoff", 0.0)) > 0:
        made.append(transformers.EtaLogitsWarper(eta))
    return made


def processors(transformers: Any, config: dict[str, Any]) -> list[Any]:
    """The same of what acts always. The prompt is embeddings: ids are those of the answer."""
    process, made = transformers.generation.logits_process, []
    ends = config.get("eos_token_id", ENDS)
    limit = config.get("max_new_tokens") or (config["max_length"] - PROMPT if "max_length" in config else 256)
    if bias := config.get("sequence_bias"):
        made.append(process.SequenceBiasLogitsProcessor(bias))
    if (penalty := config.get("repetition_penalty", 1.0)) != 1.0:
        made.append(process.RepetitionPenaltyLogitsProcessor(penalty))
    if size := config.get("no_repeat_ngram_size"):
        made.append(process.NoRepeatNGramLogitsProcessor(size))
    if words := config.get("bad_words_ids"):
        made.append(process.NoBadWordsLogitsProcessor(words, ends))
    least = config.get("min_new_tokens")
    least = max(config.get("min_length", 0) - PROMPT, 0) if least is None else least
    if least:
        made.append(process.MinLengthLogitsProcessor(least, ends))
    if (token := config.get("forced_bos_token_id")) is not None:
        made.append(process.ForcedBOSTokenLogitsProcessor(token))
    if (token := config.get("forced_eos_token_id")) is not None:
        made.append(process.ForcedEOSTokenLogitsProcessor(limit, token))
    if config.get("remove_invalid_values"):
        made.append(process.InfNanRemoveLogitsProcessor())
    if decay := config.get("exponential_decay_length_penalty"):
        made.append(process.ExponentialDecayLengthPenalty(tuple(decay), ends, 0))
    if tokens := config.get("suppress_tokens"):
        made.append(process.SuppressTokensLogitsProcessor(tokens))
    if tokens := config.get("begin_suppress_tokens"):
        start = 0 if config.get("forced_bos_token_id") is None else 1
        made.append(process.SuppressTokensAtBeginLogitsProcessor(tokens, start))
    if config.get("do_sample"):
        made += warpers(transformers, config)
    if config.get("renormalize_logits"):
        made.append(process.LogitNormalization())
    return made


def theirs(transformers: Any, config: dict[str, Any], ids: tuple[int, ...], logits: np.ndarray) -> np.ndarray:
    import torch

    scores = torch.from_numpy(logits.copy())[None]
    given = torch.tensor([ids], dtype=torch.long).reshape(1, -1)
    for processor in processors(transformers, config):
        scores = processor(given, scores)
    return scores[0].numpy()


def ours(config: dict[str, Any], ids: tuple[int, ...], logits: np.ndarray) -> np.ndarray:
    sampler = Sampler(GenerationOptions.from_config({"eos_token_id": ENDS} | config), PROMPT)
    sampler.ids.extend(ids)
    return sampler.scores(logits)


SAMPLED: list[dict[str, Any]] = [
    {},
    {"top_k": None},
    {"top_k": 0},
    {"top_k": 1},
    {"top_k": 1000},
    {"temperature": 0.3},
    {"temperature": 7.5, "top_k": 20},
    {"top_k": 0, "top_p": 0.4},
    {"top_p": 0.05},
    {"top_p": 0.999},
    {"top_k": 0, "min_p": 0.9},
    {"top_k": 0, "min_p": 0.05},
    {"min_p": 0.0},
    {"top_k": 0, "typical_p": 0.2},
    {"typical_p": 0.95},
    {"top_k": 0, "epsilon_cutoff": 0.01},
    {"top_k": 0, "epsilon_cutoff": 0.9},
    {"top_k": 0, "eta_cutoff": 0.003},
    {"eta_cutoff": 0.3},
    {"top_k": 0, "top_h": 0.4},
    {"top_h": 1.0, "temperature": 1.7},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "epsilon_cutoff": 0.001},
    {"temperature": 1.3, "top_h": 0.9, "top_p": 0.7, "eta_cutoff": 0.001, "repetition_penalty": 1.1},
    {"suppress_tokens": list(range(0, 200, 3)), "top_h": 0.8, "typical_p": 0.7, "eta_cutoff": 0.001},
]
ALWAYS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5},
    *({"no_repeat_ngram_size": size} for size in (1, 2, 3, 4)),
    {"bad_words_ids": [[5], [3], [9, 1], [5, 9, 5], [31]]},
    {"sequence_bias": [[[5], 2.5], [[9], -4.0], [[9, 1], 1.5], [[1, 2, 5, 8], 9.0], [[5], 1.0]]},
    {"sequence_bias": [[[5], float("-inf")]]},
    {"suppress_tokens": [0, 1, 2, 3, -1, 5000]},
    {"begin_suppress_tokens": [0, 5, 7]},
    {"begin_suppress_tokens": [0, 5, 7], "forced_bos_token_id": 9},
    {"min_new_tokens": 2},
    {"min_length": PROMPT + 3},
    {"min_length": 5},
    {"min_length": 100, "min_new_tokens": 0},
    {"forced_bos_token_id": 8},
    {"forced_eos_token_id": 3, "max_new_tokens": 8},
    {"forced_eos_token_id": [3, 7], "max_length": PROMPT + 3},
    {"exponential_decay_length_penalty": [1, 1.5]},
    {"exponential_decay_length_penalty": [0, 0.7], "min_new_tokens": 8},
    {"remove_invalid_values": True},
    {"renormalize_logits": True},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[9, 5]], "min_new_tokens": 10},
    {"remove_invalid_values": True, "suppress_tokens": [1, 2], "min_new_tokens": 99, "renormalize_logits": True},
]


@pytest.mark.parametrize("config", [*({"do_sample": True} | c for c in (*SAMPLED, *ALWAYS)), *ALWAYS], ids=str)
def test_allowed_tokens_and_probabilities_are_those_of_transformers(config: dict[str, Any], reference) -> None:
    if "top_h" in config and not hasattr(reference.generation.logits_process, "TopHLogitsWarper"):
        pytest.skip("this transformers has no top-h")
    random = np.random.default_rng(0)
    for ids in ANSWERS:
        for scale in (1.0, 4.0):
            logits = (random.normal(size=SIZE) * scale).astype(np.float32)
            expected, found = theirs(reference, config, ids, logits), ours(config, ids, logits)
            np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
            np.testing.assert_allclose(softmax(found), softmax(expected), rtol=0, atol=1e-6)
            assert found.argmax() == expected.argmax()


# Which of equal tokens are the first hundred, top-h leaves open.
@pytest.mark.parametrize("config", [c for c in SAMPLED if "top_h" not in c], ids=str)
def test_ties_are_kept_and_cut_as_in_transformers(config: dict[str, Any], reference) -> None:
    """Of equal tokens either may stay where only some do, so what stays is compared by value."""
    random = np.random.default_rng(1)
    for _ in range(5):
        logits = random.integers(-6, 6, SIZE).astype(np.float32) / 2
        expected = theirs(reference, {"do_sample": True} | config, (5, 9), logits)
        found = ours({"do_sample": True} | config, (5, 9), logits)
        np.testing.assert_allclose(np.sort(softmax(found)), np.sort(softmax(expected)), rtol=0, atol=1e-6)


def test_invalid_logits_are_replaced_as_in_transformers(reference) -> None:
    logits = np.array([1.0, np.nan, np.inf, -np.inf, 2.0, 0.5, 0.1, 0.2], dtype=np.float32)
    config = {"remove_invalid_values": True}
    np.testing.assert_array_equal(ours(config, (), logits), theirs(reference, config, (), logits))
    assert Sampler(GenerationOptions.from_config(config)).next(logits) == 2


def test_greedy_answers_are_those_of_generate(reference) -> None:
    """A tiny model's own `generate` with the configuration, its prompt as embeddings, against the sampler."""
    import torch

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": SIZE}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = reference.Qwen2ForCausalLM(reference.Qwen2Config(**sizes, **heads, initializer_range=1.0)).eval()
    embeds = torch.randn(1, PROMPT, 16)
    cases = [c for c in ALWAYS if c.get("min_length") != 100 and "remove_invalid_values" not in c]
    for config in cases:
        length = {} if {"max_length", "max_new_tokens"} & config.keys() else {"max_new_tokens": 8}
        made = reference.GenerationConfig(**config, **length, eos_token_id=ENDS, pad_token_id=0)
        model.generation_config = reference.GenerationConfig()
        out = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
            generation_config=made,
            return_dict_in_generate=True,
            output_logits=True,
        )
        options = GenerationOptions.from_config(config | length | {"eos_token_id": ENDS})
        sampler = Sampler(options, PROMPT)
        drawn = [sampler.next(logits[0].numpy()) for logits in out.logits]
        assert drawn == out.sequences[0].tolist(), config
        assert len(drawn) == sampler.limit or drawn[-1] in ENDS, config


def test_an_answer_that_is_the_whole_start_of_a_sequence_counts() -> None:
    """As in today's transformers; 5.0 waits for one more token."""
    scores = ours({"bad_words_ids": [[5, 9]], "sequence_bias": [[[5, 8], 2.0]]}, (5,), np.zeros(SIZE, np.float32))
    assert (scores[9], scores[8], scores[7]) == (-np.inf, 2.0, 0.0)


@pytest.mark.parametrize("sample", [False, True])
def test_no_allowed_token_is_an_error(sample: bool) -> None:
    options = GenerationOptions(sample=sample, suppress_tokens=frozenset(range(SIZE)))
    with pytest.raises(SfexportError, match="No token is allowed"):
        Sampler(options).next(np.zeros(SIZE, dtype=np.float32))


def test_infinite_logits_cannot_be_drawn_from() -> None:
    with pytest.raises(SfexportError, match="infinite"):
        Sampler(GenerationOptions(sample=True)).next(np.array([np.inf, 0, 1], dtype=np.float32))


@pytest.mark.parametrize(
    "config", [{"bad_words_ids": [[SIZE]]}, {"sequence_bias": [[[1, SIZE], 1.0]]}, {"forced_bos_token_id": SIZE}]
)
def test_tokens_beyond_the_vocabulary_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(SfexportError, match=str(SIZE)):
        ours(config, (5,), np.zeros(SIZE, dtype=np.float32))
