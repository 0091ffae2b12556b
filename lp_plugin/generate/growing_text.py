"""A prompt's new text, piece by piece, as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["GrowingText"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder makes of a character whose last bytes have yet to come."""


class GrowingText:
    """The text of one prompt's new tokens; a character is held back while it is incomplete.

    Args:
        decode: Token ids -> text.

    Attributes:
        ended: Whether all tokens have come.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._shown = 0  # characters
        self.ended = False

    def add(self, token_ids: Sequence[int]) -> None:
        """Takes new tokens."""
        self._tokens += token_ids

    def end(self, token_ids: Sequence[int]) -> None:
        """Takes all tokens of a prompt that has ended."""
        self._tokens, self.ended = list(token_ids), True

    def piece(self) -> str:
        """What has not been given before; may be empty."""
        text = self._decode(self._tokens)
        if not self.ended and text.endswith(_UNFINISHED):
            return ""
        new = text[self._shown :]
        self._shown = len(text)
        return new
