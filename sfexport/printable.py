"""Make text that is safe to print: no control characters, a bounded length, sizes in a unit that shows them.

Names of files, tensors and devices come from outside; a terminal would obey the control characters in them.
"""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

LONGEST = 2_000  # characters of one message or table cell
# Control, format, surrogate, line and paragraph separators; but joiners and soft hyphens belong to words and emoji.
_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_ALLOWED = "\n\t\u200c\u200d\u00ad"
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def printable(text: str) -> str:
    r"""Escape every character that a terminal would obey or that UTF-8 cannot hold: '\x1b', '\u202e'.

    A byte of a file name that is not UTF-8, which Python keeps as a lone surrogate, is shown as that byte: '\xe9'.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character in _ALLOWED or unicodedata.category(character) not in _OBEYED:
        return character
    code = ord(character)
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shortened(text: str, longest: int = LONGEST) -> str:
    """Leave out the middle of `text` where it is longer than `longest` characters."""
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    tail = longest - head
    return f"{text[:head]} [... {len(text) - longest:,} characters ...] {text[-tail:]}"


def one_paragraph(text: str) -> str:
    """Return a message as one printable line of bounded length."""
    # Shortened before it is escaped too: escaping a message of many megabytes would take seconds.
    return shortened(printable(" ".join(shortened(text, 4 * LONGEST).split())))


def json_text(value: Any) -> str:
    """Write a document as one line of ASCII JSON that every parser takes.

    Lone surrogates are shown as in `printable`; numbers that JSON does not have (NaN, infinities) become null.
    """
    return json.dumps(_strict(value), allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else "".join(c if not _is_surrogate(c) else _escaped(c) for c in value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {_strict(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    return value


def _is_surrogate(character: str) -> bool:
    return 0xD800 <= ord(character) <= 0xDFFF


def size_text(count: float) -> str:
    """Show bytes in the largest unit of which there is at least one: '17.1 GB', '2.4 MB', '512 bytes'."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} bytes"


def sizes_text(first: float, second: float) -> tuple[str, str]:
    """Show two sizes that a message compares, exact to the byte where they would otherwise read the same."""
    pair = size_text(first), size_text(second)
    return pair if first == second or pair[0] != pair[1] else (f"{first:,.0f} bytes", f"{second:,.0f} bytes")
