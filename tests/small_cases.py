"""Small clusters and models, and all partitions of them tried one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from lp_plugin import Cluster, Device, LayerCost, Link, MemoryTier, ModelProfile, Plan, Workload
from lp_plugin.objective import Constraints
from lp_plugin.solver.solve import evaluate

ONE = Workload(batch=1, sequence=1, micro_batch=1)
FREE = Link(name="free", bandwidth_bytes_per_second=1.0, latency_seconds=0.0)


def device(*capacities: int) -> Device:
    """A device of 1 FLOP/s whose tiers have these capacities and 8 bytes/s, each half as fast as the one before."""
    tiers = tuple(
        MemoryTier(name=f"tier{index}", capacity_bytes=capacity, bandwidth_bytes_per_second=8.0 / 2**index)
        for index, capacity in enumerate(capacities)
    )
    return Device(
        name="own",
        tiers=tiers,
        peak_flops=(("float32", 1.0), ("float16", 1.0)),
        compute_efficiency=1.0,
        layer_overhead_seconds=0.0,
    )


def chain(seconds: Sequence[float], head: float, outputs: Sequence[float] | None = None) -> ModelProfile:
    """Blocks with measured seconds, and a head."""
    leaving = outputs or [0.0] * len(seconds)
    blocks = [
        LayerCost(name=f"block {i}", kind="block", block=i, seconds=value, output_bytes_per_token=leaving[i])
        for i, value in enumerate(seconds)
    ]
    layers = (*blocks, LayerCost(name="head", kind="head", seconds=head))
    return ModelProfile(name="chain", layers=layers, dtype="float16", input_bytes_per_token=0.0)


def every_plan(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Iterator[Plan]:
    """All partitions, whether or not they fit."""
    layers, stages = profile.num_layers, len(cluster.devices)
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        yield evaluate(profile, cluster, workload, (0, *cuts, layers))


def keeps(plan: Plan, constraints: Constraints, cluster: Cluster, *, memory: bool = True) -> bool:
    """Whether a plan keeps to the devices' memory and to every bound, read from its figures."""
    tokens, rounds, rate = plan.workload.total_tokens, plan.num_micro_batches, constraints.min_tokens_per_second or 0.0
    for stage, where in zip(plan.stages, cluster.devices, strict=True):
        usable = {tier.name: tier.usable_bytes for tier in where.tiers}
        broken = (
            memory and stage.memory_bytes > stage.capacity_bytes,
            stage.memory_bytes > (constraints.max_memory_bytes or math.inf),
            stage.max_sequences is not None and stage.max_sequences < (constraints.min_sequences or 0),
            stage.seconds > 0 and tokens / (rounds * stage.seconds) < rate,
            constraints.tier is not None and stage.working_set_bytes > usable[constraints.tier],
        )
        if any(broken):
            return False
    if plan.workload.phase == "decode" and plan.latency_seconds > 0 and tokens / plan.latency_seconds < rate:
        return False
    return plan.latency_seconds <= (constraints.max_latency_seconds or math.inf)
