"""Where the trained demo checkpoint lies in the package. MODEL_CARD.md beside it says how it was made."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent / "model"
