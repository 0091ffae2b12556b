"""Messages between this job's processes, timed by size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed

from lp_plugin.measure.turns import synchronize
from lp_plugin.measured import Links

__all__ = ["time_links"]

_SMALLEST = 2**12
_LARGEST = {"cuda": 2**28, "cpu": 2**24}
_STEP = 4
_WARM_UP, _SPANS = 1, 7
_SPAN_BYTES = 2**22
"""Messages between two looks at the clock hold this much together: at least 2 of them, at most 8."""


def time_links(device: torch.device, group: Any = None) -> Links:
    """Times messages from the first rank to the second, and all-reduces over all; collective over the group.

    A message's time is half a ping-pong's; an all-reduce's is that of one of several, each started when the last is
    under way. Both are medians of warm repeats. Tensors are of float32.

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
    sends = tuple(_ping_pong_seconds(buffer[: size // 4], group) for size in sizes)
    reduces = tuple(_all_reduce_seconds(buffer[: size // 4], group) for size in sizes)
    box = [
        Links(send_bytes=sizes, send_seconds=sends, reduce_bytes=sizes, reduce_seconds=reduces, ranks=ranks)
        if distributed.get_rank(group) == 0
        else None
    ]
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


def _ping_pong_seconds(message: torch.Tensor, group: Any) -> float:
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

    return _median_seconds(there_and_back, message) / 2


def _all_reduce_seconds(message: torch.Tensor, group: Any) -> float:
    """Of maxima, not sums, which would grow from one to the next until they overflow."""
    return _median_seconds(lambda: distributed.all_reduce(message, op=distributed.ReduceOp.MAX, group=group), message)


def _median_seconds(exchange: Callable[[], Any], message: torch.Tensor) -> float:
    """Of one exchange of several; all ranks make as many."""
    count = max(2, min(8, _SPAN_BYTES // (message.numel() * message.element_size())))
    seconds = []
    for _ in range(_WARM_UP + _SPANS):
        synchronize(message.device)
        start = time.perf_counter()
        for _ in range(count):
            exchange()
        synchronize(message.device)
        seconds.append((time.perf_counter() - start) / count)
    return statistics.median(seconds[_WARM_UP:])
