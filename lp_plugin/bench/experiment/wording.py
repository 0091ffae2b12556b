"""Figures of a report as text; what was not measured says so."""

from __future__ import annotations

from collections.abc import Sequence

from lp_plugin.bench.experiment.statistics import Ratio
from lp_plugin.quantity import format_bytes, format_seconds

__all__ = [
    "NOT_MEASURED",
    "boundaries_text",
    "bytes_text",
    "change_text",
    "file_names",
    "in_one_line",
    "missing_text",
    "ratio_text",
    "seconds_text",
    "share_text",
    "tokens_text",
]

NOT_MEASURED = "not measured"
_MOST_BOUNDARIES = 24


def seconds_text(seconds: float | None) -> str:
    """Such as ``19.4 ms``."""
    return NOT_MEASURED if seconds is None else format_seconds(seconds)


def bytes_text(num_bytes: float | None) -> str:
    """Such as ``1.61 GB``."""
    return NOT_MEASURED if num_bytes is None else format_bytes(num_bytes)


def share_text(share: float | None, digits: int = 1) -> str:
    """Such as ``12.3%``."""
    return NOT_MEASURED if share is None else f"{round(share, digits + 2) + 0.0:.{digits}%}"  # and no -0.0%


def change_text(change: float | None) -> str:
    """With its sign, such as ``+1.3%``."""
    if change is None:
        return NOT_MEASURED
    return "0.0%" if abs(change) < 0.0005 else f"{change:+.1%}"


def tokens_text(tokens_per_second: float | None) -> str:
    """Such as ``37,643``; four significant digits below 1,000."""
    if tokens_per_second is None:
        return NOT_MEASURED
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 1000 else f"{tokens_per_second:.4g}"


def ratio_text(ratio: Ratio | None) -> str:
    """With its interval, such as ``1.094 [1.091, 1.097]``."""
    if ratio is None:
        return NOT_MEASURED
    interval = "" if ratio.low is None or ratio.high is None else f" [{ratio.low:.3f}, {ratio.high:.3f}]"
    return f"{ratio.value:.3f}{interval}"


def boundaries_text(boundaries: Sequence[int]) -> str:
    """All of them, or the first of very many."""
    shown = ", ".join(map(str, boundaries[:_MOST_BOUNDARIES]))
    return shown if len(boundaries) <= _MOST_BOUNDARIES else f"{shown}, ... ({len(boundaries) - 1} stages)"


def missing_text(reason: str) -> str:
    """In place of the figure of something that was left out for a reason, or did not come to be measured."""
    return "left out" if reason else NOT_MEASURED


def in_one_line(text: str) -> str:
    """Without line breaks, as a cell holds it."""
    return " ".join(text.split())


def file_names(names: Sequence[str]) -> dict[str, str]:
    """A name that any file system takes for each, all different: ``tp=2 pp=2`` becomes ``tp2-pp2``."""
    chosen: dict[str, str] = {}
    for name in names:
        plain = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in name.replace("=", ""))
        plain = "-".join(part for part in plain.split("-") if part) or "case"
        number, unique = 1, plain
        while unique in chosen.values():
            number += 1
            unique = f"{plain}-{number}"
        chosen[name] = unique
    return chosen
