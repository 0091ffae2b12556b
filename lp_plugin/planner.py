"""The entry point: a profile, a cluster and a workload -> a `Plan`."""

from __future__ import annotations

import dataclasses
from typing import get_args

from lp_plugin.errors import WorkloadError
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.notes import plan_notes
from lp_plugin.plan import Objective, Plan
from lp_plugin.remedy import infeasible_error
from lp_plugin.solve import solve
from lp_plugin.strategy import micro_batch_candidates
from lp_plugin.workload import Workload

__all__ = ["make_plan"]


def make_plan(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    num_stages: int | None = None,
    *,
    objective: Objective = "throughput",
) -> Plan:
    """The best layer-wise plan: exact for the given micro-batch, best over candidates if it is left open.

    The fastest memory tier is taken for which a partition exists whose every stage fits it; within it the slowest
    stage is as fast as possible.

    Args:
        profile: The layers.
        cluster: Devices in pipeline order; the first ``num_stages`` are used.
        workload: What is asked; without a micro-batch the one with the most tokens per second is chosen.
        num_stages: Stages; the number of devices if left out.
        objective: ``throughput`` (slowest stage as fast as possible) or ``memory`` (fullest device as empty as
            possible).

    Returns:
        The plan, its notes included.

    Raises:
        WorkloadError: If stages outnumber layers or devices, or sequences are longer than the model allows.
        InfeasibleError: If no partition fits the devices' memory.

    Example:
        >>> profile = ModelProfile.from_costs([4, 18, 2, 5, 12, 11])
        >>> workload = Workload(batch=8, sequence=1, micro_batch=1)
        >>> make_plan(profile, Cluster.homogeneous("h200", 4), workload).boundaries
        (0, 1, 2, 5, 6)
    """
    if objective not in get_args(Objective):
        raise WorkloadError(f"objective is {objective!r}; it must be one of {', '.join(get_args(Objective))}.")
    stages = _check(profile, cluster, workload, num_stages)
    used = cluster.subset(stages)
    best: Plan | None = None
    for micro_batch in micro_batch_candidates(workload):
        plan = solve(profile, used, workload.with_micro_batch(micro_batch), objective)
        if plan is not None and (best is None or plan.tokens_per_second > best.tokens_per_second):
            best = plan
    if best is None:
        raise infeasible_error(profile, used, workload)
    return dataclasses.replace(best, notes=plan_notes(best, profile, used))


def _check(profile: ModelProfile, cluster: Cluster, workload: Workload, num_stages: int | None) -> int:
    stages = len(cluster.devices) if num_stages is None else num_stages
    if not 1 <= stages <= profile.num_layers:
        raise WorkloadError(
            f"{stages} stages for {profile.name} with {profile.num_layers} layers (embedding, norm and head "
            f"included): each stage needs at least one layer; ask for 1 to {profile.num_layers} stages."
        )
    if stages > len(cluster.devices):
        raise WorkloadError(
            f"{stages} stages for {len(cluster.devices)} devices: each stage needs its own; "
            "name more devices or fewer stages."
        )
    if profile.max_positions is not None and workload.sequence > profile.max_positions:
        raise WorkloadError(
            f"sequence is {workload.sequence} tokens, but {profile.name} allows {profile.max_positions} "
            "(max_position_embeddings); shorten it."
        )
    return stages
