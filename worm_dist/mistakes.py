"""Mistakes: what is wrong in settings, a line each, in the words that users read."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

__all__ = ["mistakes_in", "shortened", "shown"]

_NOW_CALLED: Mapping[str, str] = {
    "search.floor": "is called search.min_keep_ratio now",
    "search.score": "is called search.importance now, and its 'scale' is 'auto'",
    "truncation.motion": "is called truncation.frozen_weights now, and its 'fade' is 'remove'",
    "truncation.fade": "channels leave one after another now; give truncation.removal.duration",
    "truncation.channels": "is gone; channels that were dropped for longest leave first",
    "ticket.settle": "is gone; the ticket is drawn when the last dropped channel is zero",
}
"""Former settings, with the message for each."""

_LONGEST_TEXT, _LONGEST_KEY, _LONGEST_NUMBER = 1500, 100, 30
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring = 3, 100


def mistakes_in(error: ValidationError, valid_keys: Sequence[str]) -> Iterator[str]:
    """One line per mistake, up to 1500 characters in all.

    Args:
        error: what pydantic has found.
        valid_keys: every dotted key that there is.
    """
    length = 0
    for number, mistake in enumerate(error.errors(include_url=False)):
        line = shortened(_line(mistake, valid_keys))
        length += len(line)
        if length > _LONGEST_TEXT:
            yield f"... and {error.error_count() - number} more"
            return
        yield line


def _line(mistake: ErrorDetails, valid_keys: Sequence[str]) -> str:
    """The key, what is wrong with it, and the given value."""
    key = ".".join(str(part) for part in mistake["loc"]) or "config"
    key = shortened(key if key.isprintable() else ascii(key), _LONGEST_KEY)
    if mistake["type"] == "extra_forbidden":
        if key in _NOW_CALLED:
            return f"{key}: {_NOW_CALLED[key]}"
        if key in valid_keys:  # in Python; the settings file may have dotted keys
            return f"{key}: write it nested, as {_nested(key)}"
        near = difflib.get_close_matches(key, valid_keys, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key}: unknown key{hint}"
    if mistake["type"] == "value_error":
        return f"{key}: {mistake['ctx']['error']}"
    hint = "; write true or false" if mistake["type"] == "bool_type" else ""
    return f"{key}: {mistake['msg']}, got {shown(mistake['input'])}{hint}"


def _nested(key: str) -> str:
    """A dotted key as a keyword argument."""
    first, *names = key.split(".")
    text = "..."
    for name in reversed(names):
        text = f"{{{name!r}: {text}}}"
    return f"{first}={text}"


def shown(value: Any) -> str:
    """The repr of a value, shortened where it is long, deep or huge."""
    if isinstance(value, int) and abs(value) >= 10**_LONGEST_NUMBER:
        return f"a number of more than {_LONGEST_NUMBER} digits"
    return _SHORT.repr(value)


def shortened(text: str, most: int = 400) -> str:
    """The text, or its beginning and end if it has more than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 45]} ... {text[-40:]}"
