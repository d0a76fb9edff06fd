"""The prompt (`qwen_1_5` template of the reference) and the checkpoint's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfexport.checkpoint.tokenizer_files import END, START, VIDEO_END, VIDEO_START
from sfexport.checkpoint.tokenizer_making import check_control_tokens, library_errors, make_tokenizer
from sfexport.errors import BundleError, CheckpointError, InputError
from sfexport.fields import shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VIDEO = "<image>"  # stands for the whole video in the template
SYSTEM = "You are a helpful assistant."
MAX_QUESTION = 1_000_000  # characters; more than any model has positions for, and 3 seconds to tokenise


def build_prompt(question: str, marked: bool = False) -> str:
    """Return the template's text for a question about a video.

    Args:
        marked: wrap the video in <im_start> <im_end>, for checkpoints with mm_use_im_start_end.
    """
    video = f"{VIDEO_START}{VIDEO}{VIDEO_END}" if marked else VIDEO
    return f"{START}system\n{SYSTEM}{END}\n{START}user\n{video}\n{question}{END}\n{START}assistant\n"


@dataclass(frozen=True)
class PromptIds:
    """Token ids around the video."""

    before: list[int]
    after: list[int]


class ChatTokenizer:
    """The checkpoint's tokenizer. Each side of the video is tokenised by itself, as in the reference."""

    def __init__(self, tokenizer: Tokenizer, marked: bool = False) -> None:
        self._tokenizer, self._marked = tokenizer, marked
        # Padding and truncation are not applied, as in transformers.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        added = tokenizer.get_added_tokens_decoder()
        self._control_ids = frozenset(id_ for id_, token in added.items() if token.special)

    @classmethod
    def load(cls, directory: Path, config: dict[str, Any]) -> ChatTokenizer:
        """Make the tokenizer of a checkpoint directory. Raises CheckpointError if its files cannot be used."""
        marked = bool(config.get("mm_use_im_start_end"))
        return cls(make_tokenizer(directory, marked), marked)

    @classmethod
    def from_file(cls, file: Path, marked: bool = False) -> ChatTokenizer:
        """Read the tokenizer.json that `export` wrote. Raises BundleError if there is none or it cannot be used."""
        from tokenizers import Tokenizer

        if not file.is_file():
            raise BundleError(
                f"{file.parent} has no {file.name}, so questions cannot be tokenised.",
                "Put the model's tokenizer files into the checkpoint and export again.",
            )
        try:
            with library_errors(str(file)):
                out = cls(Tokenizer.from_file(str(file)), marked)
                check_control_tokens(out._tokenizer, marked)
        except CheckpointError as error:
            raise BundleError(str(error), error.hint) from None
        return out

    @property
    def vocabulary_size(self) -> int:
        """Number of ids that this tokenizer can decode; a model's table may have more rows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Encode a text of the template; control tokens in it become control ids.

        Raises InputError for a text that is not Unicode (bytes from a command line that are not UTF-8).
        """
        return _encode(self._tokenizer, text)

    def prompt(self, question: str, control_tokens: bool = False) -> PromptIds:
        """Encode the prompt of a question: the ids before and after the video.

        Args:
            control_tokens: let control tokens typed in the question act as such, as the reference does; otherwise
                they are encoded as the text that they are.

        Raises:
            InputError: the question is empty, very long, or contains the video's placeholder.
        """
        if not isinstance(question, str):
            raise InputError(f"A question is a str, not a {type(question).__name__}.", "Ask one after the other.")
        if not question.strip():
            raise InputError("The question is empty.", "Pass one with -q 'What happens in the video?'.")
        if len(question) > MAX_QUESTION:
            raise InputError(
                f"The question has {len(question):,} characters; at most {MAX_QUESTION:,} are taken.",
                "Ask a shorter question.",
            )
        if VIDEO in question:
            raise InputError(
                f"The question contains {VIDEO!r}, which stands for the video in the prompt.", "Reword it."
            )
        before, after = build_prompt(question, marked=self._marked).split(VIDEO)
        ids = self.encode(after)
        if not control_tokens and self._controls(ids) != self._own_controls:
            ids = self._encode_as_text(question, after)
        return PromptIds(self.encode(before), ids)

    def _controls(self, ids: Sequence[int]) -> list[int]:
        return [id_ for id_ in ids if id_ in self._control_ids]

    @cached_property
    def _own_controls(self) -> list[int]:
        """The control ids that the template itself has after the video."""
        return self._controls(self.encode(build_prompt("", marked=self._marked).split(VIDEO)[1]))

    def _encode_as_text(self, question: str, after: str) -> list[int]:
        """Encode what follows the video, the question's control tokens as text."""
        head, tail = after.rsplit(question, 1)
        opening = VIDEO_END if self._marked else ""
        ids = _encode(self._text_tokenizer, head.removeprefix(opening) + question)
        if found := self._controls(ids):
            raise InputError(
                f"The question contains {self._tokenizer.id_to_token(found[0])!r}, a control token that this "
                "tokenizer cannot take as text.",
                "Reword it.",
            )
        return [*self.encode(opening), *ids, *self.encode(tail)]

    @cached_property
    def _text_tokenizer(self) -> Tokenizer:
        """A copy that encodes control tokens as text; a copy, because threads share the tokenizer."""
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def decode(self, ids: Sequence[int]) -> str:
        with library_errors("The tokenizer"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_id(self, text: str) -> int:
        """Return the id of a text that is exactly one token. Raises InputError for another text."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise InputError(
                f"The stop text {text!r} is {len(ids)} tokens; it must be exactly one.", "Choose another --stop."
            )
        return ids[0]

    def end_of_turn(self) -> int | None:
        return self._tokenizer.token_to_id(END)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"The text {shown(text)} is not valid UTF-8.", "Type it in a UTF-8 terminal.") from None
    with library_errors("The tokenizer"):
        return tokenizer.encode(text, add_special_tokens=False).ids
