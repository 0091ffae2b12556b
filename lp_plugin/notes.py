"""What a plan's reader should know beyond its numbers: short sentences, each computed from the plan."""

from __future__ import annotations

from lp_plugin.architecture import DTYPE_BYTES
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.plan import Plan
from lp_plugin.quantity import format_bytes, format_seconds
from lp_plugin.solve import solve

__all__ = ["plan_notes"]

NO_GAIN = 0.01
"""A faster bottleneck by less than this share is called no gain."""


def plan_notes(plan: Plan, profile: ModelProfile, cluster: Cluster) -> tuple[str, ...]:
    """Sentences on tier, micro-batch, KV cache and superfluous devices, as far as they apply."""
    notes = [_tier(plan, profile, cluster), _micro_batch(plan, profile, cluster)]
    notes.append(_faster_in_memory(plan, profile, cluster))
    notes.append(_kv_cache(plan, profile, cluster))
    notes.append(_superfluous(plan, profile, cluster))
    return tuple(note for note in notes if note)


def _tier(plan: Plan, profile: ModelProfile, cluster: Cluster) -> str:
    fast = cluster.devices[0].tiers[0]
    slow = {stage.tier for stage in plan.stages if stage.tier != fast.name}
    if not slow:
        return (
            f"Tier {fast.name}: every stage's working set stays in the {format_bytes(fast.capacity_bytes)} {fast.name}."
        )
    heaviest = max(profile.layers, key=lambda layer: layer.weight_traffic_bytes)
    if not heaviest.weight_traffic_bytes:
        return ""
    ratio = heaviest.weight_traffic_bytes / fast.capacity_bytes
    name = "a layer" if heaviest.kind == "block" else f"layer {heaviest.name!r}"
    if ratio > 1:
        return (
            f"Tier {', '.join(sorted(slow))}: {name} weighs {format_bytes(heaviest.weight_traffic_bytes)} and is "
            f"{ratio:.3g} x {fast.name.upper()} ({format_bytes(fast.capacity_bytes)}), so no partition at this "
            f"granularity can stay in {fast.name.upper()}."
        )
    worst = max(stage.working_set_bytes for stage in plan.stages)
    return (
        f"Tier {', '.join(sorted(slow))}: the largest working set is {format_bytes(worst)}, of which the usable "
        f"{format_bytes(fast.usable_bytes)} of {fast.name.upper()} hold too little."
    )


def _faster_in_memory(plan: Plan, profile: ModelProfile, cluster: Cluster) -> str:
    """Says when staying in the fast tier costs more than it gains: a freer cut would be faster."""
    if plan.objective != "throughput":
        return ""
    last = max(len(device.tiers) for device in cluster.devices) - 1
    free = solve(profile, cluster, plan.workload, "throughput", first_tier=last)
    if free is None or free.bottleneck_seconds >= plan.bottleneck_seconds * (1 - NO_GAIN):
        return ""
    return (
        f"Every stage stays in tier {plan.stages[0].tier}; boundaries {list(free.boundaries)} leave it and would make "
        f"the slowest stage {format_seconds(free.bottleneck_seconds)}, not {format_seconds(plan.bottleneck_seconds)}."
    )


def _micro_batch(plan: Plan, profile: ModelProfile, cluster: Cluster) -> str:
    workload = plan.workload
    if workload.phase == "decode" or plan.num_micro_batches == 1:
        return ""
    # what crosses a boundary: the last layer's output (logits) never does
    per_token = max([profile.input_bytes_per_token, *(layer.output_bytes_per_token for layer in profile.layers[:-1])])
    whole = per_token * workload.total_tokens
    one = per_token * workload.chosen_micro_batch * workload.tokens_per_sequence
    capacity = min(device.memory.capacity_bytes for device in cluster.devices)
    cut = (
        f"{plan.num_micro_batches} micro-batches of {workload.chosen_micro_batch} "
        f"({format_bytes(one)} of activations each)"
    )
    if whole > capacity:
        return (
            f"The batch must be cut: in one piece its activations at a stage boundary are {format_bytes(whole)}, "
            f"more than a device's {format_bytes(capacity)}. It is cut into {cut}."
        )
    return f"The batch is cut into {cut}, so that the bubble is {plan.bubble_fraction:.1%}."


def _kv_cache(plan: Plan, profile: ModelProfile, cluster: Cluster) -> str:
    """Whether the same batch could be decoded; only said when it couldn't."""
    workload = plan.workload
    per_token = sum(layer.kv_bytes_per_token for layer in profile.layers)
    if workload.phase != "prefill" or not per_token:
        return ""
    sizes = [
        layer.kv_bytes_per_token * min(workload.sequence, layer.window or workload.sequence) for layer in profile.layers
    ]
    per_sequence = sum(sizes)
    whole = per_sequence * workload.batch
    usable = sum(device.memory.usable_bytes for device in cluster.devices)
    weights = profile.num_parameters * DTYPE_BYTES[profile.dtype]
    if whole + weights <= usable:
        return ""
    room = max(0, (usable - weights) // per_sequence)
    total = sum(device.memory.capacity_bytes for device in cluster.devices)
    return (
        f"Prefill keeps no KV cache. Kept for decoding it would be {format_bytes(per_token)} per token, "
        f"{format_bytes(whole)} for this batch, against {format_bytes(total)} of device memory: "
        f"about {room} sequences would fit."
    )


def _superfluous(plan: Plan, profile: ModelProfile, cluster: Cluster) -> str:
    """Says when fewer devices reach the same bottleneck."""
    few = _fewest_stages(plan, profile, cluster)
    if few == plan.num_stages:
        return ""
    fewer = solve(profile, cluster.subset(few), plan.workload, "throughput")
    if fewer is None:
        return ""
    gain = fewer.bottleneck_seconds / plan.bottleneck_seconds - 1 if plan.bottleneck_seconds else 0.0
    note = (
        f"{plan.num_stages} devices gain nothing over {few} at this granularity: the slowest stage takes "
        f"{format_seconds(plan.bottleneck_seconds)} against {format_seconds(fewer.bottleneck_seconds)} ({gain:+.2%})"
    )
    fullest = _most_blocks(plan)
    same = fullest and fullest == _most_blocks(fewer)
    return note + (f", since the fullest device holds {fullest} blocks either way." if same else ".")


def _most_blocks(plan: Plan) -> int:
    return max(sum(name.startswith("block ") for name in stage.layers) for stage in plan.stages)


def _fewest_stages(plan: Plan, profile: ModelProfile, cluster: Cluster) -> int:
    """Fewest devices whose bottleneck is within `NO_GAIN` of the plan's (found by bisection)."""
    low, high = 1, plan.num_stages
    while low < high:
        middle = (low + high) // 2
        fewer = solve(profile, cluster.subset(middle), plan.workload, "throughput")
        if fewer is not None and fewer.bottleneck_seconds <= plan.bottleneck_seconds * (1 + NO_GAIN):
            high = middle
        else:
            low = middle + 1
    return low
