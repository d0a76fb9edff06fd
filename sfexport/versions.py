"""Read versions, and hold every version that sfexport compares with: for doctor, build and the plugins.

machines/targets.toml says which versions a kind of machine has, parser_support.toml what TensorRT's parser takes.
"""

from __future__ import annotations

import re
from functools import cache

Version = tuple[int, ...]

# Lower bounds by package: the same as in pyproject's ranges.
OLDEST: dict[str, Version] = {
    "python": (3, 10),
    "onnxruntime": (1, 20),
    "tensorrt": (10, 3),  # the first whose parser takes all of our graphs; JetPack 6.1 has it
    "triton": (3, 7),  # the first that compiles for every GPU of targets.toml: 3.4 to 3.6 fail for Blackwell
    "cuda-python": (12, 6),
}
TENSORRT_RTX: Version = (1, 7, 1, 116)  # the one version that engines are built with; pyproject's extra pins it
GSTREAMER: Version = (1, 0)  # of its programming interface
OLDEST_JETPACK: Version = (6, 1)  # 6.0 has TensorRT 8.6
RECOMMENDED_JETPACKS: tuple[Version, ...] = ((6, 2), (7, 2))
# Jetson Linux (L4T) and the JetPack it came with, oldest first; a version belongs to the last one that is not newer.
JETPACK_OF_L4T: tuple[tuple[Version, str], ...] = (
    ((35, 1), "5.0.2"),
    ((35, 2), "5.1"),
    ((36, 2), "6.0"),
    ((36, 4), "6.1"),
    ((36, 4, 3), "6.2"),
    ((36, 4, 4), "6.2.1"),
    ((36, 5), "6.2.2"),
    ((38, 2), "7.0"),
    ((38, 4), "7.1"),
    ((39,), "7.2"),
    ((39, 2, 1), "7.2.1"),
)
NEWEST_TENSORRT: Version = (11, 4)  # the newest whose Python bindings the tests call
# TensorRT stores a plugin's compiled kernel in the engine from FIRST_AOT_PLUGINS on. Before FIRST_AOT_WITH_NEW_NUMPY
# its Python part calls functions that NumPy dropped in NEW_NUMPY.
FIRST_AOT_PLUGINS: Version = (10, 9)
FIRST_AOT_WITH_NEW_NUMPY: Version = (11, 0)
NEW_NUMPY: Version = (2, 4)
FIRST_MAPPED_WEIGHTS: Version = (10, 13)  # TensorRT's parser reads weights in place, from the mapped file
# PyPI's package `tensorrt` is for this CUDA; tensorrt-cu12 is for the one before.
CUDA_OF_TENSORRT_PACKAGE: Version = (13, 0)
FIRST_HUGE_PAGES: Version = (2, 35)  # glibc's allocator can ask for huge pages
FIRST_ANY_METADATA: Version = (19, 0)  # earlier PyAV must be told what to do with metadata that is not UTF-8
FIRST_WEIGHTS_FOLDER: Version = (1, 21)  # ONNX Runtime has an option for the folder of external data


def version_numbers(text: str | None) -> Version:
    """Return a version's release numbers for comparison: (10, 16, 1, 11) for 'v10.16.1.11-1+cuda13.2'.

    What follows a version that packaging can read is ignored ('5.10.104-tegra' gives (5, 10, 104)); a text that begins
    with none gives ().
    """
    found = _leading_version().match(text or "")
    return tuple(int(part) for part in found["release"].split(".")) if found else ()


@cache
def _leading_version() -> re.Pattern[str]:
    """packaging's pattern of a version, at the beginning of a text: Debian's and Jetson's versions go on behind it."""
    from packaging.version import VERSION_PATTERN  # here: importing it would slow every start of the command

    return re.compile(rf"\s*{VERSION_PATTERN}", re.VERBOSE | re.IGNORECASE)


def version_text(version: Version) -> str:
    """Write a version: '10.3' for (10, 3)."""
    return ".".join(map(str, version))


def is_older(version: str | None, than: Version) -> bool:
    """Return whether a version is older than `than`; a version that cannot be read counts as older."""
    return version_numbers(version) < than


def has_aot_plugins(tensorrt: str) -> bool:
    """Return whether this TensorRT takes plugins that are compiled ahead of time."""
    return not is_older(tensorrt, FIRST_AOT_PLUGINS)


def aot_needs_old_numpy(tensorrt: str | None) -> bool:
    """Return whether this TensorRT compiles plugins ahead of time only with a NumPy before NEW_NUMPY."""
    return FIRST_AOT_PLUGINS <= version_numbers(tensorrt)[:2] < FIRST_AOT_WITH_NEW_NUMPY


def maps_weights(tensorrt: str) -> bool:
    """Return whether this TensorRT's parser reads weights in place, from the mapped file."""
    return not is_older(tensorrt, FIRST_MAPPED_WEIGHTS)


def jetpack_of_l4t(l4t: str) -> str | None:
    """Return the JetPack that a Jetson Linux came with: '6.2' for '36.4.3'; None for one older than the table."""
    numbers = version_numbers(l4t)
    return next((jetpack for first, jetpack in reversed(JETPACK_OF_L4T) if first <= numbers), None)


def recommended_jetpacks() -> str:
    """'6.2 or 7.2', for messages."""
    return " or ".join(map(version_text, RECOMMENDED_JETPACKS))
