"""Texts on the terminal while they are made."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from lp_plugin.generate.growing_text import GrowingText
from lp_plugin.job.documents import TokenizedDocuments

__all__ = ["Stream"]


class Stream:
    """Prints one prompt's text as it comes, then the next one's: several at a time could not be read.

    The first prompt that has a token is followed to its end; what came for others meanwhile is printed at once when
    their turn comes, in the order in which they began.

    Args:
        page: Where to print.
        decode: Token ids -> text.
        prompts: All prompts, for the headings.
    """

    def __init__(self, page: Console, decode: Callable[[list[int]], str], prompts: TokenizedDocuments) -> None:
        self._page, self._decode, self._prompts = page, decode, prompts
        self._begun: dict[int, GrowingText] = {}
        self._current: int | None = None

    def show(self, index: int, token_ids: list[int], *, ended: bool) -> None:
        """Takes new tokens of a prompt, or all of its tokens once it has ended."""
        text = self._begun.setdefault(index, GrowingText(self._decode))
        if ended:
            text.end(token_ids)
        else:
            text.add(token_ids)
        if self._current is None:
            self._head(index)
        if index == self._current:
            self._follow()

    def _head(self, index: int) -> None:
        self._current = index
        said = " ".join(self._decode(self._prompts[index].tolist()).split())
        heading = Text(f"▌ {self._prompts.ids[index]}  ", style="bold cyan").append(said, style="not bold dim")
        self._page.print(heading, no_wrap=True, overflow="ellipsis")

    def _follow(self) -> None:
        """Prints what is new of the current prompt; goes on with those that wait once it has ended."""
        while self._current is not None:
            text = self._begun[self._current]
            self._page.print(Text(text.piece()), end="", soft_wrap=True)
            if not text.ended:
                self._page.file.flush()
                return
            self._page.print("\n")
            del self._begun[self._current]
            self._current = None
            if self._begun:
                self._head(next(iter(self._begun)))
