"""Answer questions about one video: the video is computed once, and each question costs its own tokens only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from sfexport.checkpoint.config import Attending, DecodeMode, TextConfig
from sfexport.engines.embedding import EmbeddingTable
from sfexport.engines.interface import Backend, DecoderStep, KeyValues
from sfexport.errors import InputError
from sfexport.qa.decoding import Decoder, OnText, Row, TextStream
from sfexport.qa.generation import GenerationOptions, Sampler
from sfexport.qa.prompt import ChatTokenizer
from sfexport.values import whole_number

DEFAULT_BATCH = 8  # questions that are decoded together
# load: engines into memory. video: waiting for frames. vision, compress, prefix: once per video. prefill: the
# question's own tokens. decode: the answer's tokens.
STAGES = ("load", "video", "vision", "compress", "prefix", "prefill", "decode")


class Stopwatch:
    """Measures seconds by stage; a stage that is entered again adds to its seconds."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


@dataclass(frozen=True)
class Answer:
    """One answered question.

    Attributes:
        answer: the answer's text.
        ids: ids of the generated tokens.
        prefill_tokens: number of positions prefilled; for a session's first question with the video's prefix.
        new_tokens: number of tokens generated.
        frames_encoded: number of frames that went through the vision encoder (0 from the second question on).
        seconds: seconds by stage, see STAGES.
    """

    question: str
    answer: str
    ids: list[int]
    prefill_tokens: int
    new_tokens: int
    frames_encoded: int
    seconds: dict[str, float]

    def __str__(self) -> str:
        return self.answer


@dataclass
class _Pending:
    """Costs of encoding the video, which the first question's answer reports."""

    prefill_tokens: int
    frames_encoded: int
    seconds: dict[str, float]


def check_question(
    question: str, tokenizer: ChatTokenizer, fast_tokens: int, text: TextConfig, control_tokens: bool = False
) -> list[int]:
    """Check that a question fits after the video, and return its token ids (all that follows the video).

    Args:
        fast_tokens: number of fast tokens of the video.
        text: the decoder's config.
        control_tokens: see ChatTokenizer.prompt.

    Raises:
        InputError: the question is empty, does not fit after the video, or has a token that the model lacks.
    """
    ids, limit = tokenizer.prompt(question, control_tokens), text.max_length
    if (largest := max(ids.before + ids.after)) >= text.vocab_size:
        raise InputError(
            f"The prompt has the token id {largest}, and the model's table of tokens has {text.vocab_size} rows.",
            "The tokenizer belongs to another model, or the question has a token that was added to it later.",
        )
    before, after = len(ids.before), len(ids.after)
    total = before + fast_tokens + after
    if limit is not None and total > limit:
        raise InputError(
            f"The question does not fit: {before} tokens before the video, {fast_tokens} of the video and {after} of "
            f"the question make {total}, and the model takes {limit}.",
            "Ask a shorter question or use fewer frames (--frames).",
        )
    return ids.after


class VideoSession:
    """Answers questions about one video; `Pipeline.encode` makes it.

    Attributes:
        frames: number of frames sampled from the video.
        frames_encoded: number of different frames among them, which went through the vision encoder.
        frame_times: times of these frames in seconds after the clip's first one, ascending; None: unknown.
        fast_tokens: number of fast tokens.
        slow_tokens: number of slow tokens.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: ChatTokenizer,
        embedding: EmbeddingTable,
        fast: np.ndarray,
        slow: KeyValues | None,
        *,
        defaults: Callable[[], GenerationOptions] = GenerationOptions,
        frames: int = 0,
        frame_times: list[float] | None = None,
        frames_encoded: int = 0,
        watch: Stopwatch | None = None,
    ) -> None:
        """Prefill the part of the prompt that is the same for every question.

        Args:
            fast: fast tokens, float32 [fast tokens, H].
            slow: slow K/V of the hybrid layers; None for a model without a slow branch.
            defaults: returns the options for questions that are asked without any.
            frames: number of frames sampled from the video.
            frame_times: see the attribute.
            frames_encoded: number of them that went through the vision encoder.
            watch: seconds spent on the video so far.
        """
        watch = watch or Stopwatch()
        self._backend, self._tokenizer, self._embedding = backend, tokenizer, embedding
        self._attends, self._slow, self._defaults = backend.config.slow_fast.attends, slow, defaults
        self.frame_times, self.frames_encoded = frame_times, frames_encoded
        self.frames, self.fast_tokens, self.slow_tokens = frames, len(fast), slow.length if slow else 0
        with watch.stage("prefix"):
            self._prefix = self._prefill_prefix(fast)
        self._pending = _Pending(self._prefix.length, frames_encoded, dict(watch.seconds))

    def _prefill_prefix(self, fast: np.ndarray) -> KeyValues:
        """Compute the K/V of the text before the video and of the fast tokens, which all questions share."""
        before = self._tokenizer.prompt("?").before
        text = self._embedding(before)
        _, first = self._prefill(text, None, attends=self._attends != Attending.TEXT_AFTER_VIDEO)
        # Visual positions attend in few models; in the others this call gets no slow tokens.
        _, second = self._prefill(fast, first, attends=self._attends == Attending.ALL)
        return self._backend.join([first, second])

    def _prefill(self, embeds: np.ndarray, prefix: KeyValues | None, attends: bool) -> tuple[np.ndarray, KeyValues]:
        slow = self._slow if attends else None
        step = DecoderStep(embeds[None], np.full(len(embeds), attends), prefix, None, slow)
        logits, new = self._backend.decode(step)
        return logits[0], new

    def ask(
        self,
        question: str,
        options: GenerationOptions | None = None,
        mode: str | None = None,
        on_text: OnText | None = None,
        control_tokens: bool = False,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> Answer:
        """Answer a question; the returned object's `.answer` is the text.

        Args:
            options: how to generate; default the checkpoint's. The keywords below override its values.
            mode: 'released' or 'trained' (see DecodeMode); default the model's own.
            on_text: called with each new piece of the answer as it is generated.
            control_tokens: let control tokens typed in the question (`<|im_end|>`) act as such, as the reference
                does; by default they are encoded as text.
            max_new_tokens: largest number of tokens of the answer.
            temperature: 0 takes the most likely token; more samples.
            top_p, top_k, repetition_penalty, seed: see GenerationOptions.

        Raises:
            InputError: the question is empty or does not fit, the mode is unknown, or a number has no meaning.
        """
        return self.ask_many(
            [question],
            options,
            mode,
            None if on_text is None else lambda _, text: on_text(text) if text else None,
            control_tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )[0]

    def ask_many(
        self,
        questions: Iterable[str],
        options: GenerationOptions | None = None,
        mode: str | None = None,
        on_text: Callable[[int, str], None] | None = None,
        control_tokens: bool = False,
        *,
        batch: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> list[Answer]:
        """Answer questions together: they are decoded as rows of a batch, and each row stops by itself.

        The answers are those of `ask`, but where two tokens are equally likely up to rounding.

        Args:
            on_text: called with a question's index and each new piece of its answer; the last piece is empty.
            batch: largest number of questions that are decoded together; default 8, or what the engines take.

        The other arguments are those of `ask`.

        Raises:
            InputError: as `ask`, for any of the questions; one text in place of a list of them; or engines built for
                fewer rows than `batch`.
        """
        if isinstance(questions, str):
            raise InputError("ask_many takes a list of questions, not one text.", "Pass [question], or use ask.")
        questions = list(questions)
        options = (self._defaults() if options is None else options).override(
            temperature,
            max_new_tokens=max_new_tokens,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        config = self._backend.config
        decode_mode = DecodeMode.parse(mode) if mode else config.slow_fast.decode_mode
        prompts = [
            check_question(question, self._tokenizer, self.fast_tokens, config.text, control_tokens)
            for question in questions
        ]
        size, answers = self._batch_size(batch), list[Answer]()
        slow = self._slow if decode_mode == DecodeMode.TRAINED else None
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            streams = [_stream_to(on_text, start + i) for i in range(len(chunk))]
            rows, seconds = self._prefill_rows(chunk, options, streams)
            Decoder(self._backend, self._embedding, self._tokenizer, self._prefix, slow).run(rows)
            for question, ids, row, prefill in zip(questions[start:], chunk, rows, seconds, strict=False):
                answers.append(self._answer(question, ids, row, {"prefill": prefill, "decode": row.seconds}))
        return answers

    def _batch_size(self, batch: int | None) -> int:
        largest = self._backend.max_rows
        if batch is None:
            return DEFAULT_BATCH if largest is None else min(DEFAULT_BATCH, largest)
        whole_number(batch, "The batch", hint="Change --batch.")
        if largest is not None and batch > largest:
            raise InputError(
                f"The engines decode at most {largest} questions together, not {batch}.",
                f"Use --batch {largest} or less, or build the engines again with --max-batch {batch}.",
            )
        return batch

    def _prefill_rows(
        self, prompts: Sequence[list[int]], options: GenerationOptions, streams: Sequence[OnText]
    ) -> tuple[list[Row], list[float]]:
        """Prefill the questions, one after the other; return a row and the seconds of each."""
        rows, seconds = list[Row](), list[float]()
        for ids, on_text in zip(prompts, streams, strict=True):
            start = time.perf_counter()
            logits, new = self._prefill(self._embedding(ids), self._prefix, attends=True)
            sampler = Sampler(options, self._prefix.length + len(ids))
            rows.append(Row(logits, new, sampler, TextStream(self._tokenizer, on_text)))
            seconds.append(time.perf_counter() - start)
        return rows, seconds

    def _answer(self, question: str, prompt: list[int], row: Row, seconds: dict[str, float]) -> Answer:
        encoding, self._pending = self._pending, _Pending(0, 0, dict.fromkeys(STAGES, 0.0))
        new, stop_ids = row.sampler.ids, row.sampler.options.stop_ids
        return Answer(
            question=question,
            answer=self._tokenizer.decode([i for i in new if i not in stop_ids]).strip(),
            ids=new,
            prefill_tokens=encoding.prefill_tokens + len(prompt),
            new_tokens=len(new),
            frames_encoded=encoding.frames_encoded,
            seconds={s: round(encoding.seconds[s] + seconds.get(s, 0.0), 6) for s in STAGES},
        )


def _stream_to(on_text: Callable[[int, str], None] | None, index: int) -> OnText:
    """Return what takes one answer's text."""
    return (lambda text: None) if on_text is None else (lambda text: on_text(index, text))
