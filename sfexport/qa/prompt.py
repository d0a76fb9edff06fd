"""The prompt (`qwen_1_5` template of the reference) and the checkpoint's tokenizer. Imports tokenizers lazily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfexport.errors import BundleError, InputError

VIDEO = "<image>"  # stands for the whole video in the template
SYSTEM = "You are a helpful assistant."
START, END = "<|im_start|>", "<|im_end|>"


def build_prompt(
    question: str, rounds: Sequence[tuple[str, str]] = (), video: bool = True, marked: bool = False
) -> str:
    """The template's text for a question after earlier (question, answer) rounds.

    Args:
        video: put the video before the first question.
        marked: wrap it in <im_start> <im_end>, for checkpoints with mm_use_im_start_end.
    """
    image = f"<im_start>{VIDEO}<im_end>" if marked else VIDEO
    turns = [*rounds, (question, None)]
    text = f"{START}system\n{SYSTEM}{END}\n"
    for i, (asked, answer) in enumerate(turns):
        head = f"{image}\n" if video and i == 0 else ""
        text += f"{START}user\n{head}{asked}{END}\n{START}assistant\n"
        text += "" if answer is None else f"{answer}{END}\n"
    return text


@dataclass(frozen=True)
class PromptIds:
    """Token ids around the video."""

    before: list[int]
    after: list[int]


class ChatTokenizer:
    """The checkpoint's tokenizer.json. Each side of the video is tokenised by itself, as in the reference."""

    def __init__(self, tokenizer: Any, marked: bool = False) -> None:
        self._tokenizer, self._marked = tokenizer, marked

    @classmethod
    def load(cls, directory: Path, config: dict[str, Any]) -> ChatTokenizer:
        """Raises BundleError if there is no tokenizer.json, or one that cannot be read."""
        from tokenizers import Tokenizer

        file = directory / "tokenizer.json"
        if not file.is_file():
            raise BundleError(
                f"{directory} has no tokenizer.json, so questions cannot be tokenised.",
                "Put the model's tokenizer.json into the checkpoint and export again.",
            )
        try:
            return cls(Tokenizer.from_file(str(file)), bool(config.get("mm_use_im_start_end")))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{file} cannot be read: {error}.") from None

    @property
    def vocabulary_size(self) -> int:
        """Ids this tokenizer can decode; a model's table may be padded beyond."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Raises InputError for a text that is not Unicode (bytes from a command line that are not UTF-8)."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"The text {ascii(text)} is not valid UTF-8.", "Type it in a UTF-8 terminal.") from None
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, question: str) -> PromptIds:
        """Raises InputError for an empty question or one that contains the video's placeholder."""
        if not question.strip():
            raise InputError("The question is empty.", "Pass one with -q 'What happens in the video?'.")
        if VIDEO in question:
            raise InputError(
                f"The question contains {VIDEO!r}, which stands for the video in the prompt.", "Reword it."
            )
        before, after = build_prompt(question, marked=self._marked).split(VIDEO)
        return PromptIds(self.encode(before), self.encode(after))

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_id(self, text: str) -> int:
        """The id of a text that is exactly one token; InputError otherwise."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise InputError(
                f"The stop text {text!r} is {len(ids)} tokens; it must be exactly one.", "Choose another --stop."
            )
        return ids[0]

    def end_of_turn(self) -> int | None:
        return self._tokenizer.token_to_id(END)
