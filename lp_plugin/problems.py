"""What pydantic finds wrong with a file, in words: each problem with its place, the value, and what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from lp_plugin.quantity import shown

__all__ = ["problems_of", "suggestion"]

_MOST = 8
"""Problems in one message."""

Place = tuple[int | str, ...]
"""Keys and positions that lead to a value."""


def problems_of(error: ValidationError, allowed: Callable[[Place], Sequence[str]], prefix: str = "") -> str:
    """The problems of a file in a line.

    Args:
        error: Pydantic's.
        allowed: The keys that there can be in the table in which one of this place is not known.
        prefix: Of all places.
    """
    found = error.errors(include_url=False, include_context=False)
    lines = [_problem(dict(details), allowed, prefix) for details in found[:_MOST]]
    lines += [f"and {len(found) - _MOST} more"] if len(found) > _MOST else []
    return "; ".join(lines)


def suggestion(name: str, known: Sequence[str]) -> str:
    """Names that look like an unknown one, as a question; empty if none do."""
    close = difflib.get_close_matches(name.lower(), known, n=3)
    return f"did you mean {' or '.join(close)}? " if close else ""


def _problem(details: dict[str, Any], allowed: Callable[[Place], Sequence[str]], prefix: str) -> str:
    path = prefix
    for part in details["loc"]:
        key = part if isinstance(part, int) or re.fullmatch(r"[\w-]{1,60}", part) else shown(part)
        path += f"[{key}]" if isinstance(part, int) else f".{key}" if part != "[key]" else ""
    path = path.removeprefix(".")
    if details["type"] == "missing":
        return f"{path} is missing; add it"
    if details["type"] == "extra_forbidden":
        known = allowed(details["loc"])
        hint = suggestion(str(details["loc"][-1]), known)
        return f"{path} is not a known key; {hint}allowed here: {', '.join(known)}"
    message = details["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{path} is {shown(details['input'])}: {message}"
