"""The error for a request that no partition keeps to: which stage, layer or bound is at fault, and what would help."""

from __future__ import annotations

from collections import Counter

import numpy as np

from lp_plugin.errors import InfeasibleError
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.objective import Constraints, Objective
from lp_plugin.plan import Plan
from lp_plugin.quantity import format_bytes, format_seconds
from lp_plugin.report import as_text, stage_table
from lp_plugin.solver.cost import StageTable, stage_tables
from lp_plugin.solver.criteria import stage_limits
from lp_plugin.solver.layer_table import FloatArray, IntArray
from lp_plugin.solver.partition import partition
from lp_plugin.solver.solve import emptiest, evaluate, solve
from lp_plugin.why.changes import relaxations, remedies, smallest_layers, tier_remedies
from lp_plugin.why.feasible import Request, attainable
from lp_plugin.workload import Workload

__all__ = ["infeasible_error"]

_BEST_AT: dict[str, Objective] = {
    "max_latency_seconds": "latency",
    "min_tokens_per_second": "throughput",
    "min_sequences": "sequences",
    "max_memory_bytes": "memory",
    "tier": "memory",
}
"""The objective that comes closest to a bound."""


def infeasible_error(
    profile: ModelProfile, cluster: Cluster, workload: Workload, constraints: Constraints
) -> InfeasibleError:
    """The error for a request that no partition keeps to: table, offending rows, verified remedies.

    Args:
        profile: The layers.
        cluster: A device per stage.
        workload: Its micro-batch may be open; then the smallest one is shown.
        constraints: What was to be kept to, beside the devices' memory.
    """
    request = Request(profile=profile, cluster=cluster, workload=workload, constraints=constraints)
    if not request.without(*constraints.given).is_feasible:
        return _too_large(request)
    if constraints.tier is not None:
        others = [name for name in constraints.given if name != "tier"]
        if not request.without(*others).is_feasible:
            return _leaves_tier(request, constraints.tier)
    return _contradiction(request)


def _too_large(request: Request) -> InfeasibleError:
    """The memory does not suffice."""
    plan = emptiest(request.profile, request.cluster, _smallest(request.workload))
    worst = max(plan.stages, key=lambda stage: stage.memory_bytes / stage.capacity_bytes)
    kinds = {
        "weights": worst.weight_bytes,
        "the KV cache": worst.kv_bytes,
        "activations": worst.activation_bytes,
        "buffers": worst.buffer_bytes,
        "gradients and Adam states": worst.training_bytes,
    }
    largest = max(kinds, key=lambda kind: kinds[kind])
    return InfeasibleError(
        f"{request.profile.name} does not fit {_what(request)}: even the emptiest "
        f"partition needs {format_bytes(worst.memory_bytes)} on one device of {format_bytes(worst.capacity_bytes)} "
        f"usable, most of it for {largest}.",
        table=as_text(stage_table(plan)),
        remedies=remedies(request),
    )


def _leaves_tier(request: Request, tier: str) -> InfeasibleError:
    """Working sets are larger than the tier that was asked for."""
    workload = _smallest(request.workload)
    tables = stage_tables(request.profile, request.cluster, workload)
    made = {id(table): _TierShare(table, tier) for table in tables}
    costs = [made[id(table)] for table in tables]
    boundaries = partition(costs, request.profile.num_layers) or ()
    plan = evaluate(request.profile, request.cluster, workload, boundaries)
    shares = [
        float(cost.inner(np.array([stage.start]), np.array([stage.stop]))[0])
        for cost, stage in zip(costs, plan.stages, strict=True)
    ]
    marks = {position: f"leaves {tier}" for position, share in enumerate(shares) if share > 1}
    found = tier_remedies(request)
    return InfeasibleError(
        f"{request.profile.name} can't keep every stage in tier {tier} of {_what(request)}: "
        f"{_tier_reason(request, costs, plan, shares)}{'' if found else _nothing_fits(request, tier)}",
        table=as_text(stage_table(plan, marks)),
        remedies=found,
    )


def _nothing_fits(request: Request, tier: str) -> str:
    """How large the largest layer stays with the finest cut and the fewest bits."""
    text, least = smallest_layers(request)
    _, touched, usable = _largest_alone(least, tier)
    even = f" Even with {text} a layer touches {format_bytes(touched)}, {touched / usable:.3g} x." if text else ""
    return f"{even} No precision, finer cut, number of devices, micro-batch or sequence tried fits."


def _largest_alone(request: Request, tier: str) -> tuple[int, float, int]:
    """The layer that is furthest beyond the tier of the device that suits it best, its bytes, that tier's."""
    profile = request.profile
    tables = stage_tables(profile, request.cluster, _smallest(request.workload))
    index = np.arange(profile.num_layers)
    distinct = [_TierShare(table, tier) for table in {id(table): table for table in tables}.values()]
    shares = np.array([cost.inner(index, index + 1) for cost in distinct])
    layer = int(np.argmax(np.min(shares, axis=0)))
    best = distinct[int(np.argmin(shares[:, layer]))]
    touched = best.table.working_set(np.array([layer]), np.array([layer + 1]))
    return layer, float(touched[0]), max(best.tier.usable_bytes, 1)


def _tier_reason(request: Request, costs: list[_TierShare], plan: Plan, shares: list[float]) -> str:
    """The layer that is too large alone; if there is none, the stage that is too large at the least."""
    layer, touched, usable = _largest_alone(request, costs[0].tier.name)
    if touched > usable:
        weights = request.profile.layers[layer].weight_traffic_bytes
        return (
            f"layer {request.profile.layers[layer].name!r} alone touches {format_bytes(touched)} per micro-batch "
            f"({format_bytes(weights)} of weights), {touched / usable:.3g} x the {format_bytes(usable)} usable."
        )
    worst = int(np.argmax(shares))
    stage, usable = plan.stages[worst], costs[worst].tier.usable_bytes
    return (
        f"every layer fits alone, but with {plan.num_stages} stages one touches at least "
        f"{format_bytes(stage.working_set_bytes)} per micro-batch, {stage.working_set_bytes / usable:.3g} x the "
        f"{format_bytes(usable)} usable."
    )


class _TierShare:
    """A stage's working set as a share of a tier's usable bytes; memory is ignored."""

    def __init__(self, table: StageTable, tier: str) -> None:
        self.table = table
        self.tier = next(level for level in table.device.tiers if level.name == tier)
        self.entry, self.exit = np.zeros_like(table.entry), np.zeros_like(table.exit)

    def inner(self, starts: IntArray, stops: IntArray) -> FloatArray:
        """The share."""
        return self.table.working_set(starts, stops) / max(self.tier.usable_bytes, 1)

    def allowed(self, starts: IntArray, stops: IntArray) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Any run."""
        return np.ones(np.broadcast_shapes(np.shape(starts), np.shape(stops)), dtype=np.bool_)


def _contradiction(request: Request) -> InfeasibleError:
    """The memory and the tier suffice alone, but not within all constraints."""
    constraints = request.constraints
    found = relaxations(request)
    named = ", ".join(f"{_alone(constraints, name)} ({name})" for name in constraints.given)
    rest = "with the others kept, " if len(constraints.given) > 1 else ""
    blamed = [rest + _best(request, relaxation.name, relaxation.value) for relaxation in found]
    if not found:
        alone = [(name, attainable(one, name)) for one, name in _each_alone(request) if not one.is_feasible]
        blamed = ["dropping any single one of them is not enough", *(_best(request, *pair) for pair in alone)]
    return InfeasibleError(
        f"{request.profile.name} on {_what(request)}: no partition meets: {named}. "
        + " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in blamed),
        table=_nearest_table(request, found[0].name if found else None),
        remedies=(*(relaxation.remedy for relaxation in found), *remedies(request)),
    )


def _each_alone(request: Request) -> list[tuple[Request, str]]:
    given = request.constraints.given
    return [(request.without(*(other for other in given if other != name)), name) for name in given]


def _alone(constraints: Constraints, name: str) -> str:
    """One bound in words."""
    return Constraints(**{name: getattr(constraints, name)}).as_text()


def _best(request: Request, name: str, value: float | None) -> str:
    """How far a bound would have to give."""
    if value is None:
        return f"{_alone(request.constraints, name)} is out of reach ({name})"
    words = {
        "max_latency_seconds": f"the latency is {format_seconds(value)} at best",
        "min_tokens_per_second": f"the rate is {f'{value:,.0f}' if value >= 100 else f'{value:.3g}'} tokens/s at best",
        "min_sequences": f"there is room for {value:,.0f} sequences at most",
        "max_memory_bytes": f"a device needs {format_bytes(value)} at least",
    }
    return f"{words[name]} ({name})"


def _nearest_table(request: Request, dropped: str | None) -> str:
    """The plan that comes closest without one constraint (without all if None), its offending stages marked."""
    constraints = request.constraints
    free = request.without(*([dropped] if dropped else constraints.given))
    objective = _BEST_AT[dropped or constraints.given[0]]
    plans = [
        solve(free.profile, free.cluster, free.workload.with_micro_batch(size), objective, free.constraints)
        for size in request.micro_batches
    ]
    fitting = [plan for plan in plans if plan is not None]
    if not fitting:
        return ""
    plan = max(fitting, key=lambda plan: -plan.latency_seconds if objective == "latency" else plan.tokens_per_second)
    return as_text(stage_table(plan, _marks(plan, constraints, request.cluster)))


def _marks(plan: Plan, constraints: Constraints, cluster: Cluster) -> dict[int, str]:
    """What each stage breaks."""
    limits, _ = stage_limits(constraints, plan.workload)
    marks = {}
    for position, (stage, device) in enumerate(zip(plan.stages, cluster.devices, strict=True)):
        names, found = [tier.name for tier in device.tiers], []
        if stage.memory_bytes > limits.memory_bytes:
            found.append(f"over {format_bytes(limits.memory_bytes)}")
        if stage.max_sequences is not None and stage.max_sequences < limits.sequences:
            found.append(f"room for {stage.max_sequences}")
        if stage.seconds > limits.seconds:
            found.append(f"too slow for {_too_fast(constraints, plan.workload, stage.seconds)}")
        if limits.tier is not None and names.index(stage.tier) > names.index(limits.tier):
            found.append(f"leaves {limits.tier}")
        if found:
            marks[position] = ", ".join(found)
    return marks


def _too_fast(constraints: Constraints, workload: Workload, stage_seconds: float) -> str:
    """The rate and the latency that a stage of so many seconds is too slow for; one of them at least."""
    rate, latency = constraints.min_tokens_per_second, constraints.max_latency_seconds
    asked = []
    if stage_seconds > stage_limits(Constraints(min_tokens_per_second=rate), workload)[0].seconds and rate is not None:
        asked.append(f"{f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'} tokens/s")
    if stage_seconds > stage_limits(Constraints(max_latency_seconds=latency), workload)[0].seconds and latency:
        asked.append(f"a latency of {format_seconds(latency)}")
    return " and ".join(asked)


def _smallest(workload: Workload) -> Workload:
    """With the micro-batch that takes the least memory, unless one was given."""
    return workload if workload.micro_batch is not None else workload.with_micro_batch(1)


def _what(request: Request) -> str:
    """Devices and workload in words."""
    workload, size = request.workload, request.cluster.group_size
    counts = Counter(device.name for device in request.cluster.devices)
    devices = " + ".join(f"{count * size} x {name}" for name, count in counts.items())
    return (
        f"{devices} in {workload.phase} with batch {workload.batch}, sequence {workload.sequence}, "
        f"micro-batch {_smallest(workload).micro_batch}"
    )
