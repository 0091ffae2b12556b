"""Messages between this job's processes, timed by size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import distributed

from lp_plugin.measure.graphs import recorded
from lp_plugin.measure.layers import synchronize
from lp_plugin.measure.turns import Repeated, median_of
from lp_plugin.measured import Links

__all__ = ["time_links"]

Way: TypeAlias = Callable[[Callable[[], Any], torch.Tensor], Repeated]
"""Times an exchange, which uses a tensor."""

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
    ways = (_repeated, _repeated_in_graphs) if device.type == "cuda" else (_repeated,)
    sends = [[_ping_pong(buffer[: size // 4], group, way) for size in sizes] for way in ways]
    reduces = [[_all_reduce(buffer[: size // 4], group, way) for size in sizes] for way in ways]
    mine = Links(
        send_bytes=sizes,
        send_seconds=_halves(sends[0]),
        reduce_bytes=sizes,
        reduce_seconds=_seconds(reduces[0]),
        ranks=ranks,
        replayed_send_seconds=_halves(sends[1]) if len(ways) > 1 else (),
        replayed_reduce_seconds=_seconds(reduces[1]) if len(ways) > 1 else (),
        spread=max(each.spread for each in (*sends[0], *reduces[0])),
    )
    box = [mine if distributed.get_rank(group) == 0 else None]
    distributed.broadcast_object_list(box, group=group, group_src=0)
    links = box[0]
    if links is None:  # a broadcast gives every rank what the first one has
        return Links()
    return links


def _seconds(times: Iterable[Repeated]) -> tuple[float, ...]:
    return tuple(each.seconds for each in times)


def _halves(times: Iterable[Repeated]) -> tuple[float, ...]:
    """There, of there and back."""
    return tuple(each.seconds / 2 for each in times)


def _sizes(device: torch.device) -> Iterator[int]:
    size = _SMALLEST
    while size <= _LARGEST[device.type]:
        yield size
        size *= _STEP


def _ping_pong(message: torch.Tensor, group: Any, timed: Way) -> Repeated:
    """There and back; nothing on ranks that take no part."""
    rank = distributed.get_rank(group)
    if rank > 1:
        return Repeated(seconds=0.0, spread=0.0)

    def there_and_back() -> None:
        if rank == 0:
            distributed.send(message, group=group, group_dst=1)
            distributed.recv(message, group=group, group_src=1)
        else:
            distributed.recv(message, group=group, group_src=0)
            distributed.send(message, group=group, group_dst=0)

    return timed(there_and_back, message)


def _all_reduce(message: torch.Tensor, group: Any, timed: Way) -> Repeated:
    """Of maxima, not sums, which would grow from one to the next until they overflow."""
    return timed(lambda: distributed.all_reduce(message, op=distributed.ReduceOp.MAX, group=group), message)


def _repeated(exchange: Callable[[], Any], message: torch.Tensor) -> Repeated:
    """One exchange of several, launched one by one; all ranks make as many."""
    return _timed(exchange, _count(message), 1, message.device)


def _repeated_in_graphs(exchange: Callable[[], Any], message: torch.Tensor) -> Repeated:
    """The same in a CUDA graph; the exchange has been made before."""
    count = _count(message)

    def exchange_again() -> None:
        for _ in range(count):
            exchange()

    return _timed(recorded(exchange_again).replay, 1, count, message.device)


def _count(message: torch.Tensor) -> int:
    return max(2, min(8, _SPAN_BYTES // (message.numel() * message.element_size())))


def _timed(run: Callable[[], Any], calls: int, exchanges: int, device: torch.device) -> Repeated:
    """One exchange, of ``calls`` between two looks at the clock that make ``exchanges`` each."""
    seconds = []
    for _ in range(_WARM_UP + _SPANS):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        seconds.append((time.perf_counter() - start) / (calls * exchanges))
    return median_of(seconds[_WARM_UP:])
