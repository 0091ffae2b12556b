"""Following a rank through the places that it tells the watch of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lp_plugin.job import place

__all__ = ["follow"]


class _Followed(place._Whereabouts):
    """Where a rank is; says so as it comes there."""

    def __init__(self, comes_to: Callable[[str], None]) -> None:
        self._comes_to = comes_to
        super().__init__()

    @property
    def now(self) -> Any:
        return self._now

    @now.setter
    def now(self, value: Any) -> None:
        self._now = value
        self._comes_to(value[2])


def follow(comes_to: Callable[[str], None]) -> None:
    """From now on, whatever this process begins is told first, by the name that `lp_plugin.job.place` has for it."""
    place._whereabouts = _Followed(comes_to)
