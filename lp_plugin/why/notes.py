"""What a plan's reader should know beyond its numbers: short sentences, each computed from the plan."""

from __future__ import annotations

from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.plan import Plan
from lp_plugin.quantity import format_bytes
from lp_plugin.why.reasons import why_notes

__all__ = ["plan_notes"]


def plan_notes(plan: Plan, profile: ModelProfile, cluster: Cluster) -> tuple[str, ...]:
    """Sentences on tier, speed and its reasons, micro-batch and KV cache, as far as they apply.

    Args:
        plan: Made for just these.
        profile: The layers.
        cluster: A device or group per stage.
    """
    notes = [_tier(plan, profile, cluster), *why_notes(plan, profile, cluster)]
    notes += [_micro_batch(plan, profile, cluster), _kv_cache(plan, profile, cluster)]
    return tuple(note for note in notes if note)


def _tier(plan: Plan, profile: ModelProfile, cluster: Cluster) -> str:
    """Where the working sets live, and if not in the first tier, why."""
    firsts = {device.tiers[0] for device in cluster.devices}
    pairs = list(zip(plan.stages, cluster.devices, strict=True))
    slow = sorted({stage.tier for stage, device in pairs if stage.tier != device.tiers[0].name})
    fast = max(firsts, key=lambda tier: tier.capacity_bytes)
    if all(len(device.tiers) == 1 for device in cluster.devices):
        return ""
    if not slow:
        names = " or ".join(sorted({f"{format_bytes(tier.capacity_bytes)} {tier.name}" for tier in firsts}))
        return f"Tier {fast.name}: every stage's working set stays in the {names}."
    heaviest = max(profile.layers, key=lambda layer: layer.weight_traffic_bytes)
    ratio = heaviest.weight_traffic_bytes / fast.capacity_bytes
    name = "a layer" if heaviest.kind == "block" else f"layer {heaviest.name!r}"
    if ratio > 1:
        return (
            f"Tier {', '.join(slow)}: {name} weighs {format_bytes(heaviest.weight_traffic_bytes)} and is "
            f"{ratio:.3g} x {fast.name.upper()} ({format_bytes(fast.capacity_bytes)}), so no partition at this "
            f"granularity can stay in {fast.name.upper()}."
        )
    worst, device = max(pairs, key=lambda pair: pair[0].working_set_bytes / pair[1].tiers[0].usable_bytes)
    first = device.tiers[0]
    return (
        f"Tier {', '.join(slow)}: the largest working set is {format_bytes(worst.working_set_bytes)}, of which the "
        f"usable {format_bytes(first.usable_bytes)} of {first.name.upper()} hold too little."
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
    bubble = f"; the bubble is {plan.bubble_fraction:.1%}" if plan.num_stages > 1 else ""
    cut = (
        f"{plan.num_micro_batches} micro-batches of {workload.chosen_micro_batch} "
        f"({format_bytes(one)} of activations each){bubble}"
    )
    if whole > capacity:
        return (
            f"The batch must be cut: in one piece its activations at a stage boundary are {format_bytes(whole)}, "
            f"more than a device's {format_bytes(capacity)}. It is cut into {cut}."
        )
    return f"The batch is cut into {cut}."


def _kv_cache(plan: Plan, profile: ModelProfile, cluster: Cluster) -> str:
    """Whether the same batch could be decoded; only said when it couldn't."""
    workload, members = plan.workload, plan.tensor_parallel
    per_token = sum(layer.kv_bytes_per_token for layer in profile.layers) * members
    if workload.phase != "prefill" or not per_token:
        return ""
    kept = [min(workload.sequence, layer.kv_window or workload.sequence) for layer in profile.layers]
    sizes = [layer.kv_bytes_per_token * count for layer, count in zip(profile.layers, kept, strict=True)]
    per_sequence = sum(sizes) * members
    whole = per_sequence * workload.batch
    usable = sum(device.memory.usable_bytes for device in cluster.devices) * members
    weights = sum(stage.weight_bytes for stage in plan.stages) * members
    if whole + weights <= usable:
        return ""
    room = max(0, (usable - weights) // per_sequence)
    total = sum(device.memory.capacity_bytes for device in cluster.devices) * members
    return (
        f"Prefill keeps no KV cache. Kept for decoding it would be {format_bytes(per_token)} per token, "
        f"{format_bytes(whole)} for this batch, against {format_bytes(total)} of device memory: "
        f"about {room} {'sequence' if room == 1 else 'sequences'} would fit."
    )
