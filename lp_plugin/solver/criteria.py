"""What the solver minimises, and what it must not exceed: a `StageTable` seen as seconds, memory or room.

Each class is a `lp_plugin.solver.partition.StageCosts`. Limits that only tighten as a stage grows (memory, tier, room)
make ``inner`` infinite; a limit on seconds, which depend on the cuts too, is left to ``allowed``.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lp_plugin.errors import HardwareError
from lp_plugin.objective import Constraints
from lp_plugin.solver.cost import StageTable
from lp_plugin.solver.layer_table import FloatArray, IntArray
from lp_plugin.workload import Workload

__all__ = [
    "Criterion",
    "MemoryShare",
    "MissingRoom",
    "Seconds",
    "StageLimits",
    "most_room",
    "stage_limits",
    "turn_limits",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimits:
    """What one stage must keep to."""

    memory_share: float = 1.0
    """Of the device's usable memory; inf to ignore it."""
    memory_bytes: float = float("inf")
    """On the device."""
    seconds: float = float("inf")
    """Of one micro-batch, transfers included."""
    sequences: float = 0
    """Whose KV cache must fit."""
    tier: str | None = None
    """Slowest tier that the working set may need."""
    trained: bool = False
    """Whether the stage must hold a layer with parameters: engines make an optimizer per stage, of at least one."""


def stage_limits(constraints: Constraints, workload: Workload) -> tuple[StageLimits, float]:
    """Limits of each stage, and of the sum of all stages' seconds, that a user's constraints come to.

    A rate of full-pipeline tokens per second is a limit on the slowest stage; when decoding, where a micro-batch
    comes round only after all stages, on their sum as well. A latency is a limit on that sum; when decoding, where the
    other micro-batches come between, on the slowest stage as well.
    """
    total = constraints.max_latency_seconds if constraints.max_latency_seconds is not None else float("inf")
    seconds = float("inf")
    rate = constraints.min_tokens_per_second
    if rate is not None:
        tokens, count = workload.total_tokens, workload.num_micro_batches
        seconds = _largest(lambda value: tokens / (count * value) >= rate, tokens / rate / count)
        if workload.phase == "decode":
            total = min(total, _largest(lambda value: tokens / value >= rate, tokens / rate))
    limits = StageLimits(
        memory_bytes=constraints.max_memory_bytes or float("inf"),
        seconds=seconds,
        sequences=constraints.min_sequences or 0,
        tier=constraints.tier,
    )
    if workload.phase == "decode" and constraints.max_latency_seconds is not None:
        limits = turn_limits(limits, constraints.max_latency_seconds, workload.num_micro_batches)
    return limits, total


def turn_limits(limits: StageLimits, latency_seconds: float, rounds: int) -> StageLimits:
    """Limits under which the slowest stage works off all micro-batches of a turn in time; the same without turns."""
    if not rounds:
        return limits
    slowest = _largest(lambda value: rounds * value <= latency_seconds, latency_seconds / rounds)
    return dataclasses.replace(limits, seconds=min(limits.seconds, slowest))


def _largest(holds: Callable[[float], bool], near: float) -> float:
    """The largest float that holds, if smaller ones do too and rounding alone parts it from ``near``."""
    if math.isinf(near):
        return near
    while not holds(near):
        near = math.nextafter(near, 0.0)
    while holds(above := math.nextafter(near, math.inf)):
        near = above
    return near


class Criterion(ABC):
    """A stage under limits."""

    def __init__(self, table: StageTable, limits: StageLimits) -> None:
        self.table = table
        self.limits = limits
        self.entry = np.zeros_like(table.entry)
        self.exit = np.zeros_like(table.exit)
        self._tier = None if limits.tier is None else _tier_index(table, limits.tier)
        self._with_parameters = np.cumsum([0, *(layer.parameters > 0 for layer in table.table.layers)])

    def _within(self, starts: IntArray, stops: IntArray) -> NDArray[np.bool_]:
        """Limits that hold for every shorter run too."""
        limits, table = self.limits, self.table
        total = table.total_bytes(starts, stops)
        fits = (total / table.device.memory.usable_bytes <= limits.memory_share) & (total <= limits.memory_bytes)
        if limits.sequences:
            fits &= table.room(starts, stops) >= limits.sequences
        if self._tier is not None:
            fits &= table.tier(starts, stops) <= self._tier
        if limits.seconds < float("inf"):
            fits &= table.compute(starts, stops) <= limits.seconds
        return np.asarray(fits)

    @cached_property
    def _always_within(self) -> bool:
        """Whether even all layers together are within the limits."""
        return bool(self._within(np.array([0]), np.array([len(self.table.table.layers)]))[0])

    def allowed(self, starts: IntArray, stops: IntArray) -> NDArray[np.bool_]:
        """The limit on seconds, and something to train."""
        allowed = np.ones(np.shape(stops), dtype=np.bool_)
        table = self.table
        if self.limits.trained:
            allowed &= self._with_parameters[stops] > self._with_parameters[starts]
        if self.limits.seconds < float("inf"):
            allowed &= table.entry[starts] + table.compute(starts, stops) + table.exit[stops] <= self.limits.seconds
        return allowed

    def inner(self, starts: IntArray, stops: IntArray) -> FloatArray:
        """Cost of the run; inf where a limit is exceeded."""
        if self._always_within:
            return self._cost(starts, stops)
        return np.where(self._within(starts, stops), self._cost(starts, stops), np.inf)

    @abstractmethod
    def _cost(self, starts: IntArray, stops: IntArray) -> FloatArray:
        """Cost of the run, whether or not it is within the limits."""


class Seconds(Criterion):
    """Seconds of a stage for one micro-batch, transfers included."""

    def __init__(self, table: StageTable, limits: StageLimits) -> None:
        super().__init__(table, limits)
        self.entry, self.exit = table.entry, table.exit

    def _cost(self, starts: IntArray, stops: IntArray) -> FloatArray:
        return self.table.compute(starts, stops)


class MemoryShare(Criterion):
    """Share of the device's usable memory that a stage takes."""

    def _cost(self, starts: IntArray, stops: IntArray) -> FloatArray:
        return self.table.total_bytes(starts, stops) / self.table.device.memory.usable_bytes


class MissingRoom(Criterion):
    """``most`` less the sequences whose KV cache fits, or 0: least where most fit."""

    def __init__(self, table: StageTable, limits: StageLimits, most: float) -> None:
        super().__init__(table, limits)
        self._most = most

    def _cost(self, starts: IntArray, stops: IntArray) -> FloatArray:
        return self._most - np.minimum(self.table.room(starts, stops), self._most)


def most_room(tables: Sequence[StageTable], num_layers: int) -> float:
    """Sequences that any layer alone has room for on any device; 0 if none keeps a KV cache."""
    index = np.arange(num_layers)
    rooms = np.stack([table.room(index, index + 1) for table in {id(table): table for table in tables}.values()])
    return float(np.max(rooms, where=np.isfinite(rooms), initial=0.0))


def _tier_index(table: StageTable, name: str) -> int:
    names = [tier.name for tier in table.device.tiers]
    if name not in names:
        raise HardwareError(f"{table.device.name} has no memory tier {name!r}; it has {', '.join(names)}.")
    return names.index(name)
