"""How fast the device moves data, by working set: what each level of its memory holds, and how fast it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lp_plugin.measure.graphs import recorded
from lp_plugin.measure.turns import Runner, seconds_in_turns
from lp_plugin.quantity import parse_bytes

__all__ = ["Cache", "CopyRate", "Knee", "copy_rates", "find_caches", "find_knee"]

_SHARES = (0.125, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 2.0)
"""Working sets as shares of a cache."""
_MEMORY_BYTES = {"cuda": 2**31, "cpu": 2**27}
"""A working set that no cache holds."""
_IN_GRAPH = 16
_LEAST_GAIN = 1.1
"""A cache that is not so much faster than what lies behind it can't be told from it."""
_SYSTEM = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A level above the memory."""

    name: str
    """Such as ``l2``."""
    capacity_bytes: int
    """As driver or system report it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRate:
    """A tensor is read and another of its size written, over and over."""

    working_set_bytes: int
    """Of both tensors."""
    bytes_per_second: float
    """Read and written together."""
    spread: float = 0.0
    """Of the seconds of repeats, between the quartiles, over the median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knee:
    """What a stage can count on of a cache."""

    usable_fraction: float
    """Of its capacity."""
    bytes_per_second: float
    """Best rate of a working set that it holds."""


def find_caches(device: torch.device) -> tuple[Cache, ...]:
    """The caches that a whole device or process can use, smallest first; none if the system does not tell."""
    if device.type == "cuda":
        return (Cache(name="l2", capacity_bytes=int(torch.cuda.get_device_properties(device).L2_cache_size)),)
    found = {}
    for entry in sorted(_SYSTEM.glob("index*")):
        level, kind, size = ((entry / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size"))
        if level != "1" and kind in ("Unified", "Data"):
            found[f"l{level}"] = parse_bytes(size.replace("K", " KiB").replace("M", " MiB"))
    return tuple(Cache(name=name, capacity_bytes=found[name]) for name in sorted(found, key=found.__getitem__))


def copy_rates(device: torch.device, caches: Sequence[Cache]) -> tuple[CopyRate, ...]:
    """Rates for working sets around each cache, and for one that only the memory holds; smallest first.

    What is written is the negative of what is read: a plain copy may go past the cache. On a GPU many follow each
    other in a CUDA graph, so that launching them does not count.

    Args:
        device: To measure.
        caches: Of `find_caches`.
    """
    sizes = {math.floor(share * cache.capacity_bytes) for cache in caches for share in _SHARES}
    return tuple(_rate(device, size // 8 * 8) for size in sorted(sizes | {_MEMORY_BYTES[device.type]}))


def find_knee(cache: Cache, rates: Sequence[CopyRate], *, above_bytes: int = 0) -> Knee | None:
    """How much of a cache working sets can fill before they run at the speed of what lies behind.

    From the best rate on, it is the largest working set up to the cache's capacity such that it and all between are
    faster than the geometric mean of the best rate and the rate at twice the capacity.

    Args:
        cache: Which.
        rates: Of `copy_rates`.
        above_bytes: Capacity of the cache before it, whose working sets don't count.

    Returns:
        The knee; None if the cache is hardly faster than what lies behind.
    """
    inside = [rate for rate in rates if above_bytes < rate.working_set_bytes <= cache.capacity_bytes]
    beyond = [rate for rate in rates if rate.working_set_bytes > 2 * cache.capacity_bytes - 8]
    if not inside or not beyond:
        return None
    best, behind = max(inside, key=lambda rate: rate.bytes_per_second), beyond[0].bytes_per_second
    if best.bytes_per_second < _LEAST_GAIN * behind:
        return None
    threshold = math.sqrt(best.bytes_per_second * behind)
    fast = itertools.takewhile(lambda rate: rate.bytes_per_second >= threshold, inside[inside.index(best) :])
    *_, last = fast
    return Knee(usable_fraction=last.working_set_bytes / cache.capacity_bytes, bytes_per_second=best.bytes_per_second)


def _rate(device: torch.device, working_set_bytes: int) -> CopyRate:
    source = torch.randn(working_set_bytes // 8, device=device)
    target = torch.empty_like(source)

    def move() -> torch.Tensor:
        return torch.neg(source, out=target)

    def move_again() -> None:
        for _ in range(_IN_GRAPH):
            move()

    runner = Runner(run=move)
    if device.type == "cuda":
        move()
        runner = Runner(run=recorded(move_again).replay, passes=_IN_GRAPH)
    (timed,) = seconds_in_turns([runner], device, warm_up_seconds=0.05)
    return CopyRate(
        working_set_bytes=working_set_bytes,
        bytes_per_second=working_set_bytes / timed.seconds,
        spread=timed.spread,
    )
