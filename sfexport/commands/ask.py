"""`sfexport ask`: answer questions about a video."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import sfexport
from sfexport import console
from sfexport.commands.common import DIRECTORY, MODES, json_option, with_examples


@with_examples(
    "sfexport ask ./engines clip.mp4 -q 'What happens in the video?'",
    "sfexport ask ./engines clip.mp4 -q 'Who is it?' -q 'Where?' --mode trained --json",
    "sfexport ask ./engines clip.mp4 -q 'What happens?' --seek keyframe",
    "sfexport ask ./engines clip.mp4 -q 'Describe it.' --temperature 0.7 --top-p 0.9 --seed 1",
)
@click.command()
@click.argument("engines", type=DIRECTORY)
@click.argument("video")
@click.option("-q", "--question", "questions", multiple=True, required=True, help="A question; may be repeated.")
@click.option(
    "--mode",
    type=MODES,
    help="Whether answer tokens attend to slow tokens (trained) or not (released).  [default: the model's]",
)
@click.option("--frames", type=int, help="Frames sampled from the video.  [default: the bundle's]")
@click.option(
    "--sampling",
    type=click.Choice(["linspace", "eval"]),
    default="linspace",
    show_default=True,
    help="Frame sampling rule.",
)
@click.option(
    "--seek",
    type=click.Choice(["exact", "keyframe"]),
    default="exact",
    show_default=True,
    help="Decode the sampled frames (exact), or their nearest keyframes and nothing else (keyframe: faster; video "
    "files only).",
)
@click.option(
    "--decoder",
    type=click.Choice(["pyav", "gstreamer"]),
    default="pyav",
    show_default=True,
    help="What decodes a clip; gstreamer uses a board's hardware decoder if there is one, and needs python3-gi.",
)
@click.option("--max-new-tokens", type=int, help="Length limit of an answer.  [default: the checkpoint's, else 256]")
@click.option("--temperature", type=float, help="Sampling temperature; 0 is greedy.  [default: the checkpoint's]")
@click.option(
    "--top-k",
    type=int,
    help="Sample among the k most likely tokens only; 0: all.  [default: the checkpoint's, else 50]",
)
@click.option("--top-p", type=float, help="Sample among the most likely tokens of this total probability only.")
@click.option("--repetition-penalty", type=float, help="Above 1 makes repeated tokens less likely.")
@click.option("--batch", type=int, help="Maximum questions decoded together.  [default: 8, or the engines' maximum]")
@click.option("--seed", type=int, help="Seed that makes sampling repeatable.")
@click.option("--stop", multiple=True, help="An additional token that ends the answer; may be repeated.")
@click.option(
    "--control-tokens",
    is_flag=True,
    help="Read control tokens typed in a question (<|im_end|>) as control tokens, as in the reference.  "
    "[default: as text]",
)
@json_option
def ask(
    engines: Path,
    video: str,
    questions: tuple[str, ...],
    mode: str | None,
    frames: int | None,
    sampling: str,
    seek: str,
    decoder: str,
    stop: tuple[str, ...],
    control_tokens: bool,
    batch: int | None,
    as_json: bool,
    **generation: Any,
) -> None:
    """Answer questions about a VIDEO with ENGINES. The video is encoded once for all questions.

    VIDEO is a file (a clip or a picture), a directory of pictures that are its frames, or - for a file on standard
    input.
    """
    pipeline = sfexport.load(engines)
    options = pipeline.generation_options().override(**generation)
    stops = {pipeline.tokenizer.token_id(text) for text in stop}
    options = options.override(stop_ids=options.stop_ids | stops)
    with console.frames_progress("encoding") as on_frames:
        session = pipeline.encode(
            video, frames, sampling, questions, on_frames, control_tokens=control_tokens, seek=seek, decoder=decoder
        )
    if seek == "keyframe" and session.frames_encoded < session.frames:
        console.status(f"Different keyframes: {session.frames_encoded}, for {session.frames} sampled frames.")
    with console.answers(questions, shown=not as_json) as on_text:
        answers = session.ask_many(questions, options, mode, on_text, control_tokens, batch=batch)
    if as_json:
        console.document(
            {
                "video": video,
                "engines": str(engines),
                "backend": pipeline.backend.name,
                "mode": mode or pipeline.bundle.config.slow_fast.decode_mode,
                "frames": session.frames,
                "seek": seek,
                "decoder": decoder,
                "frame_times": session.frame_times,
                "fast_tokens": session.fast_tokens,
                "slow_tokens": session.slow_tokens,
                "questions": [asdict(answer) for answer in answers],
            }
        )
