"""Messages between this job's processes, timed by size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import distributed

from lp_plugin.measure.turns import synchronize
from lp_plugin.measured import Links

__all__ = ["time_links"]

Way: TypeAlias = Callable[[Callable[[], Any], torch.Tensor], float]
"""Gives the median seconds of an exchange, which uses a tensor."""

_SMALLEST = 2**12
_LARGEST = {"cuda": 2**28, "cpu": 2**24}
_STEP = 4
_WARM_UP, _SPANS = 1, 7
_SPAN_BYTES = 2**22
"""Messages between two looks at the clock hold this much together: at least 2 of them, at most 8."""


def time_links(device: torch.device, group: Any = None) -> Links:
    """Times messages from the first rank to the second, and all-reduces over all; collective over the group.

    A message's time is half a ping-pong's; an all-reduce's is that of one of several, each started when the last is
    under way. Both are medians of warm repeats, on GPUs launched one by one and once more inside of CUDA graphs.
    Tensors are of float32.

    Args:
        device: Where this rank's tensors lie.
        group: The processes; None for all of the job.

    Returns:
        The times, the same on every rank; none if there is but one.
    """
    ranks = distributed.get_world_size(group)
    if ranks == 1:
        return Links()
    sizes = tuple(_sizes(device))
    buffer = torch.randn(sizes[-1] // 4, device=device)
    ways = (_median_seconds, _median_replayed_seconds) if device.type == "cuda" else (_median_seconds,)
    sends = [tuple(_ping_pong_seconds(buffer[: size // 4], group, way) for size in sizes) for way in ways]
    reduces = [tuple(_all_reduce_seconds(buffer[: size // 4], group, way) for size in sizes) for way in ways]
    mine = Links(
        send_bytes=sizes,
        send_seconds=sends[0],
        reduce_bytes=sizes,
        reduce_seconds=reduces[0],
        ranks=ranks,
        replayed_send_seconds=sends[1] if len(ways) > 1 else (),
        replayed_reduce_seconds=reduces[1] if len(ways) > 1 else (),
    )
    box = [mine if distributed.get_rank(group) == 0 else None]
    distributed.broadcast_object_list(box, group=group, group_src=0)
    links = box[0]
    if links is None:  # a broadcast gives every rank what the first one has
        return Links()
    return links


def _sizes(device: torch.device) -> Iterator[int]:
    size = _SMALLEST
    while size <= _LARGEST[device.type]:
        yield size
        size *= _STEP


def _ping_pong_seconds(message: torch.Tensor, group: Any, seconds_of: Way) -> float:
    """Half of the time there and back; 0 on ranks that take no part."""
    rank = distributed.get_rank(group)
    if rank > 1:
        return 0.0

    def there_and_back() -> None:
        if rank == 0:
            distributed.send(message, group=group, group_dst=1)
            distributed.recv(message, group=group, group_src=1)
        else:
            distributed.recv(message, group=group, group_src=0)
            distributed.send(message, group=group, group_dst=0)

    return seconds_of(there_and_back, message) / 2


def _all_reduce_seconds(message: torch.Tensor, group: Any, seconds_of: Way) -> float:
    """Of maxima, not sums, which would grow from one to the next until they overflow."""
    return seconds_of(lambda: distributed.all_reduce(message, op=distributed.ReduceOp.MAX, group=group), message)


def _median_seconds(exchange: Callable[[], Any], message: torch.Tensor) -> float:
    """Of one exchange of several, launched one by one; all ranks make as many."""
    count = _count(message)
    return _median_of(exchange, count, message.device)


def _median_replayed_seconds(exchange: Callable[[], Any], message: torch.Tensor) -> float:
    """The same in a CUDA graph; the exchange has been made before."""
    count = _count(message)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread goes on
        for _ in range(count):
            exchange()
    return _median_of(graph.replay, 1, message.device) / count


def _count(message: torch.Tensor) -> int:
    return max(2, min(8, _SPAN_BYTES // (message.numel() * message.element_size())))


def _median_of(run: Callable[[], Any], count: int, device: torch.device) -> float:
    """Seconds of one of ``count`` runs between two looks at the clock."""
    seconds = []
    for _ in range(_WARM_UP + _SPANS):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        synchronize(device)
        seconds.append((time.perf_counter() - start) / count)
    return statistics.median(seconds[_WARM_UP:])
