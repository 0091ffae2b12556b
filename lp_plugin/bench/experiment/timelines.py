"""Profiled trials: where each rank's time went, and what it did when, as pictures and as traces for Perfetto."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lp_plugin.bench.experiment.pictures import new_axes
from lp_plugin.bench.experiment.results import CaseResult, Row
from lp_plugin.measure.intervals import make_intervals, shares
from lp_plugin.measured import TimeSplit
from lp_plugin.picture import save_figure

__all__ = ["spans_picture", "split_picture", "trace_of"]

_PARTS = {
    "compute alone": "#4477aa",
    "compute and communication at once": "#66ccee",
    "bytes moving, nothing computed": "#cc3311",
    "waiting for the peer": "#ee9988",
    "communication alone, moving or waiting": "#cc6677",
    "idle": "#dddddd",
}
_KINDS = {"compute": "#4477aa", "communication": "#cc3311"}
_COLUMNS = 1000
"""Of a timeline; what is shorter is drawn as the share of its column."""


def split_picture(case: CaseResult, path: Path) -> bool:
    """A bar per profiled rank of what its trial was made of.

    Returns:
        Whether there was anything to draw.
    """
    bars = [(f"{row.name}, rank {split.rank}", _parts(split)) for row in case.rows for split in row.split]
    if not bars:
        return False
    figure, axes = new_axes(11.0, 1.7 + 0.28 * len(bars))
    used = set()
    for place, (_, parts) in enumerate(bars):
        left = 0.0
        for name, share in parts.items():
            if share > 0:
                label = None if name in used else name
                axes.barh(place, share, left=left, color=_PARTS[name], height=0.8, label=label)
                used.add(name)
                if share > 4:
                    shade = "black" if name in {"idle", "compute and communication at once"} else "white"
                    axes.text(
                        left + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=7, color=shade
                    )
            left += share
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the profiled trial")
    axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [name for name in _PARTS if name in handles]
    figure.legend(
        [handles[name] for name in order], order, loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    figure.suptitle(f"{case.name}: where time went", fontsize=11)
    save_figure(figure, path)
    return True


def _parts(split: TimeSplit) -> dict[str, float]:
    """Shares in per cent, disjoint."""
    alone, moving = split.communication_seconds - split.overlap_seconds, split.exposed_transfer_seconds
    seconds = {
        "compute alone": split.compute_seconds - split.overlap_seconds,
        "compute and communication at once": split.overlap_seconds,
    }
    if moving is None:
        seconds["communication alone, moving or waiting"] = alone
    else:
        seconds |= {"bytes moving, nothing computed": moving, "waiting for the peer": alone - moving}
    seconds["idle"] = split.idle_seconds
    whole = split.wall_seconds or 1.0
    return {name: 100 * max(each, 0.0) / whole for name, each in seconds.items()}


def spans_picture(case: CaseResult, row: Row, path: Path) -> bool:
    """What every profiled rank computed and communicated, in two lanes, over the trial's time.

    Returns:
        Whether there was anything to draw.
    """
    lanes = [(split, kind) for split in row.split for kind in _KINDS if any(span.kind == kind for span in split.spans)]
    if not lanes:
        return False
    figure, axes = new_axes(11.0, 1.5 + 0.32 * len(lanes))
    end = max(span.stop_seconds for split in row.split for span in split.spans)
    scale, unit = (1.0, "s") if end >= 10 else (1e3, "ms") if end >= 1e-2 else (1e6, "us")
    for place, (split, kind) in enumerate(lanes):
        spans = [(span.start_seconds * 1e9, span.stop_seconds * 1e9) for span in split.spans if span.kind == kind]
        busy = shares(make_intervals(spans), round(end * 1e9), _COLUMNS)[None, :, None]
        extent = (0.0, end * scale, place + 0.38, place - 0.38)
        axes.imshow(1 - busy * (1 - _rgb(_KINDS[kind])), extent=extent, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(lanes)), [f"rank {split.rank}: {kind}" for split, kind in lanes], fontsize=8)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_xlim(0, end * scale)
    axes.set_xlabel(f"{unit}; the shade is the share of the time")
    axes.spines[["top", "right"]].set_visible(False)
    is_cut = end < 0.95 * max(split.wall_seconds for split in row.split)
    figure.suptitle(f"{case.name}, {row.name}: {'start of the' if is_cut else 'one'} profiled trial", fontsize=11)
    save_figure(figure, path)
    return True


def _rgb(colour: str) -> npt.NDArray[np.float64]:
    """Red, green and blue, 0 to 1, of such as ``#4477aa``."""
    return np.frombuffer(bytes.fromhex(colour[1:]), dtype=np.uint8) / 255


def trace_of(row: Row) -> str:
    """Spans as Chrome trace events, which Perfetto (https://ui.perfetto.dev) opens, in microseconds.

    JSON with a process per rank, a thread per lane and a complete event per span.

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
