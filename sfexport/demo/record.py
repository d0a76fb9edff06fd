"""Record PyTorch's outputs for the demo's clip: `python -m sfexport.demo.record` (needs PyTorch).

Run it again when the shipped model, the clip or the question changes.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from sfexport import console
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.comparing.recording import Recording, Source, record, unprepare
from sfexport.demo.clip import write_frames
from sfexport.demo.run import CLIP, demo_questions
from sfexport.demo.scenes import FPS, FRAMES, SIZE, UPSCALE, video_frames
from sfexport.demo.shipped import RECORDED, SHIPPED
from sfexport.engines.build import build
from sfexport.engines.torch_backend import TorchBackend
from sfexport.exporting.export import ExportOptions, export
from sfexport.qa.pipeline import Pipeline

STEPS = 16  # tokens


def record_demo(frames: np.ndarray | None = None) -> Recording:
    """Run the PyTorch model of the shipped checkpoint on the demo's clip.

    Args:
        frames: uint8 [FRAMES, S, S, 3], used instead of the clip's.

    Raises:
        MissingDependency: PyTorch is not installed.
    """
    with TemporaryDirectory() as folder:
        root = Path(folder)
        bundle = export(Checkpoint.open(SHIPPED), root / "bundle", ExportOptions())
        build(bundle, root / "engines")
        pipeline = Pipeline.load(root / "engines")
        if frames is None:
            write_frames(root / "clip.mp4", video_frames(*CLIP), FPS, (SIZE * UPSCALE, SIZE * UPSCALE))
            pixels, rows = pipeline.read_frames(root / "clip.mp4", FRAMES, "linspace")
            frames = unprepare(pixels[rows], pipeline.bundle.image)
        oracle = TorchBackend(SHIPPED)
        torch, transformers = (importlib.metadata.version(name) for name in ("torch", "transformers"))
        return record(pipeline, oracle, frames, Source(torch, transformers, demo_questions()[0].text, STEPS))


if __name__ == "__main__":
    record_demo().save(RECORDED)
    console.result(f"{RECORDED}: {RECORDED.stat().st_size:,} bytes")
