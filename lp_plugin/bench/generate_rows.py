"""What the benchmark of generation found out: a row per contender, as JSON and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lp_plugin.bench.generate_contenders import Contender, Request
from lp_plugin.quantity import format_bytes, format_seconds

__all__ = ["Row", "prediction_lines", "rows_table"]

Tokens = list[list[int]]


@dataclass(kw_only=True)
class Row:
    """One contender's figures, filled in as they come."""

    contender: Contender
    """Who."""
    request: Request
    """What all of them do."""
    reason: str = ""
    """Why it did not run, or stopped; empty if all went well."""
    seconds: list[float] = field(default_factory=list)
    """Of each turn, prefill included."""
    tokens: Tokens = field(default_factory=list)
    """New tokens of each prompt, in the last turn."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What it says of itself; ours, what the plan predicts."""
    memory: list[dict[str, list[int]]] = field(default_factory=list)
    """Of each rank: bytes per GPU that torch had given out after loading and at the peak, and that it held for that."""

    @property
    def what(self) -> str:
        """In words."""
        return self.contender.what.format(stages=self.request.stages)

    @property
    def tokens_per_second(self) -> list[float]:
        """New tokens per second of each turn."""
        count = self.request.requests * self.request.new_tokens
        return [count / seconds for seconds in self.seconds]

    @property
    def median(self) -> float | None:
        """New tokens per second, median over the turns; None without one."""
        return statistics.median(self.tokens_per_second) if self.seconds else None

    def check(self) -> str:
        """What is wrong with the last turn's tokens; empty if there are as many as were asked for."""
        lengths = sorted({len(each) for each in self.tokens})
        if len(self.tokens) != self.request.requests or lengths != [self.request.new_tokens]:
            return (
                f"made {lengths} tokens for {len(self.tokens)} prompts instead of {self.request.new_tokens} "
                f"for {self.request.requests}"
            )
        return ""

    def as_json(self, ours: Row, reference: Row | None) -> dict[str, Any]:
        """All figures; times in seconds.

        Args:
            ours: Whose rate is divided by this one's.
            reference: Whose tokens are compared with this one's; None if it did not run.
        """
        row: dict[str, Any] = {"name": self.contender.name, "what": self.what, "reason": self.reason or None}
        if not self.seconds or self.median is None:
            return row
        rates = self.tokens_per_second
        row |= {
            "seconds": self.seconds,
            "tokens_per_second": self.median,
            "lowest_tokens_per_second": min(rates),
            "highest_tokens_per_second": max(rates),
            "spread": (max(rates) - min(rates)) / self.median,
            "ours_is_faster_by": None if ours.median is None else ours.median / self.median,
        } | {
            kind: [count for rank in self.memory for count in rank[kind]] or None
            for kind in ("load_bytes", "peak_bytes", "reserved_bytes")
        }
        if reference is not None and reference.tokens and self.tokens:
            row |= equal_shares(self.tokens, reference.tokens)
        return row | self.facts


def equal_shares(ours: Tokens, theirs: Tokens) -> dict[str, float]:
    """Shares of equal tokens, of equal first tokens, and of rows that are equal to their end."""
    pairs = list(zip(ours, theirs, strict=True))
    each = [a == b for left, right in pairs for a, b in zip(left, right, strict=True)]
    return {
        "equal_tokens": statistics.mean(each),
        "equal_first_tokens": statistics.mean(left[0] == right[0] for left, right in pairs),
        "equal_rows": statistics.mean(left == right for left, right in pairs),
    }


def rows_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a terminal, the fastest first, then those that did not run."""
    table = Table(title="generation, new tokens per second", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "tokens/s", "spread", "seconds", "ours / it", "same tokens", "memory at peak"):
        table.add_column(column, justify="right" if column else "left")
    for row in sorted(rows, key=lambda each: -each.get("tokens_per_second", 0.0)):
        if "tokens_per_second" not in row:
            table.add_row(row["what"], "-", "", "", "", "", Text(row["reason"], style="dim"))
            continue
        ratio = row["ours_is_faster_by"]
        peaks = [format_bytes(peak) for peak in row["peak_bytes"] or ()]
        table.add_row(
            row["what"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['spread']:.1%}",
            format_seconds(statistics.median(row["seconds"])),
            "" if ratio is None or row["name"] == "ours" else f"{ratio:.2f}",
            f"{row['equal_tokens']:.1%}" if "equal_tokens" in row else "",
            ", ".join(peaks) or "not measured",
        )
    return table


def prediction_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of each row that was predicted: seconds and memory per stage beside what was measured."""
    lines = []
    for row in rows:
        if "predicted_seconds" not in row:
            continue
        measured = statistics.median(row["seconds"])
        seconds = _beside(row["predicted_seconds"], measured, format_seconds)
        lines.append(f"{row['what']}: {row['num_slots']} x {row['micro_batch']} rows in flight, predicted {seconds}")
        for kind, when in (("load_bytes", "after loading"), ("peak_bytes", "at the peak")):
            predicted = row[f"predicted_{kind}"]
            if row[kind] is None:
                lines.append(f"  memory {when}: predicted {', '.join(map(format_bytes, predicted))}; not measured")
                continue
            pairs = zip(predicted, row[kind], strict=True)
            lines.append(f"  memory {when}: predicted " + "; ".join(_beside(*pair, format_bytes) for pair in pairs))
    return lines


def _beside(predicted: Any, measured: Any, shown: Callable[[Any], str]) -> str:
    return f"{shown(predicted)} against {shown(measured)} ({predicted / measured - 1:+.1%})"
