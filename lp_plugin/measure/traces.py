"""What the torch profiler's trace of one process says that its device did."""

from __future__ import annotations

import bisect
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lp_plugin.measure.intervals import difference, make_intervals, union

__all__ = ["Event", "merge_events", "read_trace"]

MOST_EVENTS = 10_000
"""Drawn of one rank."""
_SHORTEST_NANOSECONDS, _PIECES = 1_000, 1_000
"""Pieces of time whose events are drawn as one: so long at least, and never fewer than so many in a trace."""
_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_NAME_LENGTH = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A kernel, or an operation of the host where it computes itself."""

    kind: Literal["compute", "communication"]
    """What."""
    name: str
    """As the profiler calls it."""
    lane: str
    """Stream or thread."""
    start: int
    """Nanoseconds since 1970."""
    stop: int
    """Likewise."""


def read_trace(path: Path, *, on_gpu: bool, since: int) -> list[Event]:
    """The device's events, in order of start.

    On a GPU they are kernels, copies and fills; those of NCCL are communication. On a CPU they are PyTorch's outermost
    operations, less the time in which they wait for communication inside, and Gloo's messages: from the request to the
    end of waiting for it.

    Args:
        path: Of a trace in Chrome's format.
        on_gpu: Whether the device is a GPU.
        since: Nanoseconds since 1970; what began before is left out.
    """
    trace = json.loads(path.read_text(encoding="utf-8"))
    base = int(trace["baseTimeNanoseconds"])
    rows = [row for row in trace["traceEvents"] if row.get("ph") == "X" and "dur" in row]
    events = _device_events(rows, base) if on_gpu else _host_events(rows, base)
    return sorted((event for event in events if event.start >= since), key=lambda event: (event.start, event.stop))


def merge_events(events: Iterable[Event]) -> list[Event]:
    """Few enough to be drawn, at most `MOST_EVENTS`.

    Neighbours of one kind on a lane become one, named after the first, where they begin in the same piece of time;
    pieces are as short as will do. What alternates too often is left out at the end.

    Args:
        events: In order of start.
    """
    drawn, piece = list(events), _SHORTEST_NANOSECONDS
    while len(drawn) > MOST_EVENTS and piece * _PIECES <= drawn[-1].start - drawn[0].start:
        drawn, piece = _merged(drawn, piece), 2 * piece
    return drawn[:MOST_EVENTS]


def _device_events(rows: Iterable[Mapping[str, Any]], base: int) -> list[Event]:
    return [
        _event(
            "communication" if "nccl" in row["name"] else "compute", f"stream {row['args'].get('stream')}", row, base
        )
        for row in rows
        if row.get("cat") in _DEVICE
    ]


def _host_events(rows: list[Mapping[str, Any]], base: int) -> list[Event]:
    ops: dict[Any, list[Event]] = defaultdict(list)
    calls: dict[Any, list[Event]] = defaultdict(list)
    messages: list[tuple[Any, Event]] = []
    for row in sorted(rows, key=lambda row: row["ts"]):
        thread, is_main = row["tid"], row["tid"] == row["pid"]
        if row.get("cat") == "cpu_op":
            kinds = calls if "c10d" in row["name"] else ops
            kinds[thread].append(_event("compute", "main" if is_main else f"thread {thread}", row, base))
        elif row.get("cat") == "user_annotation" and row["name"].startswith("gloo:"):
            message = _event("communication", row["name"].replace(":", " "), row, base)
            messages.append((thread, message))
            if not is_main:  # a thread of Gloo's: what it copies belongs to the message
                calls[thread].append(message)
    events = [piece for thread, own in ops.items() for piece in _less(_outermost(own), calls[thread])]
    return events + [_from_call(message, calls[thread]) for thread, message in messages]


def _from_call(message: Event, calls: Sequence[Event]) -> Event:
    """A message from the beginning of the call that it is in: a call sends, and then says so."""
    last = bisect.bisect_right(calls, message.start, key=lambda call: call.start) - 1
    inside = last >= 0 and message.start <= calls[last].stop
    return dataclasses.replace(message, start=calls[last].start) if inside else message


def _less(ops: Iterable[Event], calls: Sequence[Event]) -> Iterator[Event]:
    """What is left of each operation without the calls inside."""
    waits = union(make_intervals([(call.start, call.stop) for call in calls]))
    starts, stops = waits[:, 0].tolist(), waits[:, 1].tolist()
    for op in ops:
        inside = slice(bisect.bisect_right(stops, op.start), bisect.bisect_left(starts, op.stop))
        if inside.start < inside.stop:
            pieces = difference(make_intervals([(op.start, op.stop)]), waits[inside]).tolist()
            yield from (dataclasses.replace(op, start=start, stop=stop) for start, stop in pieces)
        else:
            yield op


def _event(kind: Literal["compute", "communication"], lane: str, row: Mapping[str, Any], base: int) -> Event:
    start = base + round(row["ts"] * 1e3)
    name = row["name"][:_NAME_LENGTH]
    return Event(kind=kind, name=name, lane=lane, start=start, stop=start + round(row["dur"] * 1e3))


def _outermost(ops: list[Event]) -> list[Event]:
    """Operations that began in no other one of the same thread."""
    kept: list[Event] = []
    for op in sorted(ops, key=lambda op: (op.start, -op.stop)):
        if not kept or op.start >= kept[-1].stop:
            kept.append(op)
    return kept


def _merged(events: Iterable[Event], piece: int) -> list[Event]:
    """Neighbours on a lane as one, where they are of one kind and begin in the same piece of time."""
    merged: list[Event] = []
    last: dict[str, int] = {}
    for event in events:
        at = last.get(event.lane)
        before = None if at is None else merged[at]
        if at is None or before is None or before.kind != event.kind or before.start // piece != event.start // piece:
            last[event.lane] = len(merged)
            merged.append(event)
        else:
            merged[at] = dataclasses.replace(before, stop=max(before.stop, event.stop))
    return merged
