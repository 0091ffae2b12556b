"""CUDA graphs of a rank's passes, how long passes take, and whether graphs pay."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from lp_plugin.integrations.deepspeed.engine import slowest, stage_alone_seconds
from lp_plugin.measure.layers import synchronize

__all__ = ["captured", "pass_seconds"]

_WARM_UP_PASSES = 2
"""Before a capture, so that libraries have made their plans."""
_PASSES = 8
"""At most, that are launched or replayed at once: back to back, as in a pipeline."""
_REPLAYS = 4
"""Of such a graph, so that the launch of the next one is hidden, as in a pipeline."""
_SPAN_SECONDS = 30e-3
"""Between two looks at the clock: passes that take longer by themselves are not timed together."""


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures of a process: libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


def captured(
    work: Callable[[], None], device: torch.device, *, warm_up: Callable[[], None], pool: Any
) -> torch.cuda.CUDAGraph:
    """Records work as a CUDA graph.

    Args:
        work: Launches everything; asks the device for nothing. May send and receive, if that has happened before
            outside of a graph.
        device: Where it runs.
        warm_up: Runs a few times before: a part of the work that needs no other rank.
        pool: Memory pool of another graph that is still there and never runs at the same time; None for a new one.
    """
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_PASSES):
            warm_up()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):  # NCCL's thread goes on
        work()
    return graph


def pass_seconds(
    one_pass: Callable[[], None],
    device: torch.device,
    *,
    pool: Any,
    replayed: bool,
    warm_up_seconds: float = 0.5,
    group: Any = None,
) -> float:
    """Median seconds of a pass among passes back to back.

    Args:
        one_pass: Runs a micro-batch through a stage, without neighbours.
        device: Where it runs; passes on CPUs are timed one by one.
        pool: As for `captured`.
        replayed: Whether passes are replayed from a CUDA graph, rather than launched.
        warm_up_seconds: Least time before; GPUs lower their clocks under sustained load.
        group: Ranks that share the stage's layers, or None; they all call this.
    """
    count = min(_passes_in_span(one_pass, group), _PASSES) if device.type == "cuda" else 1

    def passes() -> None:
        for _ in range(count):
            one_pass()

    launch, rounds = passes, 1
    if replayed:
        launch, rounds = captured(passes, device, warm_up=one_pass, pool=pool).replay, _REPLAYS

    def launch_all() -> None:
        for _ in range(rounds):
            launch()

    warm_up_seconds = warm_up_seconds if device.type == "cuda" else 0.0
    seconds = stage_alone_seconds(lambda _: launch_all(), None, warm_up_seconds=warm_up_seconds, group=group)
    return seconds / (count * rounds)


def _passes_in_span(one_pass: Callable[[], None], group: Any) -> int:
    """How many passes, launched one by one, fill a span; the same on all ranks of the group."""
    for _ in range(_WARM_UP_PASSES):
        synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            one_pass()
        synchronize()
        seconds = slowest(time.perf_counter() - start, group)
    return math.ceil(_SPAN_SECONDS / seconds)
