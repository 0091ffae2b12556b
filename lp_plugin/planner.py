"""The entry point: a profile, a cluster and a workload -> a `Plan`."""

from __future__ import annotations

import dataclasses
from typing import get_args

from lp_plugin.errors import HardwareError, ModelConfigError, WorkloadError
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.objective import Constraints, Objective
from lp_plugin.plan import Plan
from lp_plugin.quantity import shown
from lp_plugin.solver.solve import solve
from lp_plugin.why.notes import plan_notes
from lp_plugin.why.remedy import infeasible_error
from lp_plugin.workload import Workload, micro_batch_candidates

__all__ = ["best_plan", "check_request", "make_plan"]


def make_plan(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    num_stages: int | None = None,
    *,
    objective: Objective = "throughput",
    constraints: Constraints | None = None,
) -> Plan:
    """The best layer-wise plan: exact for the given micro-batch, best over candidates if it is left open.

    Args:
        profile: The layers.
        cluster: Devices in pipeline order; the first ``num_stages`` are used.
        workload: What is asked; without a micro-batch the one that serves the objective best is chosen.
        num_stages: Stages; the number of devices if left out.
        objective: ``throughput`` (slowest stage as fast as possible), ``latency`` (least seconds through all
            stages), ``sequences`` (most sequences whose KV cache fits) or ``memory`` (fullest device as empty as
            possible).
        constraints: What the plan must keep to.

    Returns:
        The plan, its notes included.

    Raises:
        WorkloadError: If stages outnumber layers or devices, or sequences are longer than the model allows.
        HardwareError: If a device lacks the memory tier that the constraints name.
        InfeasibleError: If no partition fits the devices' memory and the constraints.

    Example:
        >>> profile = ModelProfile.from_costs([4, 18, 2, 5, 12, 11])
        >>> workload = Workload(batch=8, sequence=1, micro_batch=1)
        >>> make_plan(profile, Cluster.homogeneous("h200", 4), workload).boundaries
        (0, 1, 2, 5, 6)
    """
    bounds = Constraints() if constraints is None else constraints
    used = check_request(profile, cluster, workload, num_stages, objective, bounds)
    best = best_plan(profile, used, workload, objective, bounds)
    if best is None:
        raise infeasible_error(profile, used, workload, bounds)
    return dataclasses.replace(best, notes=plan_notes(best, profile, used))


def best_plan(
    profile: ModelProfile, cluster: Cluster, workload: Workload, objective: Objective, constraints: Constraints
) -> Plan | None:
    """The best plan over all candidates for the micro-batch, without notes; None if nothing fits."""
    best: Plan | None = None
    for micro_batch in micro_batch_candidates(workload):
        plan = solve(profile, cluster, workload.with_micro_batch(micro_batch), objective, constraints)
        if plan is not None and (best is None or _merit(plan) > _merit(best)):
            best = plan
    return best


def check_request(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    num_stages: int | None,
    objective: Objective,
    constraints: Constraints,
) -> Cluster:
    """The devices that are used, if the request makes sense; see `make_plan` for the errors."""
    for name, value, kind, error, remedy in (
        ("profile", profile, ModelProfile, ModelConfigError, "use ModelProfile.from_config"),
        ("cluster", cluster, Cluster, HardwareError, "use Cluster.parse"),
        ("workload", workload, Workload, WorkloadError, "use Workload(batch=..., sequence=...)"),
        ("constraints", constraints, Constraints, WorkloadError, "use Constraints(...), or leave them out"),
    ):
        if not isinstance(value, kind):
            raise error(f"{name} is {shown(value)}; it must be a {kind.__name__}: {remedy}.")
    if not isinstance(objective, str) or objective not in get_args(Objective):
        raise WorkloadError(f"objective is {shown(objective)}; it must be one of {', '.join(get_args(Objective))}.")
    keeps_cache = any(layer.kv_bytes_per_token for layer in profile.layers) and workload.phase != "train"
    if (objective == "sequences" or constraints.min_sequences) and not keeps_cache:
        raise WorkloadError(
            f"{profile.name} keeps no KV cache in {workload.phase}, so there is no room for sequences to plan for; "
            "plan for decode or prefill of a decoder, or choose another objective and leave min_sequences out."
        )
    if workload.phase == "train" and profile.weight_dtype is not None:
        raise WorkloadError(
            f"{profile.name} is stored in {profile.weight_dtype}, which is not trained: gradients need whole weights; "
            "plan for prefill or decode, or with weights in the model's dtype."
        )
    stages = len(cluster.devices) if num_stages is None else num_stages
    if not isinstance(stages, int) or isinstance(stages, bool) or not 1 <= stages <= profile.num_layers:
        raise WorkloadError(
            f"{shown(stages)} stages for {profile.name} with {profile.num_layers} layers (embedding, norm and head "
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
    return cluster.subset(stages)


def _merit(plan: Plan) -> tuple[float, float]:
    """What the objective makes of a plan, and its rate: the larger the better."""
    merits = {
        "latency": -plan.latency_seconds,
        "sequences": float(plan.max_sequences or 0),
        "memory": -plan.memory_share,
    }
    return merits.get(plan.objective or "", plan.tokens_per_second), plan.tokens_per_second
