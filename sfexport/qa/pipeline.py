"""Encode a video with engines into a session; frames are read and prepared while earlier ones are encoded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sfexport.artifacts.engines import Engines
from sfexport.checkpoint.added_tokens import TOKENIZER_FILE
from sfexport.checkpoint.config_fields import MAX_FRAMES
from sfexport.checkpoint.fast_path import fast_token_count
from sfexport.engines.build import check_runtime, open_backend
from sfexport.engines.embedding import EmbeddingTable
from sfexport.engines.interface import VISION_CHUNK, Backend
from sfexport.errors import InputError
from sfexport.fields import shown
from sfexport.qa.generation import GenerationOptions
from sfexport.qa.prompt import ChatTokenizer
from sfexport.qa.video_session import Stopwatch, VideoSession, check_question
from sfexport.values import as_path, whole_number
from sfexport.video.arrays import MemoryFrames
from sfexport.video.decoding import Video, check_decoder
from sfexport.video.preprocessing import preprocess
from sfexport.video.sampling import check_seek_mode, sample_indices

OnFrames = Callable[[int, int], None]


class Pipeline:
    """Loaded engines: `Pipeline.load(engines)`, then `encode(video)`, then `session.ask(question)`."""

    def __init__(self, engines: Engines, tokenizer: ChatTokenizer) -> None:
        self.engines, self.bundle, self.tokenizer = engines, engines.bundle, tokenizer
        self.embedding = EmbeddingTable(engines.bundle.embedding())

    @classmethod
    def load(cls, engines: str | Path) -> Pipeline:
        """Open an engine directory; the engines are loaded at first use.

        Raises:
            BundleError: the directory is not usable here.
        """
        opened = Engines.open(as_path(engines, "An engine directory"))
        check_runtime(opened)
        marked = bool(opened.bundle.raw_config.get("mm_use_im_start_end"))
        return cls(opened, ChatTokenizer.from_file(opened.bundle.path / TOKENIZER_FILE, marked))

    @cached_property
    def backend(self) -> Backend:
        """The backend, loaded at first use, so that a bad video or question is found before a long load."""
        return open_backend(self.engines)

    def generation_options(self) -> GenerationOptions:
        """Return the checkpoint's default generation options."""
        config, own = self.bundle.generation_config(), self.bundle.raw_config.get("eos_token_id")
        # transformers reads config.json's end tokens only if there is no generation_config.json.
        options = GenerationOptions.from_config(config, self.tokenizer.end_of_turn(), own if not config else None)
        options.check_tokens(self.tokenizer.vocabulary_size)
        return options

    def read_frames(
        self, video: Any, frames: int | None, sampling: str, seek: str = "exact"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read all sampled frames at once, for comparisons.

        Args:
            video, frames, sampling, seek: as in `encode`.

        Returns:
            Pixels of the distinct frames, float32 [n, 3, S, S], and each sampled frame's row among them.
        """
        self.frame_count(frames)
        with open_video(video) as opened:
            unique, rows = self._sample(opened, frames, sampling, seek)
            return preprocess(list(opened.frames(unique, seek)), self.bundle.image), rows

    def encode(
        self,
        video: Any,
        frames: int | None = None,
        sampling: str = "linspace",
        questions: Sequence[str] = (),
        on_frames: OnFrames = lambda done, total: None,
        fps: float | None = None,
        control_tokens: bool = False,
        seek: str = "exact",
        decoder: str = "pyav",
    ) -> VideoSession:
        """Encode a video (or a picture: one frame).

        Args:
            video: a file's path (str or Path) or file:// URL, '-' for a file on standard input, or a folder of
                pictures, which are its frames in the order of their names; or frames in memory, all uint8 RGB: an
                array [T, H, W, 3] (for a picture [H, W, 3]), a list of arrays [H, W, 3] or of PIL images (for a
                picture one PIL image), or a tensor of these shapes with `__dlpack__`. Of a tensor on a GPU the
                sampled frames are copied, with its own `.cpu()`.
            frames: number of frames to sample, from memory as from a file; default the bundle's.
            sampling: 'linspace' (the reference's demo) or 'eval' (its evaluation).
            questions: questions that are checked to fit before any frame is encoded.
            on_frames: called with the number of frames encoded so far, and of all frames.
            fps: frames per second of frames in memory or in a folder, which 'eval' sampling needs to know.
            control_tokens: as in VideoSession.ask, for the check of `questions`.
            seek: 'exact' decodes the sampled frames; 'keyframe' takes the keyframe nearest in time to each, which may
                repeat, and decodes keyframes only (video files only). `session.frame_times` has the times taken.
            decoder: 'pyav', or 'gstreamer' (exact, clips only), which uses a board's hardware decoder if it has one.

        Raises:
            VideoError: the file cannot be read, or the object in memory is not frames of this kind.
            InputError: a question is empty or does not fit, or a number has no meaning.
        """
        watch = Stopwatch()
        _check_is_list(questions)
        self.frame_count(frames)  # a wrong number is found before the file is opened
        with open_video(video, fps, decoder) as opened:
            unique, rows = self._sample(opened, frames, sampling, seek)
            times = opened.times(unique)
            for question in questions:
                self.check_question(question, len(rows), control_tokens)
            with watch.stage("load"):
                backend = self.backend
            chunks = _timed(self._pixel_chunks(opened, unique, seek), watch)
            encoded = _encode_chunks(backend, chunks, len(rows) == 1, lambda done: on_frames(done, len(unique)), watch)
        with watch.stage("compress"):
            fast, slow = backend.compress(encoded[rows])  # frames may repeat: each is encoded once
        return VideoSession(
            backend,
            self.tokenizer,
            self.embedding,
            fast,
            slow,
            defaults=self.generation_options,
            frames=len(rows),
            frame_times=None if times is None else [times[row] for row in rows],
            frames_encoded=len(unique),
            watch=watch,
        )

    def check_question(self, question: str, frames: int, control_tokens: bool = False) -> None:
        """Raise InputError for a question that is empty or does not fit after `frames` sampled frames."""
        config = self.bundle.config
        cells = self.bundle.tokens_per_frame(single_image=frames == 1)
        fast_tokens = fast_token_count(frames, cells, config.slow_fast.fast)
        check_question(question, self.tokenizer, fast_tokens, config.text, control_tokens)

    def _sample(self, video: Video, frames: int | None, sampling: str, seek: str) -> tuple[list[int], np.ndarray]:
        """Choose frames: return the distinct indices, and each sampled frame's place among them."""
        check_seek_mode(seek)
        count = self.frame_count(frames)
        info = video.info
        if sampling == "eval" and math.isnan(info.fps):
            raise InputError("Sampling 'eval' needs the rate of the frames, which is not known.", "Pass fps=...")
        # A picture is one image, as in training; a clip of one frame repeats it.
        count = 1 if info.is_picture else count
        indices = sample_indices(sampling, info.frame_count, info.fps, count)
        self.check_frames(len(indices))
        if seek == "keyframe":
            indices = video.nearest_keyframes(indices)
        unique, rows = np.unique(indices, return_inverse=True)
        return unique.tolist(), rows

    def frame_count(self, frames: int | None) -> int:
        """Check a number of frames and return it; None: the bundle's default.

        Raises:
            InputError: the number is not a whole number from 1 to MAX_FRAMES.
        """
        count = self.bundle.frames if frames is None else frames
        return whole_number(count, "The number of frames", maximum=MAX_FRAMES, hint="Change --frames.")

    def check_frames(self, frames: int) -> None:
        """Raise InputError for more frames than the model or the engines take with the shortest question."""
        config, limits = self.bundle.config, self.engines.content.get("limits")
        largest = limits.get("frames") if isinstance(limits, dict) else None
        if isinstance(largest, int) and frames > largest:
            raise InputError(
                f"The engines take at most {largest} frames of a video, not {frames}.",
                f"Use fewer (--frames), or build again with --frames {frames}.",
            )
        if config.text.max_length is None:
            return
        cells = self.bundle.tokens_per_frame(single_image=frames == 1)
        fast_tokens, ids = fast_token_count(frames, cells, config.slow_fast.fast), self.tokenizer.prompt("?")
        total = len(ids.before) + fast_tokens + len(ids.after)
        if total > config.text.max_length:
            raise InputError(
                f"The video does not fit: {frames} frames make {fast_tokens} tokens, {total} with the shortest "
                f"question, and the model takes {config.text.max_length}.",
                "Use fewer frames (--frames).",
            )

    def _pixel_chunks(self, video: Video, indices: list[int], seek: str) -> Iterator[np.ndarray]:
        """Yield preprocessed chunks; the next one is read while the caller works on the last."""
        frames = video.frames(indices, seek)

        def read(count: int) -> np.ndarray:
            return preprocess([next(frames) for _ in range(count)], self.bundle.image)

        sizes = [min(VISION_CHUNK, len(indices) - i) for i in range(0, len(indices), VISION_CHUNK)]
        with ThreadPoolExecutor(max_workers=1) as pool:
            pending = pool.submit(read, sizes[0])
            for size in sizes[1:]:
                chunk = pending.result()
                pending = pool.submit(read, size)
                yield chunk
            yield pending.result()


def open_video(video: Any, fps: float | None = None, decoder: str = "pyav") -> Video:
    """Open a path's file, or frames in memory (see `Pipeline.encode`).

    Raises:
        VideoError, InputError: as `Pipeline.encode`.
    """
    if not isinstance(video, (str, os.PathLike)):
        check_decoder(decoder, "Frames in memory")
        return Video(MemoryFrames(video, fps))
    return Video.open(video, fps, decoder)


def _check_is_list(questions: object) -> None:
    if isinstance(questions, (str, bytes)) or not isinstance(questions, Sequence):
        raise InputError(f"questions is a list of questions, not {shown(questions)}.", "Pass [question].")


def _encode_chunks(
    backend: Backend,
    chunks: Iterator[np.ndarray],
    single_image: bool,
    on_encoded: Callable[[int], None],
    watch: Stopwatch,
) -> np.ndarray:
    """Encode chunks of frames to slow tokens, and charge the time to the 'vision' stage."""
    encoded: list[np.ndarray] = []
    for pixels in chunks:
        with watch.stage("vision"):
            encoded.append(backend.encode_frames(pixels, single_image=single_image))
        on_encoded(sum(map(len, encoded)))
    return np.concatenate(encoded)


def _timed(chunks: Iterator[np.ndarray], watch: Stopwatch) -> Iterator[np.ndarray]:
    """Charge the time spent waiting for frames to the 'video' stage."""
    while True:
        with watch.stage("video"):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk
