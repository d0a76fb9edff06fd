"""sfexport: Slow-Fast Video MLLM checkpoints to engines that answer questions about videos offline."""

from __future__ import annotations

from sfexport.__version__ import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from sfexport.qa.pipeline import Pipeline

__all__ = ["__version__", "load"]


def load(engines: str | Path) -> Pipeline:
    """A model ready to answer: `load("engines").encode("clip.mp4").ask("What happens?").answer`.

    Args:
        engines: a directory that `sfexport build` wrote.

    Raises:
        BundleError: the directory is not usable here.
    """
    # Here, so that importing sfexport (and `sfexport --help`) stays cheap.
    from sfexport.qa.pipeline import Pipeline

    return Pipeline.load(engines)
