"""Tokenizers made out of a directory's files: the ids of transformers' own loading, or a refusal that says why."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_says, edit_json, refusal, set_fields, sfexport

from sfexport.checkpoint.tokenizer_files import tokenizer_notes
from sfexport.checkpoint.tokenizer_making import make_tokenizer, write_tokenizer
from sfexport.errors import CheckpointError
from sfexport.qa.prompt import ChatTokenizer, build_prompt
from sfexport.testing.random_checkpoint import write_random_checkpoint

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEXTS = (
    "",
    "What happens in the video?",
    "  spaces   here ,  there .\n\n\tand\r\nlines \n",
    "Zahlen 1234567890 und 3,5; don't can't I'LL we've",
    "\u00e9 e\u0301 \u1112\u1161\u11ab \ud55c\uad6d \u4e2d\u6587 \u0627\u0644 \u2126 \ufb01",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u200b\u00a0\u3000x\0y",
    f"{START}user\nWhat is {END} and {END_OF_TEXT}{END}\n{START}assistant\n",
    f"a {END} b{START}c  {END}  <|im_end|  <image> <box>x</box> <extra>",
    build_prompt("Which colour?").replace("<image>", ""),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's tokenizer files, with its config.json."""
    made = tmp_path_factory.mktemp("tokenizer")
    write_random_checkpoint(made / "checkpoint")
    for name in (FILE, CONFIG, "config.json"):
        shutil.copy(made / "checkpoint" / name, made / name)
    shutil.rmtree(made / "checkpoint")
    return made


@pytest.fixture
def files(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "files"))


def ids_of_transformers(directory: Path) -> tuple[list[list[int]], Any]:
    """As the reference: the tokenizer is called, with special tokens, on each text."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return [tokenizer(text).input_ids for text in TEXTS], tokenizer


def check(directory: Path) -> None:
    """Equal ids for all texts, equal texts for all ids, equal sizes."""
    expected, theirs = ids_of_transformers(directory)
    ours = make_tokenizer(directory)
    assert [ours.encode(text, add_special_tokens=False).ids for text in TEXTS] == expected
    assert ours.get_vocab_size() == len(theirs)
    for ids in expected:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def edit(directory: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_json(directory / name, change)


def split_files(directory: Path) -> None:
    """vocab.json and merges.txt in the place of tokenizer.json."""
    model = json.loads((directory / FILE).read_text())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
    (directory / FILE).unlink()


def drop_added(directory: Path, *texts: str) -> None:
    """Take added tokens out of tokenizer.json (all of them where none is named)."""
    texts = texts or (END_OF_TEXT, START, END)
    edit(directory, FILE, lambda c: c.update(added_tokens=[t for t in c["added_tokens"] if t["content"] not in texts]))


def no_decoder(directory: Path) -> None:
    edit(directory, CONFIG, lambda c: c.pop("added_tokens_decoder"))


def added_json(directory: Path, **more: int) -> None:
    size = len(json.loads((directory / FILE).read_text())["model"]["vocab"])
    ids = {text: size + i for i, text in enumerate((END_OF_TEXT, START, END))} | more
    (directory / "added_tokens.json").write_text(json.dumps(ids))


def special_map(directory: Path, **fields: Any) -> None:
    (directory / "special_tokens_map.json").write_text(json.dumps(fields))


def more_in_decoder(directory: Path, **flags: Any) -> None:
    size = len(json.loads((directory / FILE).read_text())["model"]["vocab"])
    token = {"content": "<box>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    token |= {"special": False, **flags}
    edit(directory, CONFIG, lambda c: c["added_tokens_decoder"].update({str(size + 3): token}))


def as_it_is(directory: Path, **parts: Any) -> None:
    set_fields(directory / CONFIG, tokenizer_class="PreTrainedTokenizerFast")
    edit(directory, FILE, lambda c: c.update(parts))


def only_in_added_json(directory: Path) -> None:
    added_json(directory)
    drop_added(directory)
    no_decoder(directory)


def named_in_map(directory: Path) -> None:
    drop_added(directory)
    no_decoder(directory)
    edit(directory, CONFIG, lambda c: [c.pop(n) for n in ("additional_special_tokens", "eos_token", "pad_token")])
    special_map(
        directory,
        pad_token=END_OF_TEXT,
        eos_token={"content": END, "lstrip": True, "rstrip": False, "normalized": False, "single_word": False},
        additional_special_tokens=[START, END],
    )


def only_config(directory: Path) -> None:
    drop_added(directory)


def vocabulary_only(directory: Path) -> None:
    split_files(directory)
    (directory / CONFIG).write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))


SAME: dict[str, Callable[[Path], Any]] = {
    "as written": lambda d: None,
    "without tokenizer_config.json": lambda d: (d / CONFIG).unlink(),
    "the fast class": lambda d: set_fields(d / CONFIG, tokenizer_class="Qwen2TokenizerFast"),
    "taken as it is": as_it_is,
    "without a class": lambda d: edit(d, CONFIG, lambda c: c.pop("tokenizer_class")),
    "padding": lambda d: edit(
        d,
        FILE,
        lambda c: c.update(
            padding={
                **{"strategy": {"Fixed": 48}, "direction": "Right", "pad_to_multiple_of": 16, "pad_id": 0},
                **{"pad_type_id": 0, "pad_token": "!"},
            },
            truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        ),
    ),
    "control tokens in the configuration only": only_config,
    "control tokens in added_tokens.json only": only_in_added_json,
    "control tokens in special_tokens_map.json": named_in_map,
    "one control token in the configuration only": lambda d: drop_added(d, END),
    "a further token in the configuration": more_in_decoder,
    "a further special token": lambda d: more_in_decoder(d, special=True),
    "a further token that strips": lambda d: more_in_decoder(d, lstrip=True, rstrip=True, special=True),
    "a further token of single words": lambda d: more_in_decoder(d, single_word=True),
    "a further token that is normalised": lambda d: more_in_decoder(d, normalized=True),
    "a further token, as it is": lambda d: (more_in_decoder(d), as_it_is(d)),
    "extra special tokens": lambda d: set_fields(d / CONFIG, extra_special_tokens=["<extra>", START]),
    "named extra tokens": lambda d: set_fields(d / CONFIG, extra_special_tokens={"box_token": "<box>"}),
    "a token of a role of its own": lambda d: set_fields(d / CONFIG, image_token="<image>"),
    "a role of a token with flags": lambda d: set_fields(
        d / CONFIG, sep_token={"__type": "AddedToken", "content": "<extra>", "lstrip": True, "special": True}
    ),
    "stale added_tokens.json": lambda d: added_json(d, **{END: 7, "<box>": 900}),
    "added tokens that the configuration lacks": lambda d: edit(
        d, FILE, lambda c: c["added_tokens"].append({**c["added_tokens"][-1], "id": 503, "content": "<box>"})
    ),
    "bos and eos asked for beside tokenizer.json": lambda d: set_fields(
        d / CONFIG, add_bos_token=True, add_eos_token=True, bos_token=END_OF_TEXT
    ),
    "another normaliser, as it is": lambda d: as_it_is(d, normalizer={"type": "Lowercase"}),
    "no normaliser, as it is": lambda d: as_it_is(d, normalizer=None),
    "a space in front, as it is": lambda d: as_it_is(
        d, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    ),
    "spaces cleaned up": lambda d: set_fields(d / CONFIG, clean_up_tokenization_spaces=True),
    "vocabulary and merges": split_files,
    "vocabulary and merges with added_tokens.json": lambda d: (added_json(d), no_decoder(d), split_files(d)),
    "vocabulary and merges, a space in front": lambda d: (
        set_fields(d / CONFIG, add_prefix_space=True),
        split_files(d),
    ),
    "no special token for the unknown": lambda d: set_fields(d / CONFIG, unk_token=None, pad_token=None),
}


# What the releases of transformers do differently; today's are followed, and a note says so where something is ignored.
CHANGED = {"a role of a token with flags", "added tokens that the configuration lacks", "spaces cleaned up"}


@pytest.mark.parametrize("name", SAME)
def test_ids_are_those_of_transformers(name: str, files: Path) -> None:
    version = pytest.importorskip("transformers").__version__
    if name in CHANGED and tuple(map(int, version.split(".")[:2])) < (5, 20):
        pytest.skip("this transformers reads it differently")
    SAME[name](files)
    check(files)


def test_vocabulary_and_merges_give_the_ids_of_tokenizer_json(original: Path, files: Path) -> None:
    split_files(files)
    whole, made = make_tokenizer(original), make_tokenizer(files)
    for text in TEXTS:
        assert made.encode(text).ids == whole.encode(text, add_special_tokens=False).ids
    assert made.get_vocab() == whole.get_vocab()
    assert tokenizer_notes(files) == ["the tokenizer is made from vocab.json and merges.txt"]


def test_what_is_written_gives_the_same_ids(files: Path, tmp_path: Path) -> None:
    """Written by one process, read by another, and made again from itself."""
    more_in_decoder(files, special=True)
    split_files(files)
    made = make_tokenizer(files)
    write_tokenizer(files, tmp_path / FILE)
    read = ChatTokenizer.from_file(tmp_path / FILE)
    for text in TEXTS:
        assert read.encode(text) == made.encode(text).ids
    shutil.copy(tmp_path / FILE, files / FILE)
    assert make_tokenizer(files).get_vocab() == made.get_vocab()


def template(directory: Path) -> None:
    """A post-processor that puts a token in front."""
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [500], "tokens": [END_OF_TEXT]}},
    }
    edit(directory, FILE, lambda c: c.update(post_processor=processor))


def shift_ids(directory: Path) -> None:
    edit(directory, CONFIG, lambda c: c.update(added_tokens_decoder={"700": c["added_tokens_decoder"]["500"]}))


def shuffle_json(directory: Path) -> None:
    """tokenizer.json has two control tokens the other way round."""
    edit(directory, FILE, lambda c: c["added_tokens"].__setitem__(slice(1, 3), swapped(c["added_tokens"][1:3])))


def swapped(pair: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**pair[0], "content": pair[1]["content"]}, {**pair[1], "content": pair[0]["content"]}]


def precompiled(directory: Path) -> None:
    charsmap = base64.b64encode(b"\xff\xff\xff\x7f" + b"\0" * 8).decode()
    as_it_is(directory, normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap})


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no files": (lambda d: (d / FILE).unlink(), "no tokenizer.json, and no vocab.json with merges.txt"),
    "a vocabulary without merges": (lambda d: (split_files(d), (d / "merges.txt").unlink()), "no tokenizer.json"),
    "broken JSON": (lambda d: (d / FILE).write_text('{"model": '), "is not valid JSON"),
    "a list": (lambda d: (d / FILE).write_text("[]"), "does not hold a JSON object"),
    "deep JSON": (lambda d: (d / FILE).write_text("[" * 100_000), "is not valid JSON"),
    "a link out of the checkpoint": (
        lambda d: ((d / FILE).rename(d.parent / FILE), (d / FILE).symlink_to(d.parent / FILE)),
        "outside the checkpoint",
    ),
    "a pipe": (lambda d: ((d / CONFIG).unlink(), os.mkfifo(d / CONFIG)), "not a regular file"),
    "no model": (lambda d: edit(d, FILE, lambda c: c.pop("model")), "`model`"),
    "a merge of unknown tokens": (lambda d: edit(d, FILE, lambda c: c["model"]["merges"].append("\u20ac q")), "used"),
    "negative ids": (lambda d: edit(d, FILE, lambda c: c["model"]["vocab"].update(a=-1)), "cannot be used"),
    "ids with a gap": (lambda d: edit(d, FILE, lambda c: c["model"]["vocab"].update({"~~": 10_000})), "each once"),
    "an id twice": (lambda d: edit(d, FILE, lambda c: c["model"]["vocab"].update({"~~": 5})), "each once"),
    "another class": (lambda d: set_fields(d / CONFIG, tokenizer_class="LlamaTokenizer"), "'LlamaTokenizer'"),
    "code": (lambda d: set_fields(d / CONFIG, auto_map={"AutoTokenizer": ["a.B", None]}), "'auto_map'"),
    "split control tokens": (lambda d: set_fields(d / CONFIG, split_special_tokens=True), "'split_special_tokens'"),
    "a text for a bool": (lambda d: set_fields(d / CONFIG, add_prefix_space="false"), "'add_prefix_space'"),
    "a number for a token": (lambda d: set_fields(d / CONFIG, eos_token=5), "'eos_token'"),
    "another normaliser": (lambda d: edit(d, FILE, lambda c: c.update(normalizer={"type": "NFKC"})), "'normalizer'"),
    "a space in front": (lambda d: set_fields(d / CONFIG, add_prefix_space=True), "'pre_tokenizer'"),
    "another model": (lambda d: edit(d, FILE, lambda c: c["model"].update(byte_fallback=True)), "'model'"),
    "a template": (template, "'post_processor' adds tokens"),
    "a template, as it is": (lambda d: (template(d), as_it_is(d)), "'post_processor' adds tokens"),
    "eos beside vocabulary and merges": (
        lambda d: (set_fields(d / CONFIG, add_eos_token=True), split_files(d)),
        "'add_eos_token'",
    ),
    "ids that cannot be": (shift_ids, "the id 700"),
    "two files that disagree": (shuffle_json, "tokenizer.json gives the token"),
    "no control tokens": (lambda d: (drop_added(d), (d / CONFIG).unlink()), r"control token '<\|im_start\|>'"),
    "no end of turn": (
        lambda d: (drop_added(d, END), (d / CONFIG).unlink()),
        r"control token '<\|im_end\|>'",
    ),
    "padding that is no padding": (
        lambda d: edit(d, FILE, lambda c: c["added_tokens"][0].update(id="many")),
        "the id 'many'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(name: str, files: Path, tmp_path: Path) -> None:
    change, said = REFUSED[name]
    change(files)
    with pytest.raises(CheckpointError, match=said):
        make_tokenizer(files)
    with pytest.raises(CheckpointError, match=said):
        write_tokenizer(files, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_endless_padding_is_not_applied(files: Path, tmp_path: Path) -> None:
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Left", "pad_to_multiple_of": 10**9, "pad_id": 0}
    edit(files, FILE, lambda c: c.update(padding=padding | {"pad_type_id": 0, "pad_token": "!"}))
    write_tokenizer(files, tmp_path / FILE)
    assert len(ChatTokenizer.from_file(tmp_path / FILE).encode("Why?")) < 5


def test_a_tokenizer_that_ends_the_process_is_refused(files: Path, tmp_path: Path) -> None:
    precompiled(files)
    with pytest.raises(CheckpointError, match="The tokenizer in"):
        write_tokenizer(files, tmp_path / "out.json")


def test_control_tokens_need_a_row_of_the_models_table(files: Path, tmp_path: Path) -> None:
    write_tokenizer(files, tmp_path / FILE, rows=503)
    with pytest.raises(CheckpointError, match=r"'<\|im_end\|>' has the id 502, .* 502 rows"):
        write_tokenizer(files, tmp_path / "other.json", rows=502)


def test_export_takes_the_made_tokenizer_along(tree: Any, tmp_path: Path) -> None:
    """A checkpoint with vocab.json and merges.txt answers as the one with tokenizer.json; a bad one is not exported."""
    checkpoint = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    split_files(checkpoint)
    assert sfexport("export", checkpoint, "-o", tmp_path / "bundle").exit_code == 0
    assert (tmp_path / "bundle" / FILE).read_bytes() == (tree.bundle / FILE).read_bytes()
    assert FILE in json.loads((tmp_path / "bundle" / "sfexport.json").read_text())["files"]
    template_free = json.loads((tree.checkpoint / FILE).read_text())
    (checkpoint / FILE).write_text(json.dumps(template_free | {"normalizer": {"type": "NFKC"}}))
    said = refusal(tmp_path, "export", checkpoint, "-o", tmp_path / "bundle", after_steps=True)
    assert_says(said, "tokenizer.json", "'normalizer'", "transformers 5")


def test_marked_prompts_need_their_marks(files: Path) -> None:
    with pytest.raises(CheckpointError, match="'<im_start>'"):
        make_tokenizer(files, marked=True)
    set_fields(files / CONFIG, extra_special_tokens=["<im_start>", "<im_end>"])
    assert make_tokenizer(files, marked=True).token_to_id("<im_end>") == 504


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (SAME["padding"], "tokenizer.json: its truncation and padding not applied"),
        (SAME["stale added_tokens.json"], "added_tokens.json ignored"),
        (SAME["added tokens that the configuration lacks"], "<box>"),
        (SAME["spaces cleaned up"], "clean_up_tokenization_spaces"),
        (lambda d: (d / "vocab.json").write_text("{}"), "vocab.json ignored"),
        (lambda d: set_fields(d / CONFIG, colour="blue"), "unknown fields ignored: 'colour'"),
        (lambda d: (d / FILE).unlink(), "questions cannot be asked"),
        (lambda d: set_fields(d / CONFIG, auto_map={"a": "b"}), "questions cannot be asked .*auto_map"),
    ],
)
def test_what_is_ignored_is_said(change: Callable[[Path], Any], said: str, files: Path) -> None:
    import re

    assert tokenizer_notes(files) == []
    change(files)
    assert any(re.search(said, note) for note in tokenizer_notes(files)), tokenizer_notes(files)
