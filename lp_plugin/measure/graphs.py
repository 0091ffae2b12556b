"""CUDA graphs: how they are recorded, and what else their kernels' times depend on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["recorded", "spread_over_streams"]

_WARM_UP_RUNS = 2
_STREAMS = 6
"""One more is too few in some processes; three never were."""


def recorded(
    work: Callable[[], Any], *, warm_up: Callable[[], Any] | None = None, pool: Any = None
) -> torch.cuda.CUDAGraph:
    """Records work as a CUDA graph on this process's GPU.

    Args:
        work: Launches everything; asks the device for nothing. May send and receive, if that has happened before
            outside of a graph.
        warm_up: Runs a few times before, so that libraries have made their plans: a part of the work that needs no
            other rank. None if there is nothing to plan.
        pool: Memory pool of another graph that is still there and never runs at the same time; None for a new one.
    """
    stream = _capture_stream(torch.cuda.current_device())
    if warm_up is not None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                warm_up()
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):  # NCCL's thread goes on
        work()
    return graph


@functools.cache
def spread_over_streams(device: torch.device) -> None:
    """Brings a GPU's process into the state in which jobs replay graphs; to be called before graphs are timed alone.

    Seen on H200s (torch 2.11, driver 580): in a process that has launched kernels on two streams, as one has that
    records and replays a graph, a graph's kernels follow each other at once. When it has launched on a few more, as
    jobs do (NCCL has its own), 0.2 to 0.4 us are left between any two from then on: 10% of small layers' time.
    """
    if device.type != "cuda":
        return
    number = torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    for _ in range(_STREAMS):
        with torch.cuda.stream(torch.cuda.Stream(device)):
            number.add_(1.0)
    torch.cuda.synchronize(device)


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all graphs of a process: libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)
