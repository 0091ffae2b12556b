"""Whether any partition keeps to the memory and the constraints; how far one constraint would have to give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.objective import Constraints
from lp_plugin.solver.cost import StageTable, stage_tables, work_lower_bound
from lp_plugin.solver.criteria import Seconds, stage_limits
from lp_plugin.solver.layer_table import IntArray
from lp_plugin.solver.solve import least_latency, solve
from lp_plugin.workload import Workload, micro_batch_candidates

__all__ = ["Request", "attainable", "largest_integer"]

_ROUNDING = 1e-9
"""By which a sum of seconds may be off."""
_RATE_STEPS = 12
"""Halvings of the gap between a rate that can be had and one that can't."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a plan is asked for; changed with `dataclasses.replace`."""

    profile: ModelProfile
    """The layers."""
    cluster: Cluster
    """A device or group per stage."""
    workload: Workload
    """Its micro-batch may be open."""
    constraints: Constraints
    """What the plan must keep to, beside the devices' memory."""

    @property
    def micro_batches(self) -> list[int]:
        """Micro-batches to try: the smallest, which is easiest, unless larger ones may serve a constraint better.

        Memory, working sets and seconds of a micro-batch all grow with it; but a higher rate, and when decoding a
        sooner turn, may need a larger one.
        """
        sizes = micro_batch_candidates(self.workload)
        turns = self.workload.phase == "decode" and self.constraints.max_latency_seconds is not None
        return sizes if turns or self.constraints.min_tokens_per_second is not None else sizes[:1]

    @property
    def is_feasible(self) -> bool:
        """Whether any partition over all stages, with any micro-batch if it is left open, keeps to everything."""
        sizes = self.micro_batches
        fits = len(sizes) == 1 or self.without(*self.constraints.given)._is_feasible_with(sizes[0])  # quickly tried
        return fits and any(self._is_feasible_with(size) for size in sizes)

    def without(self, *names: str) -> Request:
        """With these constraints dropped."""
        return dataclasses.replace(self, constraints=dataclasses.replace(self.constraints, **dict.fromkeys(names)))

    def bound_to(self, name: str, value: Any) -> Request:
        """With another value for one constraint."""
        return dataclasses.replace(self, constraints=dataclasses.replace(self.constraints, **{name: value}))

    def least_latency(self, micro_batch: int) -> float:
        """Least `Plan.latency_seconds`; inf if the other constraints can't be kept."""
        limits, total = stage_limits(self.constraints, self.workload.with_micro_batch(micro_batch))
        tables = stage_tables(self.profile, self.cluster, self.workload.with_micro_batch(micro_batch))
        limits = dataclasses.replace(limits, seconds=min(limits.seconds, total))  # which shortens the search
        made = {id(table): Seconds(table, limits) for table in tables}
        costs = [made[id(table)] for table in tables]
        layers = self.profile.num_layers
        too_slow = work_lower_bound(tables, layers) > limits.seconds * (1 + _ROUNDING)
        too_slow = too_slow or _least_work(tables, layers) > total * (1 + _ROUNDING)
        if too_slow or not _can_fill(costs, layers):  # quickly tried
            return math.inf
        rounds = self.workload.with_micro_batch(micro_batch).num_micro_batches if self.workload.phase == "decode" else 0
        return least_latency(tables, layers, limits, total, rounds)

    def _is_feasible_with(self, micro_batch: int) -> bool:
        limits, total = stage_limits(self.constraints, self.workload.with_micro_batch(micro_batch))
        if limits.seconds < math.inf or total < math.inf:
            return self.least_latency(micro_batch) < math.inf
        tables = stage_tables(self.profile, self.cluster, self.workload.with_micro_batch(micro_batch))
        made = {id(table): Seconds(table, limits) for table in tables}
        return _can_fill([made[id(table)] for table in tables], self.profile.num_layers)


def _least_work(tables: list[StageTable], num_layers: int) -> float:
    """Seconds of all layers, each alone on the device that runs it fastest: no partition's latency is less."""
    index = np.arange(num_layers)
    distinct = {id(table): table for table in tables}.values()
    return float(np.sum(np.min([table.compute(index, index + 1) for table in distinct], axis=0)))


def _can_fill(stages: Sequence[Seconds], num_layers: int) -> bool:
    """Whether the layers can be cut so that each stage can hold its run: which cuts the first stages reach."""
    distinct = {id(stage): stage for stage in stages}
    index = np.arange(num_layers)
    if not np.all(np.any([stage.inner(index, index + 1) < np.inf for stage in distinct.values()], axis=0)):
        return False  # some layer alone is too much for every stage
    furthest = {key: _furthest(stage, num_layers) for key, stage in distinct.items()}
    reached = np.zeros(num_layers + 1, dtype=np.bool_)
    reached[0] = True
    for stage in stages:
        ends = furthest[id(stage)]
        starts = np.flatnonzero(reached[:-1] & (ends > np.arange(num_layers)))
        edges = np.zeros(num_layers + 2, dtype=np.int64)  # runs from a start can end at start + 1 .. its furthest
        np.add.at(edges, starts + 1, 1)
        np.add.at(edges, ends[starts] + 1, -1)
        reached = np.cumsum(edges[:-1]) > 0
    return bool(reached[num_layers])


def _furthest(stage: Seconds, num_layers: int) -> IntArray:
    """For each start the largest stop of a run that the stage can hold; the start itself if there is none."""
    low, high = np.arange(num_layers), np.full(num_layers, num_layers)
    starts = low
    while np.any(low < high):
        middle = (low + high + 1) // 2
        holds = stage.inner(starts, middle) < np.inf
        low, high = np.where(holds, middle, low), np.where(holds, high, middle - 1)
    return low


def attainable(request: Request, name: str) -> float | None:
    """The tightest value of one bound, no tighter than its own, that can be had while all others are kept.

    Args:
        request: Infeasible as it is.
        name: Field of `Constraints` with a number.

    Returns:
        Seconds, tokens per second, sequences or bytes; None if there is no such value.
    """
    free = request.without(name)
    if name == "max_latency_seconds":
        least = min(free.least_latency(size) for size in request.micro_batches)
        return least if least < math.inf else None
    if name == "min_tokens_per_second":
        return _best_rate(request, free)
    asked = getattr(request.constraints, name)
    if name == "min_sequences":
        return largest_integer(1, asked - 1, lambda value: request.bound_to(name, value).is_feasible)
    most = max(device.memory.usable_bytes for device in request.cluster.devices)
    saved = largest_integer(0, most - asked - 1, lambda less: request.bound_to(name, most - less).is_feasible)
    return None if saved is None else most - saved


def _best_rate(request: Request, free: Request) -> float | None:
    """Most tokens per second: exact but for the ring of decoding, where it may have to be found by bisection."""
    tokens, decode = request.workload.total_tokens, request.workload.phase == "decode"
    found, bounds = [], []
    for size in micro_batch_candidates(free.workload):
        workload = free.workload.with_micro_batch(size)
        plan = solve(free.profile, free.cluster, workload, "throughput", free.constraints)
        if plan is None:
            continue
        stages = plan.num_micro_batches * plan.bottleneck_seconds
        found.append(max(stages, plan.latency_seconds if decode else 0.0))
        bounds.append(max(stages, free.least_latency(size) if decode else 0.0))
    if not found or not min(bounds):
        return None
    low, high = tokens / min(found), tokens / min(bounds)
    for _ in range(_RATE_STEPS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if request.bound_to("min_tokens_per_second", middle).is_feasible:
            low = middle
        else:
            high = middle
    return low


def largest_integer(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """Largest number from ``low`` to ``high`` that holds, by bisection; None if ``low`` does not.

    The next larger number, if it is in range, has been tried and does not hold.
    """
    if low > high or not holds(low):
        return None
    found = low
    while found < high:
        middle = (found + high + 1) // 2
        if holds(middle):
            found = middle
        else:
            high = middle - 1
    return found
