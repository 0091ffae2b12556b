"""Partitions of one profile on one cluster for one fixed micro-batch, described as a `Plan`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lp_plugin.errors import InfeasibleError, WorkloadError
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.objective import Constraints, Objective
from lp_plugin.plan import LayerFootprint, Plan, Stage
from lp_plugin.quantity import shown
from lp_plugin.solver.cost import StageTable, bottleneck_seconds, stage_tables, work_lower_bound
from lp_plugin.solver.criteria import (
    Criterion,
    MemoryShare,
    MissingRoom,
    Seconds,
    StageLimits,
    most_room,
    stage_limits,
    turn_limits,
)
from lp_plugin.solver.layer_table import IntArray
from lp_plugin.solver.partition import least_bottleneck, least_total, partition
from lp_plugin.workload import Workload

__all__ = ["emptiest", "evaluate", "fits", "least_latency", "solve", "uniform_boundaries"]


def solve(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    objective: Objective = "throughput",
    constraints: Constraints | None = None,
) -> Plan | None:
    """The best partition; None if none keeps to the memory and the constraints.

    Args:
        profile: The layers.
        cluster: A device per stage.
        workload: With its micro-batch chosen.
        objective: What is optimised first; among equals the slowest stage is as fast as possible, then the spread
            is smallest, then the boundaries are lexicographically first.
        constraints: What every stage must keep to, beside its device's memory.
    """
    bounds = constraints or Constraints()
    tables = stage_tables(profile, cluster, workload)
    limits, total = stage_limits(bounds, workload)
    if workload.phase == "train" and sum(layer.parameters > 0 for layer in profile.layers) >= len(tables):
        limits = dataclasses.replace(limits, trained=True)
    search = _Search(tables, profile.num_layers, limits, total, rounds=_rounds(workload))
    boundaries = search.best(objective)
    if boundaries is None:
        return None
    return _describe(profile, cluster, workload, tables, boundaries, objective, bounds)


class _Search:
    """One objective after the other over the same tables."""

    def __init__(
        self, tables: list[StageTable], num_layers: int, limits: StageLimits, total_limit: float, *, rounds: int
    ) -> None:
        self._tables = tables
        self._num_layers = num_layers
        self._limits = limits
        self._total_limit = total_limit
        self._rounds = rounds

    def best(self, objective: Objective) -> tuple[int, ...] | None:
        """Boundaries; None if nothing is within the limits."""
        limits, total = self._limits, self._total_limit
        if objective == "latency":
            least = least_latency(self._tables, self._num_layers, limits, total, self._rounds)
            if least == math.inf:
                return None
            limits, total = turn_limits(limits, least, self._rounds), min(total, least)
        elif objective == "memory":
            limits = dataclasses.replace(limits, memory_share=self._least_share())
        elif objective == "sequences":
            limits = dataclasses.replace(limits, sequences=self._most_sequences())
        if not (math.isfinite(limits.memory_share) and math.isfinite(limits.sequences)):
            return None
        return partition(self._seconds(limits), self._num_layers, total_limit=total)

    def _seconds(self, limits: StageLimits) -> list[Criterion]:
        return self._each(lambda table: Seconds(table, limits))

    def _least_share(self) -> float:
        return self._least(self._each(lambda table: MemoryShare(table, self._limits)))

    def _most_sequences(self) -> float:
        most = most_room(self._tables, self._num_layers)
        return most - self._least(self._each(lambda table: MissingRoom(table, self._limits, most)))

    def _least(self, criteria: list[Criterion]) -> float:
        seconds = self._seconds(self._limits)
        return least_bottleneck(criteria, self._num_layers, totals=seconds, total_limit=self._total_limit)

    def _each(self, make: Callable[[StageTable], Criterion]) -> list[Criterion]:
        """A criterion per position; equal tables share one."""
        made = {id(table): make(table) for table in self._tables}
        return [made[id(table)] for table in self._tables]


def least_latency(
    tables: Sequence[StageTable], num_layers: int, limits: StageLimits, total_limit: float, rounds: int
) -> float:
    """Least seconds until a micro-batch is through; when decoding, until its turn comes again.

    A turn takes as long as its way through all stages, and at least as long as the slowest stage needs for all
    micro-batches. Partitions are looked at by rising total: those with at most this total have no faster slowest stage
    than the one found, so what is left has a faster one, and a larger total.

    Args:
        tables: Of each stage position.
        num_layers: Layers to place.
        limits: Of each stage.
        total_limit: Of the sum of all stages' seconds.
        rounds: Micro-batches that take turns; 0 unless decoding.

    Returns:
        Seconds; inf if nothing is within the limits.
    """

    def seconds(within: StageLimits) -> list[Seconds]:
        made = {id(table): Seconds(table, within) for table in tables}
        return [made[id(table)] for table in tables]

    best, costs = math.inf, seconds(limits)
    total = least_total(costs, num_layers)
    while total < best and total <= total_limit:
        if not rounds:
            return total
        slowest = least_bottleneck(costs, num_layers, totals=costs, total_limit=total)
        best = min(best, max(total, rounds * slowest))
        costs = seconds(dataclasses.replace(limits, seconds=math.nextafter(slowest, 0.0)))
        total = least_total(costs, num_layers)
    return best


def _rounds(workload: Workload) -> int:
    return workload.num_micro_batches if workload.phase == "decode" else 0


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
    cuts = _checked(boundaries, profile.num_layers)
    if len(cuts) - 1 != len(cluster.devices):
        raise WorkloadError(f"{len(cuts) - 1} stages for {len(cluster.devices)} devices; give one device each.")
    tables = stage_tables(profile, cluster, workload)
    return _describe(profile, cluster, workload, tables, cuts, None, Constraints())


def _checked(boundaries: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The boundaries as plain numbers, NumPy's included, if they make sense."""
    whole = [bound for bound in boundaries if isinstance(bound, int | np.integer) and not isinstance(bound, bool)]
    rising = all(low < high for low, high in itertools.pairwise(whole))
    if len(whole) < max(len(boundaries), 2) or not rising or whole[0] != 0 or whole[-1] != num_layers:
        raise WorkloadError(
            f"boundaries {shown(list(boundaries))} must be whole numbers that rise from 0 to {num_layers}, the number "
            "of layers, without an empty stage."
        )
    return tuple(int(bound) for bound in whole)


def fits(plan: Plan) -> bool:
    """Whether every stage stays within its device's usable memory."""
    return all(stage.memory_bytes <= stage.capacity_bytes for stage in plan.stages)


def emptiest(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """The plan whose fullest device is as empty as possible, whether or not it fits."""
    tables = stage_tables(profile, cluster, workload)
    boundaries = _Search(tables, profile.num_layers, StageLimits(memory_share=math.inf), math.inf, rounds=0).best(
        "memory"
    )
    if boundaries is None:
        raise InfeasibleError("a layer's memory is not a finite number; check the profile.")
    return _describe(profile, cluster, workload, tables, boundaries, "memory", Constraints())


def uniform_boundaries(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Equally many layers per stage, the first stages one more where it does not divide: DeepSpeed's ``uniform``.

    Example:
        >>> uniform_boundaries(19, 4)
        (0, 5, 10, 15, 19)
    """
    size, more = divmod(num_layers, num_stages)
    return tuple(position * size + min(position, more) for position in range(num_stages + 1))


def _describe(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    tables: list[StageTable],
    boundaries: tuple[int, ...],
    objective: Objective | None,
    constraints: Constraints,
) -> Plan:
    table = tables[0].table
    footprints = tuple(
        LayerFootprint(
            name=layer.name,
            kind=layer.kind,
            block=layer.block,
            weight_bytes=layer.weight_bytes,
            activation_bytes=int(table.cuts[index + 1]),
            kv_bytes=int(table.kv_cache[index]),
            buffer_bytes=int(table.buffers[index]),
        )
        for index, layer in enumerate(profile.layers)
    )
    stages = _stages(profile, tables, boundaries)
    slowest = max(stage.seconds for stage in stages)
    return Plan(
        model_name=profile.name,
        model_type=None if profile.architecture is None else profile.architecture.model_type,
        dtype=profile.dtype,
        weight_dtype=profile.weight_dtype,
        workload=workload,
        objective=objective,
        constraints=constraints,
        tensor_parallel=profile.tensor_parallel,
        boundaries=boundaries,
        stages=stages,
        layers=footprints,
        lower_bound_seconds=min(work_lower_bound(tables, profile.num_layers), slowest),  # not above it by rounding
        uniform_seconds=bottleneck_seconds(tables, uniform_boundaries(profile.num_layers, len(tables))),
        model_digest=profile.digest,
        cluster_digest=cluster.digest,
        workload_digest=workload.digest,
    )


def _stages(profile: ModelProfile, tables: Sequence[StageTable], boundaries: Sequence[int]) -> tuple[Stage, ...]:
    """One `Stage` per position; positions with the same table are computed together."""
    names = [layer.name for layer in profile.layers]
    stages: dict[int, Stage] = {}
    for table in {id(table): table for table in tables}.values():
        positions = [position for position, other in enumerate(tables) if other is table]
        starts = np.array([boundaries[position] for position in positions])
        stops = np.array([boundaries[position + 1] for position in positions])
        for position, fields in zip(positions, _figures(table, starts, stops), strict=True):
            layers = tuple(names[fields["start"] : fields["stop"]])
            stages[position] = Stage(layers=layers, **fields)
    return tuple(stages[position] for position in range(len(tables)))


def _figures(table: StageTable, starts: IntArray, stops: IntArray) -> Iterator[dict[str, Any]]:
    """The fields of `Stage` for runs of layers on one device, but for the layers' names."""
    memory, device = table.memory(starts, stops), table.device
    room = table.room(starts, stops)
    whole = {
        "start": starts,
        "stop": stops,
        "weight_bytes": memory.weights,
        "kv_bytes": memory.kv_cache,
        "activation_bytes": memory.activations,
        "buffer_bytes": memory.buffers,
        "training_bytes": memory.training,
        "working_set_bytes": table.working_set(starts, stops),
        "traffic_bytes": table.traffic(starts, stops),
    }
    real = {
        "hit_fraction": table.hit_fraction(starts, stops),
        "compute_seconds": table.compute(starts, stops),
        "resident_seconds": table.compute_in(0, starts, stops),
        "transfer_seconds": table.entry[starts] + table.exit[stops],
    }
    for index, tier in enumerate(table.tier(starts, stops)):
        has_room = math.isfinite(room[index]) and not table.table.is_training
        yield {
            **{name: round(float(values[index])) for name, values in whole.items()},
            **{name: float(values[index]) for name, values in real.items()},
            "device": device.name,
            "tier": device.tiers[int(tier)].name,
            "capacity_bytes": device.memory.usable_bytes,
            "reserved_bytes": device.reserved_bytes,
            "max_sequences": max(int(room[index]), 0) if has_room else None,
        }
