"""When nothing fits: which stage is at fault, and which single change would help, each checked by solving again."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from lp_plugin.errors import InfeasibleError
from lp_plugin.hardware import Cluster, Link
from lp_plugin.model import ModelProfile
from lp_plugin.quantity import format_bytes
from lp_plugin.report import as_text, stage_table
from lp_plugin.solve import emptiest, fits
from lp_plugin.workload import Workload

__all__ = ["infeasible_error"]

_MOST_TRIED = 128
"""Values tried one by one where feasibility is not monotone."""


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
        f"{profile.name} does not fit {_devices(cluster)} in {workload.phase} with batch "
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

    # in training, micro-batches in flight depend on the number of micro-batches: not monotone, so every value is tried
    largest = _largest_of_all if workload.phase == "train" else _largest
    if workload.micro_batch is not None:
        micro_batch = largest(workload.micro_batch - 1, lambda value: feasible(micro_batch=value))
        if micro_batch:
            yield f"--micro-batch {micro_batch} instead of {workload.micro_batch}"
    stages = _fewest_devices(profile, cluster, workload)
    if stages:
        yield f"{stages} devices instead of {len(cluster.devices)}"
    if workload.phase == "decode":  # elsewhere only the micro-batch takes memory
        lowest = workload.micro_batch or 1
        batch = largest(workload.batch - 1, lambda value: feasible(batch=value), lowest)
        if batch:
            yield f"--batch {batch} instead of {workload.batch}"
    sequence = largest(workload.sequence - 1, lambda value: feasible(sequence=value))
    if sequence:
        yield f"--sequence {sequence} instead of {workload.sequence}"


def _feasible(profile: ModelProfile, cluster: Cluster, workload: Workload) -> bool:
    return fits(emptiest(profile, cluster, _smallest(workload)))


def _smallest(workload: Workload) -> Workload:
    """With the micro-batch that takes the least memory, unless one was given."""
    return workload if workload.micro_batch is not None else workload.with_micro_batch(1)


def _devices(cluster: Cluster) -> str:
    counts = Counter(device.name for device in cluster.devices)
    return " + ".join(f"{count} x {name}" for name, count in counts.items())


def _largest(top: int, feasible: Callable[[int], bool], lowest: int = 1) -> int | None:
    """Largest number from ``lowest`` to ``top`` that is feasible, by bisection; None if there is none."""
    low, high = lowest - 1, top
    while low < high:
        middle = (low + high + 1) // 2
        if feasible(middle):
            low = middle
        else:
            high = middle - 1
    return low if low >= lowest else None


def _largest_of_all(top: int, feasible: Callable[[int], bool], lowest: int = 1) -> int | None:
    """The same without assuming that less is easier: `_MOST_TRIED` numbers downwards, then by bisection."""
    bottom = max(lowest, top - _MOST_TRIED)
    tried = next((value for value in range(top, bottom - 1, -1) if feasible(value)), None)
    return tried if tried is not None or bottom == lowest else _largest(bottom - 1, feasible, lowest)


def _fewest_devices(profile: ModelProfile, cluster: Cluster, workload: Workload) -> int | None:
    """Fewest devices that fit, the last device repeated; None if none does among those tried."""
    device = cluster.devices[-1]
    any_link = Link(name="any", bandwidth_bytes_per_second=1.0, latency_seconds=0.0)  # memory does not depend on it
    count = len(cluster.devices)

    def feasible(stages: int) -> bool:
        devices = (*cluster.devices, *[device] * (stages - count))
        grown = Cluster(devices=devices, links=(any_link,) * (stages - 1))
        return _feasible(profile, grown, workload)

    most = profile.num_layers
    if workload.phase == "train":  # more stages keep more micro-batches in flight: not monotone
        return next(
            (stages for stages in range(count + 1, min(most, count + _MOST_TRIED) + 1) if feasible(stages)), None
        )
    fewer = _largest(most - count, lambda saved: feasible(most + 1 - saved))
    return None if fewer is None else most + 1 - fewer
