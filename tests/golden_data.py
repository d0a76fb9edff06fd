"""Golden directories: finding and reading them. Used by test_golden.py only.

Each holds a checkpoint (`config.json`, `model.safetensors`) and, per variant, `inputs*.npz` and `outputs*.npz`
recorded from the reference implementation. SFEXPORT_GOLDEN names another folder to take them from.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

ROOT = Path(os.environ.get("SFEXPORT_GOLDEN") or Path(__file__).parent / "golden")
PADDING = 4


@dataclass(frozen=True)
class Golden:
    """One directory and variant; `name` is 'base_t16' or 'batch3_mixed_right:textonly'."""

    path: Path
    variant: str

    @property
    def name(self) -> str:
        return f"{self.path.name}:{self.variant}" if self.variant else self.path.name

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        return self._read("inputs")

    @cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        return self._read("outputs")

    def _read(self, kind: str) -> dict[str, np.ndarray]:
        suffix = f"_{self.variant}" if self.variant else ""
        with np.load(self.path / f"{kind}{suffix}.npz") as file:
            return dict(file)

    @property
    def rows(self) -> int:
        return len(self.inputs["input_ids"])

    def pixels(self, row: int) -> np.ndarray:
        return self.inputs[f"pixel_values_{row}"]

    @property
    def valid(self) -> np.ndarray:
        """bool [B, L]: positions that are not padding."""
        return self.outputs["token_types"] != PADDING

    def ids(self, row: int) -> np.ndarray:
        """A row's token ids without padding."""
        mask = self.inputs.get("attention_mask")
        ids = self.inputs["input_ids"][row]
        return ids if mask is None else ids[mask[row].astype(bool)]


def directories() -> list[Path]:
    return sorted(p.parent for p in ROOT.glob("*/config.json"))


def goldens() -> list[Golden]:
    found = []
    for path in directories():
        for file in sorted(path.glob("inputs*.npz")):
            found.append(Golden(path, file.stem.removeprefix("inputs").lstrip("_")))
    return found
