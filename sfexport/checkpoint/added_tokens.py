"""Read the added and special tokens of a checkpoint's tokenizer files, as transformers 5 combines them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sfexport.checkpoint.small_files import read_optional_json
from sfexport.errors import CheckpointError
from sfexport.fields import Index, shown

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE, SPECIAL_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")
AGAIN = "Get the tokenizer files again, or save them with transformers: tokenizer.save_pretrained(DIR)."


class AddedToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token beside the vocabulary, with tokenizers.AddedToken's fields; normalized None: the library's default."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False


@dataclass(frozen=True)
class AddedTokens:
    """Tokens beside the vocabulary.

    Attributes:
        by_id: tokens by the id that the files give them, sorted.
        named: special tokens by their role ('eos_token', ...), the standard roles first.
        extra: special tokens without a role.
        stated: (file, token's text, id) as the files that count have it.
    """

    by_id: dict[int, AddedToken]
    named: dict[str, str | AddedToken]
    extra: list[str | AddedToken]
    stated: list[tuple[str, str, int]]


def read_added_tokens(
    directory: Path,
    config: Mapping[str, Any],
    decoder: Mapping[str, AddedToken] | None,
    own: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, str],
) -> AddedTokens:
    """Combine what the files say; special_tokens_map.json and added_tokens.json count only without a `decoder`.

    Args:
        config: tokenizer_config.json, and `decoder` its added_tokens_decoder.
        own: the added tokens of tokenizer.json.
        defaults: roles that have a token where the files do not mention them (null is a mention).

    Raises:
        CheckpointError: a file has no token in a token's place.
    """
    values = {name: value for name, value in config.items() if name.endswith("_token") or name in _LISTS}
    if not values.get(_LISTS[0]) and _LISTS[1] in values:
        values[_LISTS[0]] = values.pop(_LISTS[1])
    in_json = [(_index(token.get("id"), TOKENIZER_FILE), _token(token, TOKENIZER_FILE)) for token in own]
    by_id: dict[int, AddedToken] = {}
    stated: list[tuple[str, str, int]] = []
    if decoder is not None:
        by_id = {_index(id_, CONFIG_FILE): token for id_, token in decoder.items()}
        stated = [(CONFIG_FILE, token.content, id_) for id_, token in by_id.items()]
    else:
        values |= _special_map(directory, values)
        by_id = _added_file(directory, values)
        stated = [(ADDED_FILE, token.content, id_) for id_, token in by_id.items()]
        by_id |= dict(in_json)
    stated += [(TOKENIZER_FILE, token.content, id_) for id_, token in in_json]
    mentioned = set(values)
    named, extra = _special_tokens(values, {token.content: token for token in by_id.values()})
    named |= {name: text for name, text in defaults.items() if name not in mentioned}
    return AddedTokens(dict(sorted(by_id.items())), dict(sorted(named.items(), key=_role)), extra, stated)


def _added_file(directory: Path, values: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Read added_tokens.json: a token is special where it has a role or is listed as an extra one."""
    listed = values.get(_LISTS[0])
    special = {text_of(values[name]) for name in NAMED_TOKENS if values.get(name)}
    special |= {text_of(token) for token in listed or []} if isinstance(listed, (list, dict)) else set()
    out = {}
    for text, id_ in (read_optional_json(directory / ADDED_FILE) or {}).items():
        out[_index(id_, ADDED_FILE)] = AddedToken(text, normalized=text not in special, special=text in special)
    return out


def _role(entry: tuple[str, Any]) -> int:
    """Sort key for roles: the standard ones in their order, then the others in the file's (sorting is stable)."""
    name = entry[0]
    return NAMED_TOKENS.index(name) if name in NAMED_TOKENS else len(NAMED_TOKENS)


def _special_map(directory: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Read special_tokens_map.json; its tokens are special whatever it says."""
    out: dict[str, Any] = {}
    for name, value in (read_optional_json(directory / SPECIAL_FILE) or {}).items():
        if isinstance(value, dict) and name != "extra_special_tokens":
            value = _token({**value, "special": True}, SPECIAL_FILE)
        elif name == "extra_special_tokens" and isinstance(value, list):
            tokens = [_token({**t, "special": True}, SPECIAL_FILE) if isinstance(t, dict) else t for t in value]
            before = list(values.get(name) or [])
            value = before + [token for token in tokens if token not in before]
        out[name] = value
    return out


def _special_tokens(
    values: Mapping[str, Any], added: Mapping[str, AddedToken]
) -> tuple[dict[str, str | AddedToken], list[str | AddedToken]]:
    """Collect named and extra special tokens; a name has the flags of the added token of the same text."""
    values = dict(values)
    lists = [values.pop(name, None) for name in _LISTS]
    extra = lists[0] if lists[0] is not None else lists[1]
    if isinstance(extra, dict):
        values |= extra
        extra = []
    named: dict[str, str | AddedToken] = {}
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, (str, AddedToken)) or (isinstance(value, dict) and value.get("__type") == "AddedToken"):
            token = value if isinstance(value, (str, AddedToken)) else _token(value, CONFIG_FILE)
            named[name] = added.get(text_of(token), token) if name in NAMED_TOKENS else token
        elif name in NAMED_TOKENS:
            raise CheckpointError(f"{CONFIG_FILE}: '{name}' is {shown(value)}, which is not a token.", AGAIN)
    if not isinstance(extra or [], list):
        raise CheckpointError(f"{CONFIG_FILE}: '{_LISTS[0]}' is {shown(extra)}, which is not a list of tokens.", AGAIN)
    tokens = [token if isinstance(token, (str, AddedToken)) else _token(token, CONFIG_FILE) for token in extra or []]
    return named, tokens


def _token(value: Any, file: str) -> AddedToken:
    fields = without(value, "__type", "id")
    try:
        return msgspec.convert(fields, AddedToken, strict=True)
    except msgspec.ValidationError as problem:
        raise CheckpointError(f"{file} has an added token {shown(value)}: {problem}.", AGAIN) from None


def _index(id_: Any, file: str) -> int:
    try:
        return msgspec.convert(int(id_) if isinstance(id_, str) and id_.isascii() else id_, Index, strict=True)
    except (msgspec.ValidationError, ValueError):
        raise CheckpointError(f"{file} gives an added token the id {shown(id_)}.", AGAIN) from None


def text_of(token: Any) -> str:
    """Return a token's text, whatever form the file has it in."""
    if isinstance(token, AddedToken):
        return token.content
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def without(step: Any, *names: str) -> Any:
    """Return an object without the fields `names`; anything else as it is."""
    return {k: v for k, v in step.items() if k not in names} if isinstance(step, dict) else step
