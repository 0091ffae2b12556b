"""Partitions of one profile on one cluster for one fixed micro-batch, described as a `Plan`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lp_plugin.cost import StageTable, stage_tables, work_lower_bound
from lp_plugin.errors import InfeasibleError, WorkloadError
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.partition import partition
from lp_plugin.plan import LayerFootprint, Objective, Plan, Stage
from lp_plugin.workload import Workload

__all__ = ["emptiest", "evaluate", "fits", "solve"]


def solve(
    profile: ModelProfile, cluster: Cluster, workload: Workload, objective: Objective, *, first_tier: int = 0
) -> Plan | None:
    """The best partition in the fastest tier that has one; None if memory is exceeded everywhere.

    Args:
        profile: The layers.
        cluster: A device per stage.
        workload: With its micro-batch chosen.
        objective: See `lp_plugin.planner.make_plan`.
        first_tier: The fastest tier to try.
    """
    if objective == "memory":
        plan = emptiest(profile, cluster, workload)
        return plan if fits(plan) else None
    for tier_limit in range(first_tier, max(len(device.tiers) for device in cluster.devices)):
        tables = stage_tables(profile, cluster, workload, tier_limit=tier_limit)
        boundaries = partition(tables, profile.num_layers)
        if boundaries is not None:
            return _describe(profile, cluster, workload, tables, boundaries, "throughput")
    return None


def evaluate(profile: ModelProfile, cluster: Cluster, workload: Workload, boundaries: Sequence[int]) -> Plan:
    """The plan of given boundaries, without deciding anything; memory may be exceeded.

    Args:
        profile: The layers.
        cluster: One device per stage.
        workload: With its micro-batch chosen.
        boundaries: Half-open, one more than stages.

    Raises:
        WorkloadError: If the boundaries don't rise from 0 to the number of layers, or don't match the cluster.
    """
    if len(boundaries) < 2:
        raise WorkloadError(f"boundaries {list(boundaries)} make no stage; give at least [0, {profile.num_layers}].")
    rising = all(low < high for low, high in itertools.pairwise(boundaries))
    if not rising or boundaries[0] != 0 or boundaries[-1] != profile.num_layers:
        raise WorkloadError(
            f"boundaries {list(boundaries)} must rise from 0 to {profile.num_layers}, the number of layers, "
            "without an empty stage."
        )
    if len(boundaries) - 1 != len(cluster.devices):
        raise WorkloadError(f"{len(boundaries) - 1} stages for {len(cluster.devices)} devices; give one device each.")
    slowest = max(len(device.tiers) for device in cluster.devices) - 1
    tables = stage_tables(profile, cluster, workload, tier_limit=slowest)
    return _describe(profile, cluster, workload, tables, tuple(int(bound) for bound in boundaries), None)


def fits(plan: Plan) -> bool:
    """Whether every stage is within its device's memory."""
    return all(stage.memory_bytes <= stage.capacity_bytes for stage in plan.stages)


class _MemoryCosts:
    """A stage's memory as a share of its capacity, for `partition`: the fullest device as empty as possible."""

    def __init__(self, table: StageTable, num_layers: int) -> None:
        self._table = table
        self.entry = self.exit = np.zeros(num_layers + 1)

    def inner(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.float64]:
        """Memory over capacity."""
        return self._table.memory(starts, stops).total / self._table.device.memory.usable_bytes


def emptiest(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """The partition whose fullest device is as empty as possible; may still exceed the memory."""
    slowest = max(len(device.tiers) for device in cluster.devices) - 1
    tables = stage_tables(profile, cluster, workload, tier_limit=slowest)
    costs = {id(table): _MemoryCosts(table, profile.num_layers) for table in tables}
    boundaries = partition([costs[id(table)] for table in tables], profile.num_layers)
    if boundaries is None:
        raise InfeasibleError("a layer's memory is not a finite number; check the profile.")
    return _describe(profile, cluster, workload, tables, boundaries, "memory")


def _describe(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    tables: list[StageTable],
    boundaries: tuple[int, ...],
    objective: Objective | None,
) -> Plan:
    table = tables[0].table
    footprints = tuple(
        LayerFootprint(
            name=layer.name,
            weight_bytes=layer.weight_bytes,
            activation_bytes=int(table.cuts[index + 1]),
            kv_bytes=int(table.kv_cache[index]),
            buffer_bytes=int(table.buffers[index]),
        )
        for index, layer in enumerate(profile.layers)
    )
    return Plan(
        model_name=profile.name,
        dtype=profile.dtype,
        workload=workload,
        objective=objective,
        boundaries=boundaries,
        stages=tuple(
            _stage(profile, stage, start, stop)
            for stage, start, stop in zip(tables, boundaries[:-1], boundaries[1:], strict=True)
        ),
        layers=footprints,
        lower_bound_seconds=work_lower_bound(tables, profile.num_layers),
        model_digest=profile.digest,
        cluster_digest=cluster.digest,
        workload_digest=workload.digest,
    )


def _stage(profile: ModelProfile, table: StageTable, start: int, stop: int) -> Stage:
    starts, stops = np.array([start]), np.array([stop])
    memory = table.memory(starts, stops)
    return Stage(
        start=start,
        stop=stop,
        layers=tuple(layer.name for layer in profile.layers[start:stop]),
        device=table.device.name,
        tier=table.device.tiers[int(table.tier(starts, stops)[0])].name,
        weight_bytes=int(memory.weights[0]),
        kv_bytes=int(memory.kv_cache[0]),
        activation_bytes=int(memory.activations[0]),
        buffer_bytes=int(memory.buffers[0]),
        training_bytes=int(memory.training[0]),
        working_set_bytes=int(table.working_set(starts, stops)[0]),
        capacity_bytes=table.device.memory.usable_bytes,
        compute_seconds=float(table.compute(starts, stops)[0]),
        transfer_seconds=float(table.entry[start] + table.exit[stop]),
    )
