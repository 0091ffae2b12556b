"""A sweep as a table for the terminal and as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lp_plugin.errors import InvalidInputError
from lp_plugin.files import write_atomically
from lp_plugin.quantity import format_seconds
from lp_plugin.sweep.grid import Point

__all__ = ["save_csv", "sweep_csv", "sweep_report", "sweep_table", "sweep_title"]

_VARIED: dict[str, Callable[[Point], str]] = {
    "cluster": lambda point: point.cluster,
    "stages": lambda point: f"{point.num_stages}",
    "dtype": lambda point: point.dtype,
    "weights": lambda point: point.weight_dtype,
    "sequence": lambda point: f"{point.sequence:,}",
    "batch": lambda point: f"{point.batch:,}",
}
"""Heading and text of what a sweep varies."""

_COLUMNS = {"batch": "batch_sequences", "sequence": "sequence_tokens", "micro_batch": "micro_batch_sequences"}
"""Field -> its heading in CSV, where that is not the field's own name."""


def sweep_report(points: Sequence[Point]) -> Group:
    """Title, table, and the point with most tokens per second.

    Args:
        points: Of one sweep; at least one.
    """
    counts = Counter(point.outcome for point in points)
    lines = [", ".join(f"{outcome}: {count:,}" for outcome, count in counts.items())]
    planned = [point for point in points if point.tokens_per_second is not None]
    if planned:
        best = max(planned, key=lambda point: point.tokens_per_second or 0.0)
        where = ", ".join(f"{name} {_VARIED[name](best)}" for name in _varied(points) if name != "stages")
        lines.append(f"most tokens/s: {best.tokens_per_second:,.0f}" + (f" with {where}" if where else ""))
    return Group(Text(sweep_title(points), style="bold"), sweep_table(points), Text("\n".join(lines)))


def sweep_title(points: Sequence[Point]) -> str:
    """The model, what was asked of it, and everything that is the same in all points."""
    first, varied = points[0], _varied(points)
    bounds = f" with {first.constraints}" if first.constraints else ""
    same = [
        text
        for name, text in {
            "cluster": first.cluster,
            "dtype": first.dtype,
            "weights": f"{first.weight_dtype} weights" if first.weight_dtype != first.dtype else "",
            "sequence": f"sequence {first.sequence:,}",
            "batch": f"batch {first.batch:,}",
        }.items()
        if name not in varied and text
    ]
    return f"{first.model}, {first.phase}, for {first.objective}{bounds}" + (f": {', '.join(same)}" if same else "")


def sweep_table(points: Sequence[Point]) -> Table:
    """A row for each point; what is the same in all of them is left out."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    varied = _varied(points)
    for name in varied:
        is_word = name in {"cluster", "dtype", "weights"}
        table.add_column(name, justify="left" if is_word else "right", no_wrap=not is_word, overflow="fold")
    with_room = any(point.max_sequences is not None for point in points)
    figures = ["micro-batch", "tokens/s", "bottleneck", "latency", "used", *(["room"] if with_room else []), "bubble"]
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("layers per stage, or why not", overflow="fold")
    for point in points:
        table.add_row(
            *(Text(_VARIED[name](point)) for name in varied),
            *_figures(point, with_room),
            Text(_sizes(point.boundaries) if point.boundaries else point.reason),
            style=None if point.outcome == "planned" else "red" if point.outcome == "does not fit" else "dim",
        )
    return table


def _figures(point: Point, with_room: bool) -> list[str]:
    if point.micro_batch is None:
        return ["-"] * (7 if with_room else 6)
    room = [] if not with_room else ["-" if point.max_sequences is None else f"{point.max_sequences:,}"]
    return [
        f"{point.micro_batch:,}",
        f"{point.tokens_per_second:,.0f}",
        format_seconds(point.bottleneck_seconds or 0.0),
        format_seconds(point.latency_seconds or 0.0),
        f"{point.memory_share:.1%}",
        *room,
        f"{point.bubble_fraction:.1%}",
    ]


def _sizes(boundaries: Sequence[int]) -> str:
    """Layers per stage, equal neighbours together: ``2, 14 x 1, 3``."""
    sizes = [high - low for low, high in itertools.pairwise(boundaries)]
    runs = [(size, len([*run])) for size, run in itertools.groupby(sizes)]
    return ", ".join(f"{size}" if count == 1 else f"{count} x {size}" for size, count in runs)


def _varied(points: Sequence[Point]) -> list[str]:
    """Headings of what is not the same in all points; weights only where they differ from the dtype."""
    varied = [name for name, text in _VARIED.items() if len({text(point) for point in points}) > 1]
    plain = all(point.weight_dtype == point.dtype for point in points)
    return [name for name in varied if not (plain and name == "weights")]


def sweep_csv(points: Sequence[Point]) -> str:
    """Comma-separated values with a heading: every field of `Point`, seconds and bytes as plain numbers.

    Boundaries are numbers separated by blanks; what a point does not have is empty. Numbers are written in full,
    so that reading them gives the same ones again.
    """
    fields = [field.name for field in dataclasses.fields(Point)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_COLUMNS.get(name, name) for name in fields])
    for point in points:
        writer.writerow([_plain(getattr(point, name)) for name in fields])
    return text.getvalue()


def save_csv(points: Sequence[Point], path: str | Path) -> None:
    """Writes `sweep_csv`; the file appears whole or not at all.

    Raises:
        InvalidInputError: If the file can't be written.
    """
    try:
        write_atomically(Path(path), sweep_csv(points))
    except (OSError, UnicodeError) as error:
        raise InvalidInputError(f"the CSV can't be written to {path}: {error}.") from None


def _plain(value: object) -> str:
    if value is None:
        return ""
    return " ".join(str(number) for number in value) if isinstance(value, tuple) else str(value)
