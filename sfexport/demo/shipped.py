"""Paths of the trained demo checkpoint and of PyTorch's recorded outputs for the demo's clip.

model/MODEL_CARD.md says how the checkpoint was made; sfexport/demo/record.py makes the recording.
"""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent / "model"
RECORDED = Path(__file__).parent / "recorded.npz"
