"""What a kind of hostile input is, and the doors it goes through."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from helpers import sfexport as run_command

from sfexport.errors import SfexportError

LONGEST_PARAGRAPH = 4000  # characters
TIMEOUT = 60.0  # seconds of wall clock for one case, on a busy machine
_T = TypeVar("_T")


class Refused(Exception):
    """The tool said no, in one paragraph."""


class Unexpected(Exception):
    """A traceback, an exception of another type, a message that nobody can read, something left behind."""


class Wrong(Exception):
    """An answer that is not what an independent reading gives."""


class Expect(Enum):
    """What is right for a kind.

    Attributes:
        REFUSED: one paragraph; any answer is wrong.
        ANSWERED: the right answer; a refusal is not expected.
        EITHER: one paragraph, or the right answer.
    """

    REFUSED = "refused"
    ANSWERED = "answered"
    EITHER = "either"


@dataclass(frozen=True)
class Case:
    """One try of a kind.

    Attributes:
        number: which of the kind's variants; drawn kinds use `rng` instead.
        room: an empty directory for this case alone.
        base: the directory that `base.make` filled: read only.
    """

    number: int
    rng: random.Random
    room: Path
    base: Path


@dataclass(frozen=True)
class Kind:
    """One kind of hostile input at one door.

    Attributes:
        group: the table it belongs to.
        act: does it. Returns if what came out is right, with a remark or None; raises Refused, Unexpected or Wrong.
        cases: how many variants there are; a drawn kind has as many as wanted.
        drawn: each case draws its damage from the case's generator.
        needs_torch: the independent reading is PyTorch's.
        slow: takes seconds, or comes out differently by the moment: in the large campaign only.
        timeout: seconds.
    """

    name: str
    group: str
    act: Callable[[Case], str | None]
    expect: Expect = Expect.EITHER
    cases: int = 1
    drawn: bool = False
    needs_torch: bool = False
    slow: bool = False
    timeout: float = TIMEOUT


def command(*args: object, codes: tuple[int, ...] = (0,)) -> str:
    """Run the command line in this process and return stdout.

    Args:
        codes: exit statuses that are results.

    Raises:
        Refused: with the paragraph. Unexpected: anything else than success or one paragraph.
    """
    result = run_command(*args)
    if isinstance(result.exception, BaseException) and not isinstance(result.exception, SystemExit):
        raise Unexpected(f"{type(result.exception).__name__}: {result.exception}")
    check_text(result.stdout)
    return check_exit(result.exit_code, result.stdout, result.stderr, codes)


def check_exit(code: int, stdout: str, stderr: str, codes: tuple[int, ...] = (0,)) -> str:
    """stdout where the exit status is a result; Refused or Unexpected otherwise."""
    check_text(stderr)
    if "Traceback (most recent" in stderr or "did not expect this" in stderr or "panicked" in stderr:
        raise Unexpected(stderr[-600:])
    if code in codes:
        return stdout
    errors = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    if code not in (1, 2) or len(errors) != 1 or stderr.splitlines()[-1] != errors[0]:
        raise Unexpected(f"exit status {code}: {stderr[-600:]}")
    if len(errors[0]) > LONGEST_PARAGRAPH:
        raise Unexpected(f"an error of {len(errors[0])} characters: {errors[0][:200]}")
    raise Refused(errors[0])


def call(function: Callable[..., _T], *args: Any, **keywords: Any) -> _T:
    """Call Python's door. Raises Refused for an SfexportError, Unexpected for any other exception."""
    try:
        return function(*args, **keywords)
    except SfexportError as error:
        # The command line shortens what it prints; an exception may repeat the path that was given.
        if len(error.paragraph()) > 2 * LONGEST_PARAGRAPH:
            raise Unexpected(f"an error of {len(error.paragraph())} characters") from error
        raise Refused(error.paragraph()) from error
    except (Refused, Unexpected, Wrong, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        raise Unexpected(f"{type(error).__name__}: {error}") from error


# Marks that reorder the text around them.
_DIRECTION = set(map(chr, (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))


def check_text(text: str) -> None:
    """Raises Unexpected for characters that a terminal would obey, or that are none."""
    for character in set(text) - set("\n\t"):
        if unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTION:
            raise Unexpected(f"the text has {character!a}: {ascii(text[:300])}")
