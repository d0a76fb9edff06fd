"""Independent readings of a mutated checkpoint: transformers' configuration and tokenizer, and the PyTorch model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sfexport
from fuzz.base import BUNDLE, CHECKPOINT, ENGINES, FRAMES, QUESTION, Reading, difference, whole
from fuzz.kinds import Case, Refused, Unexpected, Wrong, call
from sfexport.artifacts.bundle import Bundle

# Fields of transformers' configuration -> of the bundle's.
SAME_FIELDS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "rms_norm_eps",
}


def same_as_torch(case: Case, found: Reading) -> None:
    """Raises Wrong unless the reading is the undamaged model's, or PyTorch gives it for the damaged checkpoint."""
    if not difference(found, whole(case.base)):
        return
    _check_configuration(case.room)
    from sfexport.comparing.run import run_parity

    try:
        report = call(run_parity, sfexport.load(case.room / ENGINES), FRAMES, QUESTION, len(FRAMES), 8)
    except (Refused, Unexpected) as problem:
        raise Wrong(f"the engines answer, and PyTorch does not: {problem}") from problem
    if not report.passed:
        raise Wrong(f"parity: {json.dumps(report.to_json())[:600]}")


def _check_configuration(room: Path) -> None:
    """The bundle's facts are those that transformers reads in the same config.json."""
    from transformers import Qwen2Config

    content = json.loads((room / CHECKPOINT / "config.json").read_text())
    content.pop("model_type", None)
    try:
        theirs = Qwen2Config(**content)
    except Exception as error:
        raise Wrong(f"the engines answer, and transformers refuses config.json: {error}") from error
    ours: Any = Bundle.open(room / BUNDLE).config.text
    for name, own in SAME_FIELDS.items():
        if getattr(theirs, name) != getattr(ours, own):
            raise Wrong(f"{name} is {getattr(theirs, name)!r} for transformers and {getattr(ours, own)!r} for us")


def same_prompt_as_transformers(case: Case, found: Reading) -> None:
    """Raises Wrong unless the prompt's ids are those of transformers' tokenizer for the damaged checkpoint."""
    if not difference(found, whole(case.base)):
        return
    from transformers import AutoTokenizer

    from sfexport.qa.prompt import VIDEO, build_prompt

    try:
        theirs = AutoTokenizer.from_pretrained(case.room / CHECKPOINT, trust_remote_code=False)
        before, after = (
            theirs(part, add_special_tokens=False).input_ids for part in build_prompt(QUESTION).split(VIDEO)
        )
    except BaseException as error:  # panics of the tokenizers library too
        raise Wrong(f"the engines answer, and transformers refuses the tokenizer: {error}") from error
    if found.prompt != (*before, -1, *after):
        raise Wrong(f"the prompt's ids are {found.prompt[:40]}, transformers' {before[:20]}, {after[:20]}")
