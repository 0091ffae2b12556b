"""Why a plan is as fast as it is: what its slowest stage waits for, what one more device buys, how long it stays best.

Each sentence rests on solving again with one thing changed: without a limit, with fewer or more devices, with a
costlier head.
"""

from __future__ import annotations

import dataclasses
import math
from decimal import ROUND_FLOOR, Context, Decimal
from itertools import pairwise

import numpy as np

from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.objective import Constraints
from lp_plugin.plan import Plan
from lp_plugin.quantity import format_seconds
from lp_plugin.solver.criteria import StageLimits, stage_limits
from lp_plugin.solver.solve import solve
from lp_plugin.why.margins import PlanCase, fewest_devices, grown, head_room, least_seconds, slowest_parts

__all__ = ["why_notes"]

_SAME = 0.001
"""Two bottlenecks that differ by less than this share are called the same."""
_MATTERS = 0.02
"""The cache tier matters if it changes the slowest stage's seconds by more than this share."""
_MANY = 20_000
"""Layers times different stages; a solve takes about half a second there."""


def why_notes(plan: Plan, profile: ModelProfile, cluster: Cluster) -> tuple[str, ...]:
    """Sentences on the slowest stage, limits, devices and the head, as far as they apply to a plan that was decided.

    Most need another solve each; of very large chains only the slowest stage is explained.

    Args:
        plan: Made for just these.
        profile: The layers.
        cluster: A device or group per stage.
    """
    if plan.objective is None:
        return ()
    case = PlanCase(plan, profile, cluster)
    if not plan.bottleneck_seconds:
        return tuple(note for note in [_superfluous(case)] if note)
    notes = [_slowest(case), _cache(case)]
    if len({id(table) for table in case.tables}) * profile.num_layers > _MANY:
        notes.append("Limits, devices and the head are not tried one by one for a chain of this size.")
    else:
        notes += [_objective(case), _limits(case), _superfluous(case), _next_device(case), _head(case)]
    return tuple(note for note in notes if note)


def _slowest(case: PlanCase) -> str:
    """What the slowest stage spends its time on."""
    stage = case.plan.stages[case.slowest]
    parts = sorted(slowest_parts(case).items(), key=lambda part: -part[1])
    names = {"transfers": f"transfers ({', '.join(_links(case))})"}
    shares = [f"{seconds / stage.seconds:.0%} {names.get(name, name)}" for name, seconds in parts]
    shown = [share for share in shares if not share.startswith("0% ")]
    single = " It holds a single layer, which no partition at this granularity can split." if _is_single(case) else ""
    return (
        f"Stage {case.slowest} ({_run(stage.layers)} on {stage.device}) is the slowest with "
        f"{format_seconds(stage.seconds)}: {', '.join(shown)}.{single}"
    )


def _is_single(case: PlanCase) -> bool:
    return len(case.plan.stages[case.slowest].layers) == 1


def _run(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _links(case: PlanCase) -> list[str]:
    """Names of the links at the slowest stage."""
    position = case.slowest
    return list(dict.fromkeys(link.name for link in case.cluster.links[max(position - 1, 0) : position + 1]))


def _cache(case: PlanCase) -> str:
    """Whether the devices' first tier can matter; not said if the layers' seconds don't depend on tiers."""
    plan, cluster = case.plan, case.cluster
    names = {device.tiers[0].name for device in cluster.devices if len(device.tiers) > 1}
    if not names or any(layer.seconds is not None for layer in case.profile.layers):
        return ""
    first, now = " or ".join(sorted(names)), plan.bottleneck_seconds
    resident = max(stage.resident_seconds + stage.transfer_seconds for stage in plan.stages)
    away = max(
        float(table.compute_in(-1, np.array([stage.start]), np.array([stage.stop]))[0]) + stage.transfer_seconds
        for table, stage in zip(case.tables, plan.stages, strict=True)
    )
    if away > now * (1 + _MATTERS):
        return (
            f"The cache tier matters: if no stage's data stayed in {first}, the slowest stage would take "
            f"{format_seconds(away)} instead of {format_seconds(now)} ({away / now:.2f}x)."
        )
    if now > resident * (1 + _MATTERS):
        return (
            f"The cache tier could matter: if all data came from {first}, the slowest stage would take "
            f"{format_seconds(resident)} instead of {format_seconds(now)} ({now / resident:.2f}x faster)."
        )
    cause = max(slowest_parts(_from_first_tiers(case)).items(), key=lambda part: part[1])[0]
    is_same = now <= resident * (1 + _SAME)
    gain = f"take the same {format_seconds(now)}" if is_same else f"be at most {_MATTERS:.0%} faster"
    return (
        f"The cache tier can't matter here: even if all data came from {first}, the slowest stage would {gain}; "
        f"most of it is {cause}."
    )


def _from_first_tiers(case: PlanCase) -> PlanCase:
    """The same boundaries if all data came from each device's first tier."""
    stages = tuple(
        dataclasses.replace(stage, tier=device.tiers[0].name, compute_seconds=stage.resident_seconds)
        for stage, device in zip(case.plan.stages, case.cluster.devices, strict=True)
    )
    return PlanCase(dataclasses.replace(case.plan, stages=stages), case.profile, case.cluster)


def _objective(case: PlanCase) -> str:
    """What another objective than throughput costs in speed."""
    plan = case.plan
    if plan.objective == "throughput":
        return ""
    best = least_seconds(case.tables, case.profile.num_layers, case.limits, case.total_limit)
    if best >= plan.bottleneck_seconds * (1 - _SAME):
        return f"Planned for {plan.objective}, and no slower than if planned for throughput."
    return (
        f"Planned for {plan.objective}; planned for throughput, the slowest stage would take {format_seconds(best)} "
        f"instead of {format_seconds(plan.bottleneck_seconds)}."
    )


def _limits(case: PlanCase) -> str:
    """Which limits hold the slowest stage back, each found by solving without it."""
    plan, layers = case.plan, case.profile.num_layers
    if plan.objective != "throughput":
        return ""
    enough = plan.bottleneck_seconds * (1 - _SAME)
    free = plan.lower_bound_seconds
    if free < enough:
        free = least_seconds(case.alike, layers, StageLimits(memory_share=math.inf))
    if free >= enough:
        what = "Neither memory nor a constraint holds" if plan.constraints.given else "Memory does not hold"
        return f"{what} it back: without limits no partition is faster by 0.1%."
    found = []
    for name, limits, total in _relaxed(case):
        best = least_seconds(case.tables, layers, limits, total)
        if best < enough:
            found.append(f"without {name} the slowest stage would take {format_seconds(best)}")
    if not found:
        found = [f"without the memory limit and all constraints the slowest stage would take {format_seconds(free)}"]
    return f"What binds: {', '.join(found)} instead of {format_seconds(plan.bottleneck_seconds)}."


def _relaxed(case: PlanCase) -> list[tuple[str, StageLimits, float]]:
    """Each limit's name, and what is left without it."""
    constraints, workload = case.plan.constraints, case.plan.workload
    found = [("the memory limit", dataclasses.replace(case.limits, memory_share=math.inf), case.total_limit)]
    for name in constraints.given:
        alone = Constraints(**{name: getattr(constraints, name)}).as_text()
        found.append((f"'{alone}'", *stage_limits(dataclasses.replace(constraints, **{name: None}), workload)))
    return found


def _superfluous(case: PlanCase) -> str:
    """Says when fewer devices reach the same bottleneck."""
    plan = case.plan
    if plan.objective != "throughput":
        return ""
    boundaries, seconds = fewest_devices(case)
    if boundaries == plan.boundaries:
        return ""
    size = case.cluster.group_size
    unit = "devices" if size == 1 else f"groups of {size} devices"
    gain = seconds / plan.bottleneck_seconds - 1 if plan.bottleneck_seconds else 0.0
    fullest = _most_blocks(plan, plan.boundaries)
    blocks = "1 block" if fullest == 1 else f"{fullest} blocks"
    same = fullest > 0 and fullest == _most_blocks(plan, boundaries)
    return (
        f"{plan.num_stages} {unit} gain nothing over {len(boundaries) - 1} at this granularity: "
        f"the slowest stage takes {format_seconds(plan.bottleneck_seconds)} against {format_seconds(seconds)} "
        f"({gain:+.2%})" + (f", since the fullest device holds {blocks} either way." if same else ".")
    )


def _most_blocks(plan: Plan, boundaries: tuple[int, ...]) -> int:
    return max(sum(layer.kind == "block" for layer in plan.layers[low:high]) for low, high in pairwise(boundaries))


def _next_device(case: PlanCase) -> str:
    """What one more device like the last would buy."""
    plan = case.plan
    count = plan.num_stages + 1
    larger = grown(case.cluster, count) if count <= case.profile.num_layers else None
    if larger is None:
        return ""
    size, name = case.cluster.group_size, case.cluster.devices[-1].name
    what = f"One more {name}" if size == 1 else f"One more group of {size} x {name}"
    what += ", micro-batch as now"
    more = solve(case.profile, larger, plan.workload, plan.objective or "throughput", plan.constraints)
    if more is None:
        return f"{what}: no partition over {count} stages keeps to the memory and the constraints."
    gain = more.tokens_per_second / plan.tokens_per_second - 1
    parts = [
        f"slowest stage {_change(plan.bottleneck_seconds, more.bottleneck_seconds)}",
        f"{_rate(plan)} tokens/s as now"
        if abs(gain) < _SAME
        else f"{_rate(more)} tokens/s instead of {_rate(plan)} ({gain:+.1%})",
    ]
    if plan.objective == "latency":
        parts.insert(0, f"latency {_change(plan.latency_seconds, more.latency_seconds)}")
    if plan.objective == "sequences":
        parts.insert(0, f"room for {more.max_sequences:,} sequences instead of {plan.max_sequences:,}")
    if plan.objective == "memory":
        parts.insert(0, f"fullest device {more.memory_share:.1%} full instead of {plan.memory_share:.1%}")
    return f"{what}: {', '.join(parts)}."


def _rate(plan: Plan) -> str:
    rate = plan.tokens_per_second
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _change(now: float, then: float) -> str:
    if abs(then - now) <= _SAME * now:
        return f"{format_seconds(then)} as now"
    return f"{format_seconds(then)} instead of {format_seconds(now)}"


def _head(case: PlanCase) -> str:
    room = head_room(case)
    if room is None or not room.block_seconds:
        return ""
    now, most = room.seconds / room.block_seconds, room.most_seconds / room.block_seconds
    name = "the head" if room.layer == "head" else f"layer {room.layer!r}"
    if most == math.inf:
        return f"These boundaries stay optimal whatever {name} costs (now {now:.2g} blocks)."
    block = format_seconds(room.block_seconds)
    if most - now < _SAME:
        note = f"These boundaries stop being optimal once {name} costs more than now ({now:.2g} blocks)"
    else:
        note = f"These boundaries stay optimal until {name} costs {_blocks(most)}"
        note += f" (now {now:.2g}; a block takes {block})"
    free = room.free_seconds / room.block_seconds
    if free - most < _SAME:
        return f"{note}."
    return f"{note}; other boundaries stay as fast as these are now until {_blocks(free)}."


def _blocks(value: float) -> str:
    """Three digits, rounded down, so that what is said holds."""
    number = f"{Context(prec=3, rounding=ROUND_FLOOR).create_decimal(Decimal(value)):f}"
    return "1 block" if number == "1" else f"{number} blocks"
