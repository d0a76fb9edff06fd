"""Make a tokenizers.Tokenizer out of a directory's files, with the ids that transformers 5 gives.

`make_tokenizer` works in this process; `write_tokenizer` in one of its own, since a damaged or hostile tokenizer.json
can end the process that reads it. Run as a program: DIRECTORY OUTPUT MARKED ROWS.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfexport.checkpoint.added_tokens import AGAIN, MERGES_FILE, TOKENIZER_FILE, VOCAB_FILE, AddedToken, text_of
from sfexport.checkpoint.tokenizer_files import (
    END,
    QWEN2_SPLIT,
    START,
    VIDEO_END,
    VIDEO_START,
    TokenizerFiles,
    read_tokenizer_files,
)
from sfexport.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SECONDS, MEMORY = 120, 8 << 30  # that reading a tokenizer may take
_SAMPLE = f"{START}user\nWhat happens in the video? 12 + 3 = \u00e9\u4e2d\U0001f600{END}\n{START}assistant\n"


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into a CheckpointError; its panics are no `Exception`s."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, InputError):
        raise
    except BaseException as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"{what} cannot be used: {reason[0][:200]}.", AGAIN) from None


def make_tokenizer(directory: Path, marked: bool = False, rows: int | None = None) -> Tokenizer:
    """Make the tokenizer of a checkpoint directory: no truncation, no padding, every control token one id.

    Args:
        marked: the prompt has <im_start> and <im_end> around the video.
        rows: number of rows of the model's token table, which control tokens must lie in; None: not checked.

    Raises:
        CheckpointError: there are no tokenizer files, they are damaged, or no tokenizer follows from them that
            transformers would make too.
    """
    directory = Path(directory)
    files = read_tokenizer_files(directory)
    with library_errors(f"The tokenizer in {directory}"):
        tokenizer = _qwen2(files) if files.qwen2 else _as_it_is(files)
        _check_ids(tokenizer, files)
        check_control_tokens(tokenizer, marked, rows)
        tokenizer.decode(tokenizer.encode(_SAMPLE, add_special_tokens=False).ids)
    return tokenizer


def check_control_tokens(tokenizer: Tokenizer, marked: bool, rows: int | None = None) -> None:
    """Check the prompt's control tokens. Raises CheckpointError for one that is not one id, or beyond the table."""
    for token in (START, END, *((VIDEO_START, VIDEO_END) if marked else ())):
        ids = tokenizer.encode(token, add_special_tokens=False).ids
        if len(ids) != 1 or ids[0] != tokenizer.token_to_id(token):
            raise CheckpointError(
                f"The tokenizer does not know the control token {token!r} of the prompt: it makes {len(ids)} tokens "
                "of it.",
                "It must stand in tokenizer.json's or tokenizer_config.json's added tokens; the tokenizer may belong "
                "to another model.",
            )
        if rows is not None and ids[0] >= rows:
            raise CheckpointError(
                f"The control token {token!r} has the id {ids[0]}, and the model's table of tokens has {rows} rows.",
                "The tokenizer belongs to another model.",
            )


def _qwen2(files: TokenizerFiles) -> Tokenizer:
    """Build Qwen2Tokenizer by transformers 5's steps, with the vocabulary, merges and added tokens of the files."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary, merges = _vocabulary(files)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False))
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=files.config.add_prefix_space, use_regex=False),
        ]
    )
    _check_post_processor(files)
    _add_tokens(tokenizer, files)
    special = dict.fromkeys(text_of(token) for token in (*files.tokens.named.values(), *files.tokens.extra))
    tokenizer.add_tokens([_library_token(AddedToken(text, special=True)) for text in special])
    return tokenizer


def _vocabulary(files: TokenizerFiles) -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers.models import BPE

    if files.content is None:
        vocabulary, pairs = BPE.read_file(str(files.directory / VOCAB_FILE), str(files.directory / MERGES_FILE))
        return vocabulary, pairs
    model = files.content["model"]
    merges: list[Any] = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
    return model["vocab"], merges


def _as_it_is(files: TokenizerFiles) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(files.content))
    if tokenizer.post_processor is not None:
        _refuse_added_ids(tokenizer)
    _add_tokens(tokenizer, files)
    return tokenizer


def _check_post_processor(files: TokenizerFiles) -> None:
    """Refuse a post-processor, or bos and eos settings, that add tokens to every text."""
    from tokenizers import Tokenizer

    if files.content is not None and files.content.get("post_processor") is not None:
        empty = {**files.content["model"], "vocab": {}, "merges": []}
        _refuse_added_ids(Tokenizer.from_str(json.dumps({**files.content, "model": empty, "added_tokens": []})))
    for name in ("bos", "eos"):  # read by transformers only where there is no tokenizer.json
        if (
            files.content is None
            and getattr(files.config, f"add_{name}_token")
            and files.tokens.named.get(f"{name}_token")
        ):
            raise CheckpointError(
                f"tokenizer_config.json: 'add_{name}_token' adds a token to every text, and the prompt has none.",
                "The tokenizer may belong to another model.",
            )


def _refuse_added_ids(tokenizer: Tokenizer) -> None:
    if tokenizer.num_special_tokens_to_add(False):
        raise CheckpointError(
            f"{TOKENIZER_FILE}: its 'post_processor' adds tokens to every text, and the prompt has none.",
            "The tokenizer may belong to another model.",
        )


def _add_tokens(tokenizer: Tokenizer, files: TokenizerFiles) -> None:
    """Add what the tokenizer lacks, in transformers' order: by stated id, then named tokens, then extra ones."""
    present = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    tokens = [_library_token(token) for token in files.tokens.by_id.values()]
    tokens = [token for token in tokens if repr(token) not in present]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | {t.content for t in tokens}
    roles = {text_of(token) for token in files.tokens.named.values()}
    for value in (*files.tokens.named.values(), *files.tokens.extra):
        if text_of(value) not in known:
            known.add(text_of(value))
            tokens.append(_library_token(AddedToken(value, special=True) if isinstance(value, str) else value))
    for token in tokens:
        if token.content in roles and not token.special:
            token.special = True
    if tokens:
        tokenizer.add_tokens(tokens)


def _library_token(token: AddedToken) -> Any:
    import tokenizers

    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "special")}
    if token.normalized is not None:
        flags["normalized"] = token.normalized
    return tokenizers.AddedToken(token.content, **flags)


def _check_ids(tokenizer: Tokenizer, files: TokenizerFiles) -> None:
    """Refuse ids with gaps, twice the same, or other than those that the files state."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise CheckpointError(
            f"The tokenizer in {files.directory} has {len(vocabulary):,} tokens, and their ids are not 0 to "
            f"{len(vocabulary) - 1:,}, each once.",
            AGAIN,
        )
    for file, text, id_ in files.tokens.stated:
        if text in vocabulary and vocabulary[text] != id_:
            raise CheckpointError(
                f"{file} gives the token {text!r} the id {id_}, and the tokenizer makes {vocabulary[text]} of it.",
                AGAIN,
            )


def write_tokenizer(directory: Path, output: Path, marked: bool = False, rows: int | None = None) -> None:
    """Make a directory's tokenizer in a process of its own and write it as one tokenizer.json.

    Raises:
        CheckpointError: as `make_tokenizer`; or the process crashed, or took too long or too much memory.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    command = [
        sys.executable,
        "-m",
        "sfexport.checkpoint.tokenizer_making",
        str(directory),
        str(output),
        str(int(marked)),
        str(rows or 0),
    ]
    try:
        run = subprocess.run(command, env=environment, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"The tokenizer in {directory} is not read within {SECONDS} seconds, so it cannot be used.", AGAIN
        ) from None
    if run.returncode == 2:
        raise CheckpointError(*json.loads(run.stdout.splitlines()[-1]))
    if run.returncode != 0 or not output.is_file():
        last = (run.stderr.decode(errors="replace").split("\n")[-2:] or [""])[0][:200]
        raise CheckpointError(
            f"The tokenizer in {directory} ends the process that reads it (exit status {run.returncode}; "
            f"{ascii(last)}), so it cannot be used.",
            AGAIN,
        )


def main(arguments: list[str]) -> int:
    """Write OUTPUT from DIRECTORY; print what is wrong as JSON and return 2 where that cannot be."""
    directory, output, marked, rows = arguments
    _limit_memory()
    try:
        text = make_tokenizer(Path(directory), marked == "1", int(rows) or None).to_str()
    except InputError as error:
        print(json.dumps([str(error), error.hint]))
        return 2
    Path(output).write_text(text, encoding="utf-8")
    return 0


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
