"""All kinds, in the order of the tables."""

from __future__ import annotations

from collections import Counter

from fuzz import (
    artifacts,
    clips,
    configs,
    files,
    generation,
    kills,
    manifests,
    memory,
    no_clips,
    options,
    outputs,
    pictures,
    questions,
    tokenizer_files,
    weights,
)

TABLES = (
    *(configs, weights, files, tokenizer_files, generation, questions, manifests, artifacts),
    *(clips, no_clips, pictures, memory, options, outputs, kills),
)

KINDS = [kind for table in TABLES for kind in table.KINDS]
assert not [name for name, count in Counter(kind.name for kind in KINDS).items() if count > 1]
