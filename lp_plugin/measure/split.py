"""Where the time of one run went on every rank, by the torch profiler."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from lp_plugin.measure.intervals import Intervals, difference, intersection, make_intervals, measure, union
from lp_plugin.measure.layers import synchronize
from lp_plugin.measure.messages import Message, operation_of, transfers
from lp_plugin.measure.traces import Event, merge_events, read_trace
from lp_plugin.measured import Span, TimeSplit

__all__ = ["profile_run"]

_SECOND = 10**9
"""In nanoseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """One rank's run."""

    compute: Intervals
    """Disjoint."""
    communication: Intervals
    """Disjoint."""
    messages: list[Message]
    """In order of start."""
    drawn: list[Event]
    """For the timeline."""

    @classmethod
    def of(cls, events: list[Event]) -> _Record:
        """From all events, in order of start."""
        spoken = [event for event in events if event.kind == "communication"]
        return cls(
            compute=_covered([event for event in events if event.kind == "compute"]),
            communication=_covered(spoken),
            messages=[
                Message(operation=operation_of(event.name), lane=event.lane, start=event.start, stop=event.stop)
                for event in spoken
            ],
            drawn=merge_events(events),
        )


def profile_run(
    run: Callable[[], None],
    ranks: Sequence[int],
    *,
    tensor_groups: Sequence[Sequence[int]] = (),
    pipelines: Sequence[Sequence[int]] = (),
) -> tuple[TimeSplit, ...]:
    """Profiles a run on several ranks at once; collective over all ranks.

    The run is made twice: the first time warms up the profiler. On a GPU its kernels, copies and fills are recorded,
    on a CPU its operations and messages (Python's time between operations is idle there), with the clock that all
    processes of a host share. Being profiled costs time itself: take the seconds of a run from elsewhere.

    Args:
        run: Does this rank's part; not called on other ranks than ``ranks``.
        ranks: Who runs it.
        tensor_groups: Ranks that all-reduce together; left out, all of ``ranks`` do.
        pipelines: Ranks that send to each other, in order of stages; left out, all of ``ranks`` are one pipeline.

    Returns:
        One for each of ``ranks``, in their order; the same in every process.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    part: _Record | None = None
    if rank in ranks:
        part = _Record.of(_events(run))
    else:
        _wait()
    records = _gathered(rank, part)
    met = transfers(
        {rank: records[rank].messages for rank in ranks},
        tensor_groups=tensor_groups,
        pipelines=pipelines or [ranks],
    )
    busy = union(
        np.concatenate([part for rank in ranks for part in (records[rank].compute, records[rank].communication)])
    )
    begin, end = (int(busy[0, 0]), int(busy[-1, 1])) if len(busy) else (0, 0)
    return tuple(_split(rank, records[rank], met[rank], begin, end) for rank in ranks)


def _split(rank: int, record: _Record, met: Intervals | None, begin: int, end: int) -> TimeSplit:
    """One rank's share of the time line from ``begin`` to ``end``."""
    compute, communication = measure(record.compute), measure(record.communication)
    overlap = measure(intersection(record.compute, record.communication))
    exposed = None if met is None else measure(difference(met, record.compute))
    return TimeSplit(
        rank=rank,
        wall_seconds=(end - begin) / _SECOND,
        compute_seconds=compute / _SECOND,
        communication_seconds=communication / _SECOND,
        transfer_seconds=None if met is None else measure(met) / _SECOND,
        overlap_seconds=overlap / _SECOND,
        idle_seconds=(end - begin - compute - communication + overlap) / _SECOND,
        exposed_transfer_seconds=None if exposed is None else exposed / _SECOND,
        spans=tuple(
            Span(
                kind=event.kind,
                name=event.name,
                start_seconds=(event.start - begin) / _SECOND,
                stop_seconds=(event.stop - begin) / _SECOND,
                lane=event.lane,
            )
            for event in record.drawn
        ),
    )


def _events(run: Callable[[], None]) -> list[Event]:
    """What this rank's device does in a run that all begin together, after one that warms up."""
    on_gpu = _on_gpu()
    with profile(
        activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU],
        schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
    ) as profiler:
        _begin()
        run()
        synchronize()
        profiler.step()
        since = _begin()
        run()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return read_trace(path, on_gpu=on_gpu, since=since)


def _wait() -> None:
    """The part of a rank that does not run: others begin twice together."""
    _begin()
    _begin()


def _begin() -> int:
    """Waits for all; gives the time after that, nanoseconds since 1970."""
    if dist.is_initialized():
        dist.barrier(device_ids=[torch.cuda.current_device()] if _on_gpu() else None)
    synchronize()
    return time.time_ns()


def _on_gpu() -> bool:
    return torch.cuda.is_available() and (not dist.is_initialized() or "nccl" in dist.get_backend())


def _gathered(rank: int, record: _Record | None) -> dict[int, _Record]:
    """The records of all who have one, by rank; collective."""
    if not dist.is_initialized():
        return {rank: record} if record else {}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (rank, record))
    return {rank: record for rank, record in parts if record is not None}


def _covered(events: Sequence[Event]) -> Intervals:
    return union(make_intervals([(event.start, event.stop) for event in events]))
