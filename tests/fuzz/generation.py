"""Kinds of generation_config.json: values that are none, and fields that change a greedy answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from helpers import set_fields

from fuzz.base import Reading, through_checkpoint, whole
from fuzz.configs import NONSENSE
from fuzz.kinds import Case, Expect, Kind, Wrong

REFUSED, ANSWERED, EITHER = Expect.REFUSED, Expect.ANSWERED, Expect.EITHER
Change = Callable[[dict[str, Any]], Any]


# generation_config.json: what the fields cannot be; other values are applied or refused (the right tokens are the
# subject of the generation tests). All of these are beside do_sample true.
GENERATION = {
    "max_new_tokens": "count",
    "max_length": "count",
    "min_new_tokens": "index",
    "min_length": "index",
    "do_sample": "flag",
    "temperature": "number",
    "top_k": "index",
    "top_p": "number",
    "min_p": "number or zero",
    "typical_p": "number",
    "epsilon_cutoff": "number or zero",
    "eta_cutoff": "number or zero",
    "repetition_penalty": "number",
    "no_repeat_ngram_size": "index",
    "num_beams": "count",
    "num_return_sequences": "count",
    "eos_token_id": "tokens",
    "suppress_tokens": "tokens",
    "begin_suppress_tokens": "tokens",
    "bad_words_ids": "token lists",
    "forced_eos_token_id": "tokens",
    "pad_token_id": "free",
    "bos_token_id": "free",
    "transformers_version": "free",
    "use_cache": "free",
    "unheard_of": "free",
}
_NEVER = {"text", "'false' as text", "object", "NaN", "escapes", "long text"}
NEVER = {
    "count": {*_NEVER, "negative", "zero", "fraction", "infinite", "list", "number as text", "empty text"},
    "index": {*_NEVER, "negative", "fraction", "infinite", "list", "number as text", "empty text"},
    "number": {*_NEVER, "negative", "zero", "infinite", "list", "number as text", "empty text"},
    "number or zero": {*_NEVER, "negative", "infinite", "list", "number as text", "empty text"},
    "flag": {*_NEVER, "negative", "fraction", "huge", "list", "number as text", "empty text"},
    "tokens": {*_NEVER, "fraction", "infinite", "number as text", "empty text"},
    "token lists": set(NONSENSE) - {"null", "huge", "beyond 64 bits", "zero", "true"},
    "free": set(),
}


def _generation_kinds() -> Iterator[Kind]:
    for field, kind in GENERATION.items():
        for name, value in NONSENSE.items():
            damage = partial(_set_generation, fields={"do_sample": True, "seed": 1, field: value})
            expect = REFUSED if name in NEVER[kind] else EITHER
            act = partial(through_checkpoint, damage=damage, right=_like_the_undamaged_up_to_sampling)
            yield Kind(f"generation_config.json {field}: {name}", "texts", act, expect)
    for name, (fields, right) in GREEDY.items():
        yield Kind(f"generation_config.json, {name}", "texts", partial(_greedy, fields=fields, right=right))


def _greedy(case: Case, fields: dict[str, Any], right: Callable[[Case, Reading], None]) -> None:
    text = json.dumps(fields).replace(json.dumps(FIRST), str(whole(case.base).ids[0]))
    through_checkpoint(case, partial(_set_generation, fields=json.loads(text)), right)


def _set_generation(path: Path, fields: dict[str, Any]) -> None:
    content = dict(fields)
    content.pop("seed", None)
    set_fields(path / "generation_config.json", **content)


def _like_the_undamaged_up_to_sampling(case: Case, found: Reading) -> None:
    wanted = whole(case.base)
    if found.prompt != wanted.prompt or abs(found.logits - wanted.logits).max() > 1e-4:
        raise Wrong("the prompt or its logits changed with generation_config.json")


def _short(case: Case, found: Reading) -> None:
    if found.ids != whole(case.base).ids[:2]:
        raise Wrong(f"not the first two tokens: {found.ids}")


def _first_token_is_not_greedy(case: Case, found: Reading) -> None:
    if found.ids[:1] == whole(case.base).ids[:1]:
        raise Wrong("the token that is ruled out came first")


def _second_is_5(case: Case, found: Reading) -> None:
    if found.ids[1] != 5:
        raise Wrong(f"the second token is {found.ids[1]}")


def _at_least(case: Case, found: Reading) -> None:
    if len(found.ids) < 20:
        raise Wrong(f"{len(found.ids)} tokens, where at least 20 were asked for")


def _no_repeats(case: Case, found: Reading) -> None:
    if len(set(found.ids)) < len(found.ids):
        raise Wrong("a token came twice")


def _stops(case: Case, found: Reading) -> None:
    if len(found.ids) > 1:
        raise Wrong("did not end at the first token")


def _as_greedy(case: Case, found: Reading) -> None:
    if found.ids != whole(case.base).ids:
        raise Wrong(f"sampled among one token, the answer is {found.ids}, not {whole(case.base).ids}")


# Sampling at a temperature that makes all tokens as likely, among one token alone.
HOT = {"do_sample": True, "temperature": 50.0}
# What a greedy answer has to be where the field is applied; FIRST stands for the undamaged answer's first token.
FIRST = "first"
GREEDY: dict[str, tuple[dict[str, Any], Callable[[Case, Reading], None]]] = {
    "two tokens at most": ({"max_new_tokens": 2}, _short),
    "the first token suppressed": ({"suppress_tokens": [FIRST]}, _first_token_is_not_greedy),
    "the first token suppressed at the beginning": (
        {"begin_suppress_tokens": [FIRST]},
        _first_token_is_not_greedy,
    ),
    "the first token a bad word": ({"bad_words_ids": [[FIRST]]}, _first_token_is_not_greedy),
    "no token twice": ({"no_repeat_ngram_size": 1}, _no_repeats),
    "twenty tokens at least": ({"min_new_tokens": 20}, _at_least),
    "the first token ends": ({"eos_token_id": [FIRST]}, _stops),
    "the first token ends, as a number": ({"eos_token_id": FIRST}, _stops),
    "a second token forced, as transformers has it behind embeddings": ({"forced_bos_token_id": 5}, _second_is_5),
    "sampled among one token by top_k": (HOT | {"top_k": 1}, _as_greedy),
    "sampled among one token by top_p": (HOT | {"top_p": 1e-9}, _as_greedy),
    "sampled among one token by min_p": (HOT | {"min_p": 1.0}, _as_greedy),
    "sampled among one token by epsilon_cutoff": (HOT | {"epsilon_cutoff": 0.9}, _as_greedy),
}


KINDS = [*_generation_kinds()]
