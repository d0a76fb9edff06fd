"""Take Slow-Fast Video MLLM checkpoints to engines that answer questions about videos offline.

    import sfexport

    sfexport.build("checkpoint", "engines")
    session = sfexport.load("engines").encode("clip.mp4")
    print(session.ask("What happens in the video?").answer)
    print(sfexport.parity("engines", "clip.mp4").passed)

Every verb of the command line is a function here. All names are loaded when they are first used: importing sfexport
imports no other package.
"""

from __future__ import annotations

from sfexport.__version__ import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sfexport.api import build as build
    from sfexport.api import check_build as check_build
    from sfexport.api import diagnose as diagnose
    from sfexport.api import export as export
    from sfexport.api import inspect as inspect
    from sfexport.api import load as load
    from sfexport.api import parity as parity
    from sfexport.api import plan as plan
    from sfexport.errors import SfexportError as SfexportError

__all__ = [
    "SfexportError",
    "__version__",
    "build",
    "check_build",
    "diagnose",
    "export",
    "inspect",
    "load",
    "parity",
    "plan",
]


def __getattr__(name: str) -> object:
    """Load a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("sfexport.errors" if name == "SfexportError" else "sfexport.api"), name)


def __dir__() -> list[str]:
    """List the public names too, those that are not loaded yet included."""
    return sorted({*globals(), *__all__})
