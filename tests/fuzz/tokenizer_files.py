"""Kinds of hostile tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from helpers import edit_json

from fuzz.base import through_checkpoint
from fuzz.kinds import Case, Expect, Kind
from fuzz.oracle import same_prompt_as_transformers

REFUSED, ANSWERED, EITHER = Expect.REFUSED, Expect.ANSWERED, Expect.EITHER
Change = Callable[[dict[str, Any]], Any]


def _tokenizer(change: Change, name: str = "tokenizer.json") -> Callable[[Path], None]:
    return lambda path: edit_json(path / name, change)


def _model(**fields: Any) -> Callable[[Path], None]:
    return _tokenizer(lambda t: t["model"].update(fields))


def _without_control_tokens(path: Path) -> None:
    """The control tokens only in tokenizer_config.json, as some trainers leave them: transformers adds them."""
    edit_json(path / "tokenizer.json", lambda t: t.update(added_tokens=[]))


def _vocabulary_and_merges_only(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    (path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]), encoding="utf-8")
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (path / "tokenizer.json").unlink()


def _padding(**fields: Any) -> dict[str, Any]:
    return {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
        **fields,
    }


def _truncation(**fields: Any) -> dict[str, Any]:
    return {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0, **fields}


def _deep(depth: int) -> dict[str, Any]:
    normalizer: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        normalizer = {"type": "Sequence", "normalizers": [normalizer]}
    return normalizer


TOKENIZERS: dict[str, tuple[Callable[[Path], object], Expect]] = {
    "truncation to 4": (_tokenizer(lambda t: t.update(truncation=_truncation())), EITHER),
    "truncation to 0": (_tokenizer(lambda t: t.update(truncation=_truncation(max_length=0))), EITHER),
    "truncation with a stride above its length": (
        _tokenizer(lambda t: t.update(truncation=_truncation(stride=400))),
        EITHER,
    ),
    "truncation from the left": (_tokenizer(lambda t: t.update(truncation=_truncation(direction="Left"))), EITHER),
    "padding to a multiple of 16": (_tokenizer(lambda t: t.update(padding=_padding(pad_to_multiple_of=16))), EITHER),
    "padding to a multiple of 10^9": (
        _tokenizer(lambda t: t.update(padding=_padding(pad_to_multiple_of=10**9))),
        EITHER,
    ),
    "padding to 10^9": (_tokenizer(lambda t: t.update(padding=_padding(strategy={"Fixed": 10**9}))), EITHER),
    "padding to 10^18": (_tokenizer(lambda t: t.update(padding=_padding(strategy={"Fixed": 10**18}))), EITHER),
    "padding to a multiple of 0": (_tokenizer(lambda t: t.update(padding=_padding(pad_to_multiple_of=0))), EITHER),
    "padding of another type": (_tokenizer(lambda t: t.update(padding="yes")), EITHER),
    "a charsmap that is no charsmap": (
        _tokenizer(lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        REFUSED,
    ),
    "a charsmap of 0xff": (
        _tokenizer(lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="})),
        REFUSED,
    ),
    "a charsmap whose index is beyond its end": (
        _tokenizer(lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "CAAAAP//////////"})),
        REFUSED,
    ),
    "an empty charsmap": (
        _tokenizer(lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": ""})),
        EITHER,
    ),
    "no model": (_tokenizer(lambda t: t.pop("model")), REFUSED),
    "a model of an unknown type": (_model(type="Magic"), REFUSED),
    "no vocabulary": (_tokenizer(lambda t: t["model"].pop("vocab")), REFUSED),
    "an empty vocabulary": (_model(vocab={}), REFUSED),
    "a vocabulary that is a list": (_model(vocab=["a"]), REFUSED),
    "a vocabulary without a byte": (_tokenizer(lambda t: t["model"]["vocab"].pop("a")), EITHER),
    "ids beyond the table": (_tokenizer(lambda t: _shift_ids(t, 100_000)), REFUSED),
    "ids of 2^31": (_tokenizer(lambda t: _shift_ids(t, 2**31)), REFUSED),
    "ids of 2^33": (_tokenizer(lambda t: _shift_ids(t, 2**33)), REFUSED),
    "negative ids": (_tokenizer(lambda t: _shift_ids(t, -10_000)), REFUSED),
    "the same id for all": (
        _tokenizer(lambda t: t["model"].update(vocab=dict.fromkeys(t["model"]["vocab"], 0))),
        EITHER,
    ),
    "merges of unknown tokens": (_tokenizer(lambda t: t["model"]["merges"].append(["qqqq", "zzzz"])), REFUSED),
    "merges that are numbers": (_model(merges=[1, 2]), REFUSED),
    "no merges": (_model(merges=[]), EITHER),
    "dropout": (_model(dropout=0.5), EITHER),
    "dropout of 7": (_model(dropout=7.0), EITHER),
    "an unknown token that is not there": (_model(unk_token="<none>"), EITHER),
    "byte fallback": (_model(byte_fallback=True), EITHER),
    "a prefix for continuing pieces": (_model(continuing_subword_prefix="##"), EITHER),
    "ignored merges": (_model(ignore_merges=True), EITHER),
    "an added token beyond the table": (
        _tokenizer(lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": 10**6, "content": "What"})),
        EITHER,
    ),
    "an added token with a negative id": (
        _tokenizer(lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": -1, "content": "What"})),
        REFUSED,
    ),
    "an empty added token": (
        _tokenizer(lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": 5, "content": ""})),
        EITHER,
    ),
    "an added token that is a common word": (
        _tokenizer(lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": 3, "content": "video"})),
        EITHER,
    ),
    "no control tokens": (_without_control_tokens, EITHER),
    "control tokens with other ids": (
        _tokenizer(lambda t: [token.update(id=token["id"] + 1) for token in t["added_tokens"]]),
        EITHER,
    ),
    "a version of another kind": (_tokenizer(lambda t: t.update(version="9.0")), EITHER),
    "no version": (_tokenizer(lambda t: t.pop("version")), EITHER),
    "an unknown field": (_tokenizer(lambda t: t.update(unheard_of=1)), EITHER),
    "an unknown normaliser": (_tokenizer(lambda t: t.update(normalizer={"type": "Magic"})), REFUSED),
    "a normaliser nested 100 deep": (_tokenizer(lambda t: t.update(normalizer=_deep(30))), EITHER),
    "a normaliser that lowers": (_tokenizer(lambda t: t.update(normalizer={"type": "Lowercase"})), EITHER),
    "a normaliser that replaces all": (
        _tokenizer(lambda t: t.update(normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": "x"})),
        EITHER,
    ),
    "a regular expression that never ends": (
        _tokenizer(
            lambda t: t.update(
                normalizer={"type": "Replace", "pattern": {"Regex": "(.*)*(.*)*(.*)*(.*)*\\1x"}, "content": ""}
            )
        ),
        EITHER,
    ),
    "a broken regular expression": (
        _tokenizer(lambda t: t.update(normalizer={"type": "Replace", "pattern": {"Regex": "(("}, "content": ""})),
        REFUSED,
    ),
    "no pre-tokeniser": (_tokenizer(lambda t: t.update(pre_tokenizer=None)), EITHER),
    "no decoder": (_tokenizer(lambda t: t.update(decoder=None)), EITHER),
    "an unknown decoder": (_tokenizer(lambda t: t.update(decoder={"type": "Magic"})), REFUSED),
    "a post-processor with tokens that are not there": (
        _tokenizer(
            lambda t: t.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [],
                    "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [10**6], "tokens": ["[CLS]"]}},
                }
            )
        ),
        EITHER,
    ),
    "a word-level model": (
        _tokenizer(lambda t: t.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"})),
        EITHER,
    ),
    "a unigram model without pieces": (
        _tokenizer(lambda t: t.update(model={"type": "Unigram", "unk_id": 0, "vocab": []})),
        REFUSED,
    ),
    "a unigram model with its unknown id beyond": (
        _tokenizer(lambda t: t.update(model={"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0]]})),
        REFUSED,
    ),
    "a unigram model with a NaN score": (
        _tokenizer(lambda t: t.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", float("nan")]]})),
        REFUSED,
    ),
    "vocabulary and merges only": (_vocabulary_and_merges_only, EITHER),
    "no tokenizer at all": (lambda path: (path / "tokenizer.json").unlink(), REFUSED),
    "model_max_length of 4": (
        _tokenizer(lambda t: t.update(model_max_length=4), "tokenizer_config.json"),
        EITHER,
    ),
    "a tokenizer class of one's own": (
        _tokenizer(lambda t: t.update(tokenizer_class="EvilTokenizer"), "tokenizer_config.json"),
        EITHER,
    ),
    "remote code in tokenizer_config.json": (
        _tokenizer(lambda t: t.update(auto_map={"AutoTokenizer": ["a/b--t.T", None]}), "tokenizer_config.json"),
        EITHER,
    ),
    "added_tokens_decoder that disagrees": (
        _tokenizer(
            lambda t: t.update(
                added_tokens_decoder={"3": {"content": "<|im_start|>", "special": True, "normalized": False}}
            ),
            "tokenizer_config.json",
        ),
        EITHER,
    ),
    "added_tokens_decoder that is a list": (
        _tokenizer(lambda t: t.update(added_tokens_decoder=[1]), "tokenizer_config.json"),
        EITHER,
    ),
    "added_tokens.json with ids in words": (
        lambda path: (path / "added_tokens.json").write_text('{"<|im_start|>": "many"}'),
        EITHER,
    ),
    "added_tokens.json with an id beyond the table": (
        lambda path: (path / "added_tokens.json").write_text('{"<new>": 1000000000}'),
        EITHER,
    ),
}


def _shift_ids(tokenizer: dict[str, Any], by: int) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: number + by for token, number in vocabulary.items()}


def _tokenizer_kinds() -> Iterator[Kind]:
    for name, (damage, expect) in TOKENIZERS.items():
        act = partial(through_checkpoint, damage=damage, right=same_prompt_as_transformers)
        yield Kind(f"tokenizer, {name}", "texts", act, expect, needs_torch=expect is EITHER)
    yield Kind("tokenizer.json with a flipped byte", "texts", _flipped_tokenizer, drawn=True, needs_torch=True)
    yield Kind("tokenizer.json cut", "texts", _cut_tokenizer, REFUSED, drawn=True)


def _flipped_tokenizer(case: Case) -> None:
    def damage(path: Path) -> None:
        raw = bytearray((path / "tokenizer.json").read_bytes())
        raw[case.rng.randrange(len(raw))] ^= 1 << case.rng.randrange(8)
        (path / "tokenizer.json").write_bytes(raw)

    through_checkpoint(case, damage, same_prompt_as_transformers)


def _cut_tokenizer(case: Case) -> None:
    def damage(path: Path) -> None:
        raw = (path / "tokenizer.json").read_bytes()
        (path / "tokenizer.json").write_bytes(raw[: case.rng.randrange(len(raw) - 3)])

    through_checkpoint(case, damage)


KINDS = [*_tokenizer_kinds()]
