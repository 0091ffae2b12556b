"""One device, its memory tiers, and a link between two devices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lp_plugin.errors import HardwareError
from lp_plugin.quantity import is_plain, shown

__all__ = ["COMPARED_BYTES", "Device", "Link", "MemoryTier", "check_count", "check_items", "is_whole", "slower_link"]

COMPARED_BYTES = 2**20
"""Links are compared by the time of a message of this size: it counts latency and bandwidth."""

_MAX_DEVICES = 65_536  # more is a slip of the keyboard
_SMALLEST, _LARGEST = 1e-30, 1e30  # beyond any quantity here; what is computed from them stays over 0 and finite


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTier:
    """One level of a device's memory hierarchy."""

    name: str
    """What it is called, such as "l2" or "hbm"."""

    capacity_bytes: int
    """Bytes in all, from the datasheet."""

    bandwidth_bytes_per_second: float
    """Nominal bytes per second, reads and writes together, from the datasheet or a microbenchmark."""

    usable_fraction: float = 1.0
    """Part of the capacity that a stage can count on, over 0 and at most 1; measured."""

    bandwidth_efficiency: float = 1.0
    """Achieved over nominal bandwidth, over 0 and at most 1; measured."""

    def __post_init__(self) -> None:
        _check(self, "capacity_bytes", "bandwidth_bytes_per_second", "usable_fraction", "bandwidth_efficiency")

    @property
    def usable_bytes(self) -> int:
        """Whole bytes a stage can count on: ``capacity_bytes * usable_fraction``."""
        return min(self.capacity_bytes, math.floor(self.capacity_bytes * self.usable_fraction))  # a float may round up

    @property
    def achieved_bytes_per_second(self) -> float:
        """Bytes per second in practice: ``bandwidth_bytes_per_second * bandwidth_efficiency``."""
        return self.bandwidth_bytes_per_second * self.bandwidth_efficiency


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or one process of a CPU: what a stage runs on."""

    name: str
    """The catalogue's name, or the user's."""

    tiers: tuple[MemoryTier, ...]
    """From the smallest and fastest to the one that holds the weights."""

    peak_flops: tuple[tuple[str, float], ...]
    """Pairs of dtype and its dense peak in operations per second, from the datasheet."""

    compute_efficiency: float
    """Achieved over peak operations per second in a large layer, over 0 and at most 1; measured."""

    layer_overhead_seconds: float
    """Least seconds of an eagerly launched transformer layer, however small (launch overhead); measured."""

    def __post_init__(self) -> None:
        check_items(f"Device {shown(self.name)}: tiers", self.tiers, MemoryTier)
        capacities = [tier.capacity_bytes for tier in self.tiers]
        if not capacities or sorted(set(capacities)) != capacities:
            bound = "at least one, from small to large"
            raise HardwareError(f"Device {shown(self.name)}: its tiers have {shown(capacities)} bytes; give {bound}.")
        if len({tier.name for tier in self.tiers}) < len(self.tiers):
            names = shown([tier.name for tier in self.tiers])
            raise HardwareError(f"Device {shown(self.name)}: its tiers are called {names}; give each its own name.")
        for fast, slow in pairwise(self.tiers):
            slower = slow.achieved_bytes_per_second <= fast.achieved_bytes_per_second
            if not slower or slow.usable_bytes < fast.usable_bytes:
                bound = "the next tier must be no faster and hold no less"
                names = f"{shown(fast.name)} and {shown(slow.name)}"
                raise HardwareError(f"Device {shown(self.name)}: tiers {names}: {bound}.")
        sound = isinstance(self.peak_flops, tuple) and all(_is_peak(pair) for pair in self.peak_flops)
        if not sound or not 0 < len(self.peak_flops) == len(dict(self.peak_flops)):
            bound = "at least one dtype, each once, with a peak over 0 and finite"
            raise HardwareError(f"Device {shown(self.name)}: peak_flops is {shown(self.peak_flops)}; give {bound}.")
        _check(self, "compute_efficiency", "layer_overhead_seconds")

    @property
    def memory(self) -> MemoryTier:
        """The tier that holds the weights: the last one."""
        return self.tiers[-1]

    @property
    def cache_bytes(self) -> int:
        """What the first tier can hold of a stage, if it is not the memory; else 0."""
        return self.tiers[0].usable_bytes if len(self.tiers) > 1 else 0

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the memory that no stage can count on: CUDA context, NCCL buffers, fragmentation."""
        return self.memory.capacity_bytes - self.memory.usable_bytes

    def flops(self, dtype: str) -> float:
        """Operations per second in practice, peak * efficiency; an unknown dtype raises HardwareError."""
        peaks = dict(self.peak_flops)
        if dtype not in peaks:
            raise HardwareError(f"{self.name} has no peak for dtype {dtype!r}; known: {', '.join(peaks)}.")
        return peaks[dtype] * self.compute_efficiency


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What joins two neighbouring devices; the same in both directions."""

    name: str
    """What it is called, such as "NVLink 4"."""

    bandwidth_bytes_per_second: float
    """Nominal bytes per second in one direction, from the datasheet."""

    latency_seconds: float
    """Seconds a small tensor takes from one process to the other; measured."""

    bandwidth_efficiency: float = 1.0
    """Achieved over nominal bandwidth of large tensors, over 0 and at most 1; measured."""

    collective_efficiency: float = 0.87
    """Bandwidth of a ring all-reduce over that of large tensors point to point, over 0 and at most 1.

    Measured on 2 x H200: all-reduce 289 GB/s at 164 MB and 237 GB/s at 34 MB, latency included, of 352 GB/s
    point to point. The line through both has a latency of 32 us and 307 GB/s.
    """

    def __post_init__(self) -> None:
        fields = ("bandwidth_bytes_per_second", "latency_seconds", "bandwidth_efficiency", "collective_efficiency")
        _check(self, *fields)

    def seconds(self, num_bytes: float) -> float:
        """Seconds to send ``num_bytes``: latency plus bytes over the achieved bandwidth."""
        return self.latency_seconds + num_bytes / (self.bandwidth_bytes_per_second * self.bandwidth_efficiency)

    def all_reduce_seconds(self, num_bytes: float, group_size: int) -> float:
        """Seconds of an all-reduce of ``num_bytes`` over ``group_size`` devices that this link joins.

        ``latency + 2 (n - 1) / n * bytes / (achieved bandwidth * collective efficiency)``; nothing for one device.
        One latency, whatever the size of the group: it is the launch that dominates, and for small tensors NCCL
        takes trees or writes directly to all peers. Not modelled: all-reduces inside the switch (NVLink SHARP), and
        several links at once (a mesh as of MI300X, all network ports of a node): there the figure is too high.

        Args:
            num_bytes: Bytes of the tensor, which each device holds.
            group_size: Devices that take part.

        Returns:
            Seconds.

        Raises:
            HardwareError: If the group is not 1 to 65,536 devices.

        Source:
            P. Patarasuk, X. Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, J. Parallel
            Distrib. Comput. 69 (2009): the factor. Latency: measured on 2 x H200, as for `collective_efficiency`.
        """
        check_count("group_size", group_size)
        if group_size == 1:
            return 0.0
        bandwidth = self.bandwidth_bytes_per_second * self.bandwidth_efficiency * self.collective_efficiency
        return self.latency_seconds + 2 * (group_size - 1) / group_size * num_bytes / bandwidth


def slower_link(left: Link, right: Link) -> Link:
    """The one that takes longer for a message of 1 MiB; ``left`` if they take equally long."""
    return max(left, right, key=lambda link: link.seconds(COMPARED_BYTES))


def check_count(what: str, value: int) -> None:
    """Raises HardwareError, which begins with ``what``, unless the value is a whole number from 1 to 65,536."""
    if not is_whole(value, _MAX_DEVICES):
        raise HardwareError(f"{what} is {shown(value)}; it must be a whole number, 1 to {_MAX_DEVICES}.")


def check_items(what: str, items: object, kind: type) -> None:
    """Raises HardwareError, which begins with ``what``, unless the items are a tuple of ``kind`` alone."""
    if not isinstance(items, tuple) or not all(isinstance(item, kind) for item in items):
        raise HardwareError(f"{what} is {shown(items)}; it must be a tuple of {kind.__name__}.")


def is_whole(value: int, largest: int) -> bool:
    """Whether the value is a whole number, no bool, from 1 to ``largest``."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest


def _is_number(value: float, smallest: float, largest: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and smallest <= value <= largest


def _is_peak(pair: Any) -> bool:
    named = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
    return named and _is_number(pair[1], _SMALLEST, _LARGEST)


def _check(item: Device | MemoryTier | Link, *fields: str) -> None:
    """Names are text; fractions and efficiencies are over 0 and at most 1, seconds at least 0, other fields over 0."""
    if not isinstance(item.name, str) or not item.name:
        raise HardwareError(f"{type(item).__name__}: name is {shown(item.name)}; it must be text, and not empty.")
    if not is_plain(item.name):
        raise HardwareError(f"{type(item).__name__}: name is {shown(item.name)}; leave out control characters.")
    for field in fields:
        value = getattr(item, field)
        largest = 1.0 if field.endswith(("_fraction", "_efficiency")) else _LARGEST
        smallest, bound = _SMALLEST, f"over 0 (at least {_SMALLEST:g}) and at most {largest:g}"
        if field.endswith("_seconds"):
            smallest, bound = 0.0, f"at least 0 and at most {largest:g}"
        if not _is_number(value, smallest, largest):
            raise HardwareError(
                f"{type(item).__name__} {shown(item.name)}: {field} is {shown(value)}; it must be {bound}."
            )
