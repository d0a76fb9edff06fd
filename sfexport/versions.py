"""Every version that sfexport compares with, once: for doctor, build, the plugins and pyproject's ranges.

What a kind of machine has is in machines/targets.toml, what TensorRT's parser takes in parser_support.toml.
"""

from __future__ import annotations

import re

Version = tuple[int, ...]

# The lower bounds of pyproject's ranges, by package.
OLDEST: dict[str, Version] = {
    "python": (3, 10),
    "onnxruntime": (1, 20),
    "tensorrt": (10, 3),  # the first whose parser takes all of our graphs; JetPack 6.1 has it
    "triton": (3, 7),  # the first that compiles for every GPU of targets.toml: 3.4 to 3.6 fail for Blackwell
    "cuda-python": (12, 6),
}
OLDEST_JETPACK: Version = (6, 1)  # 6.0 has TensorRT 8.6
NEWEST_TENSORRT: Version = (11, 4)  # the newest whose Python bindings the tests call
# TensorRT stores a plugin's compiled kernel in the engine from the first version on; up to the second, the Python
# part that does it calls functions that NumPy has dropped.
FIRST_AOT_PLUGINS: Version = (10, 9)
FIRST_AOT_WITH_NEW_NUMPY: Version = (11, 0)
NEW_NUMPY: Version = (2, 4)
FIRST_MAPPED_WEIGHTS: Version = (10, 13)  # TensorRT's parser reads weights where they lie in the file
FIRST_ANY_METADATA: Version = (19, 0)  # earlier PyAV must be told what to do with metadata that is not UTF-8
FIRST_WEIGHTS_FOLDER: Version = (1, 21)  # ONNX Runtime heeds the folder that external data is said to lie in


def version_numbers(text: str | None) -> Version:
    """(10, 16, 1, 11) for '10.16.1.11' and 'v10.16.1.11-1+cuda13.2': the leading numbers, for comparison.

    Nothing for what does not begin with a number.
    """
    head = re.match(r"\s*v?(\d+(?:\.\d+)*)", text or "")
    return tuple(int(part) for part in head[1].split(".")) if head else ()


def version_text(version: Version) -> str:
    """'10.3' for (10, 3)."""
    return ".".join(map(str, version))


def is_older(version: str | None, than: Version) -> bool:
    """Whether a version is older than `than`; one that cannot be read is."""
    return version_numbers(version) < than


def has_aot_plugins(tensorrt: str) -> bool:
    """Whether this TensorRT takes plugins that are compiled ahead of time."""
    return not is_older(tensorrt, FIRST_AOT_PLUGINS)


def aot_needs_old_numpy(tensorrt: str | None) -> bool:
    """Whether this TensorRT compiles plugins ahead of time with a NumPy before NEW_NUMPY only."""
    return FIRST_AOT_PLUGINS <= version_numbers(tensorrt)[:2] < FIRST_AOT_WITH_NEW_NUMPY


def maps_weights(tensorrt: str) -> bool:
    """Whether this TensorRT's parser reads weights where they lie in the file."""
    return not is_older(tensorrt, FIRST_MAPPED_WEIGHTS)
