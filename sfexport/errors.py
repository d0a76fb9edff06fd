"""Define every exception that sfexport raises."""

from __future__ import annotations


class SfexportError(Exception):
    """An error that sfexport explains: what is wrong, with which file or value, and what to do.

    Attributes:
        hint: what the reader can do about it (printed after the message), or an empty string.
        exit_code: the command line's exit status: 1 for a run that failed, 2 for bad usage or input.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        # A traceback shows the message alone: add the hint as a note.
        if hint and hasattr(self, "add_note"):
            self.add_note(hint)

    def paragraph(self) -> str:
        """Return message and hint as one paragraph."""
        return " ".join(part for part in (str(self), self.hint) if part)


class InputError(SfexportError):
    """The caller's file, value or combination of options cannot be used (exit status 2)."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint is incomplete, damaged, or of a kind this version does not handle."""


class BundleError(InputError):
    """A bundle or engine directory does not hold what its manifest promises."""


class VideoError(InputError):
    """A video cannot be read."""


class MissingDependency(SfexportError):
    """An optional library is needed for this command and is not installed, too old, or does not load.

    Args:
        found: the installed version, if it is too old.
        oldest: the oldest supported version.
        failure: the exception that importing it raised.
    """

    def __init__(
        self,
        library: str,
        purpose: str,
        install: str,
        found: str = "",
        oldest: str = "",
        failure: Exception | None = None,
    ) -> None:
        hint = f"Install it: {install}"
        if found:
            needs = f"the library '{library}' {oldest} or later; {found} is installed"
        elif failure is None or _is_absence(failure):
            needs = f"the library '{library}', which is not installed"
        else:
            needs = f"the library '{library}', which does not load ({type(failure).__name__}: {failure})"
            hint = (
                "This library, or one that the error names, is damaged or has another version. "
                f"Install it again: {install}"
            )
        super().__init__(f"{purpose} needs {needs}.", hint)


def _is_absence(failure: Exception) -> bool:
    """Return whether a whole package is absent, not a part of an installed one."""
    return isinstance(failure, ModuleNotFoundError) and "." not in (failure.name or ".")
