"""Handle transformers' K/V cache, whose argument is `past_key_values` up to version 5.23 and `cache` after."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from sfexport.errors import InputError

NAMES = ("cache", "past_key_values")
# The installed version's name of the outputs' field and of generate's keyword.
NAME = next(name for name in NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})


def take_cache(arguments: dict[str, Any]) -> Cache | None:
    """Remove the cache from keyword arguments and return it; it is known by its type, not by its keyword.

    Raises:
        InputError: there are two different caches, or a cache's keyword has another value.
    """
    names = [name for name, value in arguments.items() if name in NAMES or isinstance(value, Cache)]
    found = [value for value in map(arguments.pop, names) if value is not None]
    for value in found:
        if not isinstance(value, Cache):
            raise InputError(
                f"A cache must be a transformers Cache, not {type(value).__name__}.", "Use transformers.DynamicCache()."
            )
    if any(value is not found[0] for value in found):
        raise InputError(f"Two different caches were given, as {' and '.join(names)}.", "Give one.")
    return found[0] if found else None


def length(cache: Cache | None) -> int:
    """Return the number of positions that a cache holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def check_length(cache: Cache | None, expected: int) -> None:
    """Raise InputError for a cache that does not hold all positions that the layers gave it.

    transformers 5.0's caches of fixed size do not: they get the position to write to by another argument.
    """
    if cache is not None and length(cache) != expected:
        raise InputError(
            f"The cache, a {type(cache).__name__}, holds {length(cache)} positions where it was given {expected}.",
            "Use transformers.DynamicCache(), or no cache_implementation.",
        )
