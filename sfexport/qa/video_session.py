"""Answer questions about one video: the video is computed once, and each question costs its own tokens only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from sfexport.checkpoint.config import Attending, DecodeMode, TextConfig
from sfexport.engines.embedding import EmbeddingTable
from sfexport.engines.interface import Backend, DecoderStep, KeyValues
from sfexport.errors import InputError
from sfexport.qa.generation import GenerationOptions, Sampler
from sfexport.qa.prompt import ChatTokenizer

OnText = Callable[[str], None]
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
        frames_encoded: int = 0,
        watch: Stopwatch | None = None,
    ) -> None:
        """Prefill the part of the prompt that is the same for every question.

        Args:
            fast: fast tokens, float32 [fast tokens, H].
            slow: slow K/V of the hybrid layers; None for a model without a slow branch.
            defaults: returns the options for questions that are asked without any.
            frames: number of frames sampled from the video.
            frames_encoded: number of them that went through the vision encoder.
            watch: seconds spent on the video so far.
        """
        watch = watch or Stopwatch()
        self._backend, self._tokenizer, self._embedding = backend, tokenizer, embedding
        self._attends, self._slow, self._defaults = backend.config.slow_fast.attends, slow, defaults
        self.frames, self.fast_tokens, self.slow_tokens = frames, len(fast), slow.length if slow else 0
        with watch.stage("prefix"):
            self._prefix = self._prefill_prefix(fast)
        self._pending = _Pending(self._prefix.length, frames_encoded, dict(watch.seconds))

    def _prefill_prefix(self, fast: np.ndarray) -> KeyValues:
        """Compute the K/V of the text before the video and of the fast tokens, which all questions share."""
        before = self._tokenizer.prompt("?").before
        text = self._embedding(before)
        _, past = self._step(text, None, attends=self._attends != Attending.TEXT_AFTER_VIDEO)
        # Visual positions attend in few models; in the others this call gets no slow tokens.
        _, past = self._step(fast, past, attends=self._attends == Attending.ALL)
        return past

    def _step(self, embeds: np.ndarray, past: KeyValues | None, attends: bool) -> tuple[np.ndarray, KeyValues]:
        step = DecoderStep(
            inputs_embeds=embeds[None],
            start=past.length if past else 0,
            slow_attends=np.full(len(embeds), attends),
            past=past,
            slow=self._slow if attends else None,
        )
        return self._backend.decode(step)

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
        ids = check_question(question, self._tokenizer, self.fast_tokens, config.text, control_tokens)
        sampler = Sampler(options, self._prefix.length + len(ids))
        watch = Stopwatch()
        with watch.stage("prefill"):
            logits, past = self._step(self._embedding(ids), self._prefix, attends=True)
        with watch.stage("decode"):
            new = self._generate(
                logits, past, sampler, decode_mode == DecodeMode.TRAINED, on_text or (lambda text: None)
            )
        return self._answer(question, ids, new, options, watch)

    def _answer(
        self, question: str, prompt: list[int], new: list[int], options: GenerationOptions, watch: Stopwatch
    ) -> Answer:
        encoding, self._pending = self._pending, _Pending(0, 0, dict.fromkeys(STAGES, 0.0))
        return Answer(
            question=question,
            answer=self._tokenizer.decode([i for i in new if i not in options.stop_ids]).strip(),
            ids=new,
            prefill_tokens=encoding.prefill_tokens + len(prompt),
            new_tokens=len(new),
            frames_encoded=encoding.frames_encoded,
            seconds={s: round(encoding.seconds[s] + watch.seconds[s], 6) for s in STAGES},
        )

    def _generate(
        self, logits: np.ndarray, past: KeyValues, sampler: Sampler, attends: bool, on_text: OnText
    ) -> list[int]:
        """Generate token ids, up to and including a stop token."""
        stream = _TextStream(self._tokenizer, on_text)
        while True:
            # Logits beyond the tokenizer's vocabulary are padding, which the reference cuts off on loading.
            token = sampler.next(logits[: self._tokenizer.vocabulary_size])
            if token in sampler.options.stop_ids:
                break
            stream.add(token)
            if len(sampler.ids) >= sampler.limit:
                break
            logits, past = self._step(self._embedding([token]), past, attends)
        stream.close()
        return sampler.ids


@dataclass
class _TextStream:
    """Turns token ids into pieces of text, and holds back bytes that do not form a character yet."""

    tokenizer: ChatTokenizer
    on_text: OnText
    ids: list[int] = field(default_factory=list)
    sent: int = 0

    def add(self, token: int) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._send(text)

    def close(self) -> None:
        self._send(self.tokenizer.decode(self.ids))

    def _send(self, text: str) -> None:
        if len(text) > self.sent:
            self.on_text(text[self.sent :])
            self.sent = len(text)
