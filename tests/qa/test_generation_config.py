"""generation_config.json: every field is applied, known not to matter, or refused by name; options likewise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_says, document, refusal, set_fields, sfexport

from sfexport.checkpoint.generation_config import GenerationConfig, generation_notes, ignored_fields
from sfexport.errors import InputError
from sfexport.fields import LARGEST
from sfexport.qa.generation import GenerationOptions, Sampler
from sfexport.qa.pipeline import Pipeline


def test_every_field_of_transformers_is_known() -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    known = set(GenerationConfig.__struct_fields__) | GenerationConfig.IRRELEVANT
    made = transformers.GenerationConfig()
    assert set(vars(made)) | set(made.to_dict()) <= known


def test_defaults_are_those_of_transformers() -> None:
    options = GenerationOptions.from_config({"do_sample": True})
    assert (options.sample, options.top_k, options.temperature, options.top_p) == (True, 50, 1.0, 1.0)
    assert options == GenerationOptions(sample=True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"do_sample": "false"}, "'do_sample'"),
    ({"do_sample": 0}, "'do_sample'"),
    ({"do_sample": True, "temperature": 0}, "temperature"),
    ({"do_sample": True, "temperature": 0.0}, "temperature"),
    ({"do_sample": True, "temperature": -0.5}, "temperature"),
    ({"do_sample": True, "temperature": 1e-320}, "temperature"),
    ({"do_sample": True, "temperature": 10**400}, "'temperature'"),
    ({"do_sample": True, "temperature": float("inf")}, "'temperature'"),
    ({"temperature": float("nan")}, "'temperature'"),
    ({"temperature": "0.7"}, "'temperature'"),
    ({"top_k": 2.5}, "'top_k'"),
    ({"top_k": True}, "'top_k'"),
    ({"do_sample": True, "top_k": -1}, "top-k"),
    ({"top_k": 10**400}, "'top_k'"),
    ({"top_p": 0}, "top-p"),
    ({"top_p": 1.5}, "top-p"),
    ({"min_p": 1.5}, "min p"),
    ({"top_h": 0}, "top h"),
    ({"typical_p": 0}, "typical p"),
    ({"epsilon_cutoff": 1}, "epsilon cutoff"),
    ({"eta_cutoff": -0.1}, "eta cutoff"),
    ({"repetition_penalty": 0}, "repetition penalty"),
    ({"repetition_penalty": 1e-320}, "repetition penalty"),
    ({"no_repeat_ngram_size": -1}, "'no_repeat_ngram_size'"),
    ({"max_new_tokens": 0}, "'max_new_tokens'"),
    ({"max_new_tokens": 12.0}, "'max_new_tokens'"),
    ({"max_length": "20"}, "'max_length'"),
    ({"min_new_tokens": -1}, "'min_new_tokens'"),
    ({"eos_token_id": -1}, "'eos_token_id'"),
    ({"eos_token_id": [1, "</s>"]}, "'eos_token_id"),
    ({"bad_words_ids": []}, "'bad_words_ids'"),
    ({"bad_words_ids": [[]]}, "'bad_words_ids"),
    ({"bad_words_ids": [5]}, "'bad_words_ids"),
    ({"sequence_bias": {"(5,)": 1.0}}, "'sequence_bias'"),
    ({"sequence_bias": [[[5], float("nan")]]}, "'sequence_bias'"),
    ({"suppress_tokens": "all"}, "'suppress_tokens'"),
    ({"suppress_tokens": [1.5]}, "'suppress_tokens"),
    ({"exponential_decay_length_penalty": [5]}, "'exponential_decay_length_penalty'"),
    ({"exponential_decay_length_penalty": [5, float("inf")]}, "'exponential_decay_length_penalty'"),
    ({"num_beams": 4}, "'num_beams'"),
    ({"num_beams": True}, "'num_beams'"),
    ({"num_beam_groups": 2}, "'num_beam_groups'"),
    ({"num_return_sequences": 3}, "'num_return_sequences'"),
    ({"penalty_alpha": 0.6}, "'penalty_alpha'"),
    ({"dola_layers": "high"}, "'dola_layers'"),
    ({"guidance_scale": 1.5}, "'guidance_scale'"),
    ({"watermarking_config": {"bias": 2.5}}, "'watermarking_config'"),
    ({"stop_strings": ["."]}, "'stop_strings'"),
    ({"max_time": 2.0}, "'max_time'"),
    ({"token_healing": True}, "'token_healing'"),
    ({"constraints": []}, "'constraints'"),
    ({"force_words_ids": [[5]]}, "'force_words_ids'"),
    ({"cache_implementation": "quantized"}, "'cache_implementation'"),
    ({"use_mtp": True}, "'use_mtp'"),
    ({"assistant_ensemble_weight": 0.5}, "'assistant_ensemble_weight'"),
]


@pytest.mark.parametrize(("config", "said"), REFUSED, ids=str)
def test_what_cannot_be_followed_is_refused_by_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"generation_config.json.*{said}") as refused:
        GenerationOptions.from_config(config)
    assert refused.value.hint


@pytest.mark.parametrize(
    "config",
    [
        {"num_beams": 1, "num_return_sequences": 1, "guidance_scale": 1, "penalty_alpha": 0.0, "token_healing": False},
        {"use_cache": False, "cache_implementation": "static", "length_penalty": 2.0, "early_stopping": True},
        {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 3, "pad_token_id": -1, "bos_token_id": 0},
        {"prompt_lookup_num_tokens": 3, "output_scores": True, "transformers_version": "4.45.1"},
        {"temperature": 0.0},
        dict.fromkeys(GenerationConfig.__struct_fields__),
    ],
    ids=str,
)
def test_what_changes_no_token_is_passed_over(config: dict[str, Any]) -> None:
    assert GenerationOptions.from_config(config) == GenerationOptions()


def test_limits_of_prompt_and_answer_together() -> None:
    options = GenerationOptions.from_config({"max_length": 300})
    assert [options.limit(n) for n in (0, 10, 299)] == [300, 290, 1]
    with pytest.raises(InputError, match="max_length is 300"):
        options.limit(300)
    assert options.override(max_new_tokens=7).limit(5000) == 7
    assert GenerationOptions.from_config({"max_length": 300, "max_new_tokens": 4}).limit(299) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in ("hot", True, float("nan"), float("inf"), -1, 1e-320, 10**400, [1])),
        *({"top_k": value, "temperature": 1} for value in (2.5, True, "5", -1, 10**400, float("nan"))),
        *({"top_p": value, "temperature": 1} for value in (0, 1.5, "1", True, float("nan"), 10**400)),
        *({"repetition_penalty": value} for value in (0, "1", True, float("inf"), 1e-320, 10**400)),
        *({"max_new_tokens": value} for value in (0, 1.0, "5", True, 10**400, LARGEST + 1)),
        *({"seed": value} for value in (-1, 1.5, "1", True)),
        *({"stop_ids": value} for value in ([1], {"a"}, {1.5}, 5)),
        {"sample": "false"},
        {"min_p": 2, "temperature": 1},
        {"min_p": 0.5},
    ],
    ids=lambda wrong: str(wrong)[:60],
)
def test_options_of_python_callers_are_checked_alike(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError) as refused:
        GenerationOptions().override(**wrong)
    assert len(str(refused.value)) < 300


def test_numbers_of_numpy_are_numbers() -> None:
    import numpy as np

    options = GenerationOptions().override(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.int32(1))
    assert Sampler(options).next(np.array([0, 9, 0], dtype=np.float32)) == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"temperature": 0.7, "top_p": 0.8}, "temperature, top_p ignored: do_sample is not true"),
        ({"do_sample": True, "temperature": 0.7}, None),
        ({"max_length": 5, "max_new_tokens": 5}, "max_length ignored"),
        ({"colour": "blue"}, "unknown fields ignored: 'colour'"),
        ({"use_cache": True, "pad_token_id": 5, "top_k": 50}, None),
    ],
)
def test_what_is_ignored_is_said(config: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    notes = ignored_fields(config)
    assert len(notes) == (said is not None)
    assert_says(" ".join(notes), *([said] if said else []))
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert generation_notes(tmp_path) == notes


def test_notes_are_printed_and_fields_apply_through_the_command_line(tree: Any, tmp_path: Path) -> None:
    """Export says what is ignored; the answer has the length and the tokens that the file asks for."""
    checkpoint = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    first = Pipeline.load(tree.engines).encode(tree.clip).ask("Why?", max_new_tokens=1).ids[0]
    set_fields(checkpoint / "generation_config.json", temperature=0.7, suppress_tokens=[first], max_new_tokens=3)
    built = sfexport("build", checkpoint, "-o", tmp_path / "engines")
    assert built.exit_code == 0, built.stderr
    assert_says(built.stderr, "generation_config.json: temperature ignored")
    asked = document(sfexport("ask", tmp_path / "engines", tree.clip, "-q", "Why?", "--json"))["questions"][0]
    assert first not in asked["ids"] and len(asked["ids"]) <= 3
    notes = document(sfexport("inspect", checkpoint, "--json"))["notes"]
    assert "generation_config.json: temperature ignored: do_sample is not true" in notes


def test_a_configuration_that_cannot_be_followed_is_said_at_export_and_refused_at_ask(
    tree: Any, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    set_fields(checkpoint / "generation_config.json", num_beams=4)
    built = sfexport("build", checkpoint, "-o", tmp_path / "engines")
    assert_says(built.stderr, "questions cannot be asked", "'num_beams' is 4")
    assert_says(refusal(tmp_path, "ask", tmp_path / "engines", tree.clip, "-q", "Why?"), "'num_beams' is 4")
