"""Read a checkpoint's tokenizer files: which tokenizer they describe, with which added tokens.

transformers 5 is followed: the class named in tokenizer_config.json decides how tokenizer.json is read, and
`added_tokens_decoder` comes before special_tokens_map.json and added_tokens.json. Reads JSON only: the tokenizers
library is used by tokenizer_making, in a process of its own while exporting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from sfexport.checkpoint.added_tokens import (
    ADDED_FILE,
    AGAIN,
    CONFIG_FILE,
    MERGES_FILE,
    TOKENIZER_FILE,
    VOCAB_FILE,
    AddedToken,
    AddedTokens,
    read_added_tokens,
    without,
)
from sfexport.checkpoint.small_files import is_present, read_optional_json
from sfexport.errors import CheckpointError
from sfexport.fields import Fields, read_fields, shown, unknown_fields

# Tokens that the prompt is made of; the second pair in checkpoints with mm_use_im_start_end.
START, END = "<|im_start|>", "<|im_end|>"
VIDEO_START, VIDEO_END = "<im_start>", "<im_end>"
# How Qwen2 cuts text into words before the merges.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
# Classes that take tokenizer.json as it is.
AS_IT_IS = ("TokenizersBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer")


class TokenizerConfig(Fields, frozen=True, kw_only=True):
    """The fields of tokenizer_config.json.

    Special tokens (`*_token`) are read beside it, since null means something there.
    """

    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(
        {
            *("backend", "chat_control_tokens", "chat_template", "clean_up_tokenization_spaces", "do_lower_case"),
            *("errors", "is_local", "legacy", "local_files_only", "max_len", "max_length", "model_input_names"),
            *("model_max_length", "name_or_path", "pad_to_multiple_of", "pad_token_type_id", "padding_side"),
            *("processor_class", "response_schema", "response_template", "sp_model_kwargs", "special_tokens_map_file"),
            *("spaces_between_special_tokens", "stride", "tokenizer_file", "truncation_side", "truncation_strategy"),
            *("trust_remote_code", "use_default_system_prompt", "use_fast", "verbose"),
        }
    )

    tokenizer_class: str | None = None
    added_tokens_decoder: dict[str, AddedToken] | None = None
    extra_special_tokens: Any = None
    additional_special_tokens: Any = None
    add_prefix_space: bool = False
    add_bos_token: bool = False
    add_eos_token: bool = False
    split_special_tokens: bool = False
    # What changes ids or texts and is refused.
    auto_map: Any = None
    fast_tokenizer_files: Any = None
    fix_mistral_regex: bool = False
    init_inputs: list[Any] = []
    tokenizer_object: Any = None
    post_processor: Any = None
    gguf_file: Any = None
    vocab: Any = None
    merges: Any = None
    clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output: bool = False


# Fields that have no meaning here, and why.
REFUSED = {
    "auto_map": "the tokenizer would come from code of its own",
    "fast_tokenizer_files": "another file may stand for tokenizer.json",
    "fix_mistral_regex": "it belongs to other models",
    "init_inputs": "they are arguments of other tokenizers",
    "tokenizer_object": "it belongs into tokenizer.json",
    "post_processor": "it belongs into tokenizer.json",
    "gguf_file": "GGUF files are not read",
    "vocab": "it belongs into tokenizer.json",
    "merges": "they belong into tokenizer.json",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": "answers would lose spaces",
    "split_special_tokens": "the prompt's control tokens would be split",
}


class TokenizerJson(Fields, frozen=True, kw_only=True):
    """The parts of tokenizer.json that are looked at before the tokenizers library reads it."""

    IRRELEVANT: ClassVar[frozenset[str]] = frozenset({"version", "post_processor"})

    model: dict[str, Any]
    added_tokens: list[dict[str, Any]] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None
    truncation: Any = None
    padding: Any = None


@dataclass(frozen=True)
class TokenizerFiles:
    """The content of a directory's tokenizer files.

    Attributes:
        content: tokenizer.json, without its truncation and padding; None where vocab.json and merges.txt stand for it.
        qwen2: built as Qwen2Tokenizer of transformers 5 builds it, from vocabulary, merges and added tokens alone.
        tokens: those beside the vocabulary.
        notes: fields that are ignored, a line each.
    """

    directory: Path
    config: TokenizerConfig
    content: dict[str, Any] | None
    qwen2: bool
    tokens: AddedTokens
    notes: list[str] = field(default_factory=list)


def has_tokenizer(directory: Path) -> bool:
    """Tell whether a directory has the files that a tokenizer can be made of."""
    return is_present(directory / TOKENIZER_FILE) or all(is_present(directory / n) for n in (VOCAB_FILE, MERGES_FILE))


def tokenizer_notes(directory: Path) -> list[str]:
    """List, for `export` and `inspect`, what of the tokenizer files is ignored, or why they cannot be used."""
    if not has_tokenizer(directory):
        return [
            f"no {TOKENIZER_FILE}, and no {VOCAB_FILE} with {MERGES_FILE}: questions cannot be asked (sfexport ask)"
        ]
    try:
        return read_tokenizer_files(directory).notes
    except CheckpointError as error:
        return [f"questions cannot be asked (sfexport ask): {error}"]


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read the tokenizer files of a directory.

    Raises:
        CheckpointError: there are none, or one is damaged or says what cannot be followed.
    """
    if not has_tokenizer(directory):
        raise CheckpointError(
            f"{directory} has no {TOKENIZER_FILE}, and no {VOCAB_FILE} with {MERGES_FILE}, so questions cannot be "
            "tokenised.",
            "Put the model's tokenizer files into the checkpoint and export again.",
        )
    raw = read_optional_json(directory / CONFIG_FILE) or {}
    config = read_fields(TokenizerConfig, raw, CONFIG_FILE)
    for name, reason in REFUSED.items():
        if getattr(config, name):
            raise CheckpointError(f"{CONFIG_FILE}: '{name}' is set, which is not supported: {reason}.", AGAIN)
    content = read_optional_json(directory / TOKENIZER_FILE)
    file = None if content is None else read_fields(TokenizerJson, content, TOKENIZER_FILE)
    named = config.tokenizer_class or (read_optional_json(directory / "config.json") or {}).get("tokenizer_class")
    qwen2 = _is_qwen2(named, file)
    if file is not None and qwen2:
        _check_qwen2(file, config)
    own = [] if file is None else file.added_tokens
    defaults = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>") if qwen2 else {}
    tokens = read_added_tokens(directory, raw, config.added_tokens_decoder, own, defaults)
    if content is not None:
        content = {**content, "truncation": None, "padding": None}
    notes = _notes(directory, raw, config, file, {token.content for token in tokens.by_id.values()})
    return TokenizerFiles(directory, config, content, qwen2, tokens, notes)


def _is_qwen2(name: Any, file: TokenizerJson | None) -> bool:
    if name is not None and name not in (*QWEN2, *AS_IT_IS):
        raise CheckpointError(
            f"{CONFIG_FILE}: 'tokenizer_class' is {shown(name)}; sfexport makes {QWEN2[0]}, and with {AS_IT_IS[1]} or "
            f"{AS_IT_IS[0]} takes {TOKENIZER_FILE} as it is.",
            "The tokenizer may belong to another model.",
        )
    return file is None or name in QWEN2


def _check_qwen2(file: TokenizerJson, config: TokenizerConfig) -> None:
    """Refuse a tokenizer.json that Qwen2Tokenizer of transformers 5 would not follow, and transformers 4 would."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": config.add_prefix_space, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    steps = (file.pre_tokenizer or {}).get("pretokenizers")
    steps = [without(step, "trim_offsets") for step in steps] if isinstance(steps, list) else steps
    model = {name: value or None for name, value in file.model.items() if name not in ("vocab", "merges")}
    parts = {
        "normalizer": without(file.normalizer) == {"type": "NFC"},
        "pre_tokenizer": (file.pre_tokenizer or {}).get("type") == "Sequence" and steps == [split, byte_level],
        "decoder": (file.decoder or {}).get("type") == "ByteLevel",
        "model": {name for name, value in model.items() if value} == {"type"} and model["type"] == "BPE",
    }
    for name, equal in parts.items():
        if not equal:
            raise CheckpointError(
                f"{TOKENIZER_FILE}: its '{name}' is not Qwen2's, and {CONFIG_FILE} names the class {QWEN2[0]}, with "
                "which transformers 5 replaces it and transformers 4 follows it.",
                f"Where {TOKENIZER_FILE} is right, set 'tokenizer_class' to '{AS_IT_IS[1]}'.",
            )


def _notes(
    directory: Path, raw: Mapping[str, Any], config: TokenizerConfig, file: TokenizerJson | None, added: set[str]
) -> list[str]:
    notes = []
    if file is None:
        notes.append(f"the tokenizer is made from {VOCAB_FILE} and {MERGES_FILE}")
    else:
        if ignored := [name for name in ("truncation", "padding") if getattr(file, name) is not None]:
            notes.append(f"{TOKENIZER_FILE}: its {' and '.join(ignored)} not applied")
        vocabulary = read_optional_json(directory / VOCAB_FILE)
        if vocabulary is not None and vocabulary != file.model.get("vocab"):
            notes.append(f"{VOCAB_FILE} ignored: {TOKENIZER_FILE} has another vocabulary")
        dropped = sorted({str(token.get("content")) for token in file.added_tokens} - added)
        if dropped and config.added_tokens_decoder is not None:
            notes.append(f"{TOKENIZER_FILE}: added tokens that {CONFIG_FILE} lacks: {shown(', '.join(dropped))}")
    if config.added_tokens_decoder is not None and (listed := read_optional_json(directory / ADDED_FILE)):
        known = {token.content: int(id_) for id_, token in config.added_tokens_decoder.items()}
        if other := sorted(token for token, id_ in listed.items() if known.get(token) != id_):
            notes.append(f"{ADDED_FILE} ignored: {CONFIG_FILE} has it otherwise for {shown(', '.join(other))}")
    if raw.get("clean_up_tokenization_spaces"):
        notes.append(f"{CONFIG_FILE}: 'clean_up_tokenization_spaces' not applied (it would remove spaces)")
    unknown = [name for name in unknown_fields(TokenizerConfig, raw) if not name.endswith("_token")]
    if unknown:
        notes.append(f"{CONFIG_FILE}: unknown fields ignored: {shown(', '.join(unknown))}")
    return notes
