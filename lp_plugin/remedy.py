"""When nothing fits: which stage is at fault, and which single change would help, each checked by solving again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from lp_plugin.errors import InfeasibleError
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.quantity import format_bytes
from lp_plugin.report import as_text, stage_table
from lp_plugin.solve import emptiest, fits
from lp_plugin.workload import Workload

__all__ = ["infeasible_error"]


def infeasible_error(profile: ModelProfile, cluster: Cluster, workload: Workload) -> InfeasibleError:
    """The error for a workload that no partition fits: table, offending row, verified remedies.

    Args:
        profile: The layers.
        cluster: A device per stage.
        workload: Its micro-batch may be open; then the smallest one is shown.
    """
    smallest = _smallest(workload)
    plan = emptiest(profile, cluster, smallest)
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
        f"{profile.name} does not fit {len(cluster.devices)} x {worst.device} in {workload.phase} with batch "
        f"{workload.batch}, sequence {workload.sequence}, micro-batch {smallest.micro_batch}: even the emptiest "
        f"partition needs {format_bytes(worst.memory_bytes)} on one device of {format_bytes(worst.capacity_bytes)} "
        f"usable, most of it for {largest}.",
        table=as_text(stage_table(plan)),
        remedies=tuple(_remedies(profile, cluster, workload)),
    )


def _remedies(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Iterator[str]:
    """Single changes that fit, the least intrusive first."""

    def feasible(**change: Any) -> bool:
        return _feasible(profile, cluster, dataclasses.replace(workload, **change))

    if workload.micro_batch is not None:
        micro_batch = _largest(workload.micro_batch - 1, lambda value: feasible(micro_batch=value))
        if micro_batch:
            yield f"--micro-batch {micro_batch} instead of {workload.micro_batch}"
    stages = _fewest_devices(profile, cluster, workload)
    if stages:
        yield f"{stages} devices instead of {len(cluster.devices)}"
    if workload.phase == "decode":  # elsewhere only the micro-batch takes memory
        batch = _largest(workload.batch - 1, lambda value: feasible(batch=value, micro_batch=None))
        if batch:
            yield f"--batch {batch} instead of {workload.batch}"
    sequence = _largest(workload.sequence - 1, lambda value: feasible(sequence=value))
    if sequence:
        yield f"--sequence {sequence} instead of {workload.sequence}"


def _feasible(profile: ModelProfile, cluster: Cluster, workload: Workload) -> bool:
    return fits(emptiest(profile, cluster, _smallest(workload)))


def _smallest(workload: Workload) -> Workload:
    """With the micro-batch that takes the least memory, unless one was given."""
    return workload if workload.micro_batch is not None else workload.with_micro_batch(1)


def _largest(top: int, feasible: Callable[[int], bool]) -> int | None:
    """Largest number from 1 to ``top`` that is feasible, by bisection; None if 1 already is not."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        if feasible(middle):
            low = middle
        else:
            high = middle - 1
    return low or None


def _fewest_devices(profile: ModelProfile, cluster: Cluster, workload: Workload) -> int | None:
    """Fewest devices that fit, the last device repeated; None if not even one layer per device does."""
    device, link = cluster.devices[-1], cluster.links[-1] if cluster.links else None
    count = len(cluster.devices)

    def feasible(stages: int) -> bool:
        more = Cluster.homogeneous(device, stages - count + 1, link)
        grown = Cluster(devices=(*cluster.devices, *more.devices[1:]), links=(*cluster.links, *more.links))
        return _feasible(profile, grown, workload)

    low, high = count + 1, profile.num_layers
    if low > high or not feasible(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if feasible(middle):
            high = middle
        else:
            low = middle + 1
    return low
