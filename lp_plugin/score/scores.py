"""What a scoring job finds out about a document."""

from __future__ import annotations

from typing import TypedDict

__all__ = ["Score"]


class Score(TypedDict):
    """One document's result, as it is written."""

    num_tokens: int
    """Tokens scored: all but the first, which has nothing before it."""
    log_likelihood: float
    """Sum of the natural logarithms of their probabilities."""
