"""Read a JSON object into a typed structure: one `Fields` class per file names every field that the file can have.

A field is applied (an attribute of the class), known not to matter (`IRRELEVANT`), or unknown (`unknown_fields`, which
the caller reports or refuses). Nothing is converted: "false" is not a bool and 2.5 is not a whole number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec

from sfexport.errors import CheckpointError, SfexportError

# 2^31 - 1: what every runtime's shapes can hold.
LARGEST = 2**31 - 1
Count = Annotated[int, msgspec.Meta(ge=1, le=LARGEST)]
Index = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
PositiveNumber = Annotated[float, msgspec.Meta(gt=0)]
SHOWN = 80  # characters of a value that a message repeats

_F = TypeVar("_F", bound="Fields")


class Fields(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the structures. A field that is null in the file takes its default, like one that is absent.

    Attributes:
        IRRELEVANT: names of fields that may stand in the file and change nothing that sfexport does.
    """

    IRRELEVANT: ClassVar[frozenset[str]] = frozenset()


def read_fields(
    kind: type[_F],
    values: Mapping[str, Any],
    file: str,
    error: type[SfexportError] = CheckpointError,
    hint: str = "",
) -> _F:
    """Check the fields of `kind` found in `values` and return them; others are left alone (see `unknown_fields`).

    Args:
        values: the parsed JSON object.
        file: the file's name, for messages.
        error: raised where a value has the wrong type or is out of range, is not finite, or is absent.
    """
    names = {field.encode_name for field in msgspec.structs.fields(kind)}
    present = {name: value for name, value in values.items() if name in names and value is not None}
    for name, value in present.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise error(f"{file}: '{name}' is {value!r}, which is not a finite number.", hint)
    try:
        return msgspec.convert(present, kind, strict=True)
    except UnicodeEncodeError:
        raise error(f"{file}: {_surrogate(present)} holds half a character (a lone surrogate).", hint) from None
    except (msgspec.ValidationError, OverflowError, RecursionError) as problem:
        raise error(f"{file}: {_explain(str(problem), present)}.", hint) from None


def unknown_fields(kind: type[Fields], values: Mapping[str, Any]) -> list[str]:
    """List the names in `values` that `kind` neither applies nor knows to be irrelevant, sorted."""
    names = {field.encode_name for field in msgspec.structs.fields(kind)}
    return sorted(name for name in values if name not in names and name not in kind.IRRELEVANT)


def shown(value: Any) -> str:
    """Show a value in a message: its repr in ASCII, shortened."""
    try:
        text = ascii(value)
    except ValueError:  # Python writes no numbers of over 4300 digits
        text = "a very long number"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _surrogate(values: Mapping[str, Any]) -> str:
    """Find the first field with text that is not Unicode."""
    return next((f"'{name}'" for name, value in values.items() if "\\ud" in ascii(value)), "a field")


def _explain(problem: str, values: Mapping[str, Any]) -> str:
    """Rewrite 'Expected `bool`, got `str` - at `$.tie_word_embeddings`' with the field first and its value."""
    message, _, place = problem.partition(" - at `$.")
    message, place = message[0].lower() + message[1:], place.rstrip("`")
    name = place.split(".")[0].split("[")[0]
    if name in values:
        return f"'{place}': {message} ({shown(values[name])})"
    return message
