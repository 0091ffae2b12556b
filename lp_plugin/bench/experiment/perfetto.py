"""Spans of profiled ranks as Chrome trace events, which Perfetto (https://ui.perfetto.dev) opens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lp_plugin.bench.experiment.results import Row

__all__ = ["trace_of"]


def trace_of(row: Row) -> str:
    """JSON with a process per rank, a thread per lane and a complete event per span, in microseconds.

    Source:
        Trace Event Format, Google, 2016: "Complete Events" and "Metadata Events".
    """
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": list(_events(row))}) + "\n"


def _events(row: Row) -> Iterator[dict[str, Any]]:
    for split in row.split:
        yield _named("process", split.rank, 0, f"rank {split.rank}")
        lanes = {lane: number for number, lane in enumerate(dict.fromkeys(span.lane for span in split.spans))}
        for lane, number in lanes.items():
            yield _named("thread", split.rank, number, lane)
        for span in split.spans:
            yield {
                "ph": "X",
                "name": span.name,
                "cat": span.kind,
                "pid": split.rank,
                "tid": lanes[span.lane],
                "ts": span.start_seconds * 1e6,
                "dur": (span.stop_seconds - span.start_seconds) * 1e6,
            }


def _named(what: str, rank: int, lane: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{what}_name", "pid": rank, "tid": lane, "args": {"name": name}}
