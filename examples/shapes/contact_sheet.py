"""The README's picture: the demo clip's frames, with the questions and what the shipped model answers.

python examples/shapes/contact_sheet.py -o docs/demo.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.clip import write_frames
from sfexport.demo.run import CLIP
from sfexport.demo.scenes import FPS, FRAMES, SIZE, UPSCALE, is_sampled, make_scene, video_frames
from sfexport.demo.shipped import SHIPPED
from sfexport.engines.build import build
from sfexport.exporting.export import ExportOptions, export
from sfexport.qa.pipeline import Pipeline

SIDE, GAP, COLUMNS = 120, 8, 8
LINE = 22


def answers() -> list[tuple[str, str, str]]:
    """(question, answer, truth) of the demo clip, answered by exported engines."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = export(Checkpoint.open(SHIPPED), folder / "bundle", ExportOptions())
        pipeline = Pipeline.load(build(bundle, folder / "engines").path)
        clip = folder / "clip.mp4"
        write_frames(clip, video_frames(*CLIP), FPS, (SIZE * UPSCALE, SIZE * UPSCALE))
        session, options = pipeline.encode(clip), pipeline.generation_options()
        questions = make_scene(*CLIP).questions()
        return [(q.text, session.ask(q.text, options).answer, q.answer) for q in questions]


def draw(rows: list[tuple[str, str, str]]) -> Image.Image:
    """Frames in two rows, a mark above those that the fast path never sees, questions below in two columns."""
    lines = (len(rows) + 1) // 2
    cell = SIDE + GAP
    height = 2 * (cell + LINE) + LINE * (lines + 1) + 2 * GAP
    sheet = Image.new("RGB", (COLUMNS * cell + GAP, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for t, frame in enumerate(video_frames(*CLIP)):
        x, y = GAP + t % COLUMNS * cell, GAP + t // COLUMNS * (cell + LINE)
        note = f"{t}" if is_sampled(t) else f"{t}: slow only"
        pen.text((x, y), note, fill="black" if is_sampled(t) else "firebrick", font=font)
        picture = Image.fromarray(np.ascontiguousarray(frame)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y + LINE - 2))
    top = GAP + FRAMES // COLUMNS * (cell + LINE) + GAP
    for i, (question, answer, truth) in enumerate(rows):
        x, y = GAP + i // lines * (sheet.width // 2), top + i % lines * LINE
        colour = "darkgreen" if answer == truth else "red"
        pen.text((x, y), question, fill="black", font=font)
        pen.text((x + 345, y), answer, fill=colour, font=font)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/demo.png"))
    draw(answers()).save(parser.parse_args().output, optimize=True)


if __name__ == "__main__":
    main()
