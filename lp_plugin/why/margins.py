"""What a plan's speed rests on, in numbers: its slowest stage's parts, limits, devices and the head's cost.

`lp_plugin.why.reasons` puts them into words. Each is found by solving again with one thing changed.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from lp_plugin.errors import HardwareError
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.plan import Plan
from lp_plugin.solver.cost import StageTable, stage_tables, work_lower_bound
from lp_plugin.solver.criteria import Seconds, StageLimits, stage_limits
from lp_plugin.solver.layer_table import FloatArray, IntArray
from lp_plugin.solver.partition import StageCosts, least_bottleneck, partition, stage_cost

__all__ = ["NO_GAIN", "HeadRoom", "PlanCase", "fewest_devices", "grown", "head_room", "least_seconds", "slowest_parts"]

NO_GAIN = 0.01
"""A faster bottleneck by less than this share is not worth a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRoom:
    """How far the head's cost can rise before other boundaries are better."""

    layer: str
    """Name of the layer."""
    seconds: float
    """What it takes now, one micro-batch."""
    most_seconds: float
    """The most it may take while the boundaries stay optimal; inf if they always do."""
    free_seconds: float
    """The most it may take while some partition is as fast as the plan is now."""
    block_seconds: float
    """Median of the transformer blocks, one micro-batch."""


class PlanCase:
    """A plan with the tables and limits that it was made with."""

    def __init__(self, plan: Plan, profile: ModelProfile, cluster: Cluster) -> None:
        self.plan, self.profile, self.cluster = plan, profile, cluster
        self.limits, self.total_limit = stage_limits(plan.constraints, plan.workload)

    @cached_property
    def tables(self) -> list[StageTable]:
        """Costs of each stage position."""
        return stage_tables(self.profile, self.cluster, self.plan.workload)

    @cached_property
    def alike(self) -> list[StageTable]:
        """Positions with the same seconds share one, whatever their memory: for solves without limits."""
        links = (None, *self.cluster.links, None)
        groups = self.cluster.group_links or (None,) * len(self.tables)
        made: dict[object, StageTable] = {}
        keys = zip(self.cluster.devices, links, links[1:], groups, strict=False)
        return [made.setdefault(key, table) for key, table in zip(keys, self.tables, strict=True)]

    @property
    def slowest(self) -> int:
        """Position of the slowest stage, the first one among equals."""
        return self.plan.stage_seconds.index(self.plan.bottleneck_seconds)

    def tier(self, position: int) -> int:
        """Index of a stage's tier on its device."""
        tiers = self.cluster.devices[position].tiers
        return [tier.name for tier in tiers].index(self.plan.stages[position].tier)


def least_seconds(
    tables: list[StageTable], num_layers: int, limits: StageLimits, total_limit: float = math.inf
) -> float:
    """Seconds of the slowest stage of the best partition within the limits; inf if there is none.

    Args:
        tables: One per stage position.
        num_layers: Layers to place.
        limits: What each stage must keep to.
        total_limit: What all stages together may take.
    """
    return least_bottleneck(_seconds(tables, limits), num_layers, total_limit=total_limit)


def grown(cluster: Cluster, num_devices: int) -> Cluster | None:
    """The cluster with more of its last device (or group).

    Packed as the catalogue does it if the cluster is; else the last link is repeated.

    Args:
        cluster: At least one device.
        num_devices: At least as many as it has.

    Returns:
        The larger cluster; None if nothing says what the new devices are joined by.
    """
    more = num_devices - len(cluster.devices)
    first = cluster.devices[0]
    if cluster.group_size == 1 and all(device == first for device in cluster.devices):
        try:
            if cluster == Cluster.homogeneous(first, len(cluster.devices)):
                return Cluster.homogeneous(first, num_devices)
        except HardwareError:  # a device of the user's own, or too many
            pass
    if not cluster.links:
        return None
    return dataclasses.replace(
        cluster,
        devices=(*cluster.devices, *cluster.devices[-1:] * more),
        links=(*cluster.links, *cluster.links[-1:] * more),
        group_links=(*cluster.group_links, *cluster.group_links[-1:] * more),
    )


def slowest_parts(case: PlanCase) -> dict[str, float]:
    """Seconds of the slowest stage by what they go to; they add up to the stage's.

    Keys: ``compute``, ``launch overhead``, ``measured layers``, ``all-reduces``, ``transfers``, and the name of the
    stage's memory tier with `` bandwidth`` for layers that wait for it.
    """
    position = case.slowest
    stage, table, tier = case.plan.stages[position], case.tables[position], case.tier(position)
    device, layers = table.device, table.table
    run = np.arange(stage.start, stage.stop)
    alone = layers.seconds(device, tier)[run]
    whole = table.compute_in(tier, run, run + 1)
    compute = layers.flops[run] / device.flops(case.profile.dtype)
    moved = layers.moving_seconds(device, tier)[run]
    measured = ~np.isnan(layers.measured[run])
    by_compute, by_traffic = ~measured & (compute >= alone), ~measured & (compute < alone) & (moved >= alone)
    rest = ~measured & ~by_compute & ~by_traffic
    parts = {
        "compute": alone[by_compute],
        f"{stage.tier} bandwidth": alone[by_traffic],
        "launch overhead": alone[rest],
        "measured layers": alone[measured],
        "all-reduces": np.maximum(whole - alone, 0.0) if case.cluster.group_size > 1 else np.zeros(0),
        "transfers": np.array([stage.transfer_seconds]),
    }
    return {name: float(np.sum(seconds)) for name, seconds in parts.items() if np.sum(seconds) > 0}


def fewest_devices(case: PlanCase) -> tuple[tuple[int, ...], float]:
    """Boundaries over the fewest of the first devices within `NO_GAIN` of the plan's bottleneck; their bottleneck.

    Found by bisection; counts that the lower bound rules out are not solved.
    """
    plan, layers = case.plan, case.profile.num_layers
    enough = plan.bottleneck_seconds * (1 + NO_GAIN)

    def may_do(count: int) -> bool:
        return work_lower_bound(case.tables[:count], layers) <= enough

    low = bisect.bisect_left(range(1, plan.num_stages), True, key=may_do) + 1
    found, slowest = plan.boundaries, plan.bottleneck_seconds
    while low < len(found) - 1:
        middle = (low + len(found) - 1) // 2
        costs = _seconds(stage_tables(case.profile, case.cluster.subset(middle), plan.workload), case.limits)
        cuts = partition(costs, layers, total_limit=case.total_limit)
        seconds = math.inf
        if cuts is not None:
            seconds = max(stage_cost(cost, *run) for cost, run in zip(costs, pairwise(cuts), strict=True))
        if cuts is not None and seconds <= enough:
            found, slowest = cuts, seconds
        else:
            low = middle + 1
    return found, slowest


def head_room(case: PlanCase) -> HeadRoom | None:
    """The most that the head may cost while the plan's boundaries stay optimal; exact.

    Seconds are added to the head as it is, whatever tier its stage lives in. Let A be the slowest of the other stages
    and B the head's, d what is added: every partition costs max(A, B + d), all with the same slope. If another is
    better than the plan at some d, its A is below the plan's B + d and its B below the plan's B, and so it stays at any
    larger d: where the plan is optimal is an interval. It ends where the least A of partitions with a smaller B is.

    Returns:
        None where the question makes no sense: another objective, limits on seconds, a single stage, no blocks, or
        the head (the heaviest layer outside the blocks if there is none) neither first nor last.
    """
    plan, last = case.plan, case.profile.num_layers - 1
    has_bound = plan.constraints.max_latency_seconds or plan.constraints.min_tokens_per_second
    if plan.objective != "throughput" or has_bound or plan.num_stages == 1:
        return None
    costs = _layer_seconds(case)
    blocks: dict[int, float] = {}
    for layer, seconds in zip(plan.layers, costs, strict=True):
        if layer.block is not None:
            blocks[layer.block] = blocks.get(layer.block, 0.0) + seconds
    outside = [index for index, layer in enumerate(plan.layers) if layer.block is None]
    heads = [index for index in outside if plan.layers[index].kind == "head"]
    if not outside or not blocks:
        return None
    head = heads[-1] if heads else max(outside, key=lambda index: costs[index])
    if head not in {0, last}:
        return None
    position = 0 if head == 0 else plan.num_stages - 1
    stages = _seconds(case.tables, case.limits)
    with_head, slowest = plan.stages[position].seconds, plan.bottleneck_seconds
    less = math.nextafter(with_head, -math.inf)
    others: list[StageCosts] = [*stages]
    others[position] = _Bounded(case.tables[position], case.limits, less)
    bounded = {id(table): _Bounded(table, case.limits, slowest) for table in case.tables}
    alone: list[StageCosts] = [bounded[id(table)] for table in case.tables]
    alone[position] = stages[position]
    return HeadRoom(
        layer=plan.layers[head].name,
        seconds=costs[head],
        most_seconds=costs[head] + max(least_bottleneck(others, last + 1) - with_head, 0.0),
        free_seconds=costs[head] + slowest - least_bottleneck(alone, last + 1),
        block_seconds=statistics.median(blocks.values()),
    )


class _Bounded(Seconds):
    """A stage that costs nothing, but must not take more than a bound."""

    def __init__(self, table: StageTable, limits: StageLimits, bound: float) -> None:
        super().__init__(table, dataclasses.replace(limits, seconds=min(limits.seconds, bound)))
        self.entry, self.exit = np.zeros_like(table.entry), np.zeros_like(table.exit)

    def _cost(self, starts: IntArray, stops: IntArray) -> FloatArray:
        return np.zeros(np.shape(stops))


def _seconds(tables: list[StageTable], limits: StageLimits) -> list[Seconds]:
    made = {id(table): Seconds(table, limits) for table in tables}
    return [made[id(table)] for table in tables]


def _layer_seconds(case: PlanCase) -> list[float]:
    """Seconds of each layer on the device and in the tier of its stage."""
    found: list[float] = []
    for position, stage in enumerate(case.plan.stages):
        run = np.arange(stage.start, stage.stop)
        found += case.tables[position].compute_in(case.tier(position), run, run + 1).tolist()
    return found
