"""A case's layers and devices as the planner takes them: counted, or with what was timed before the trials."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import reduce

from lp_plugin.bench.experiment.message_costs import Messages
from lp_plugin.bench.experiment.settings import Case, Configuration, Execution
from lp_plugin.generate.static_layers import on_static_caches, replayed
from lp_plugin.hardware import Cluster, slower_link
from lp_plugin.measured import LayerTimes, Links
from lp_plugin.model import LayerCost, ModelProfile
from lp_plugin.model.layers import Granularity
from lp_plugin.solver.layer_table import LayerTable
from lp_plugin.workload import Phase

__all__ = [
    "counted_profile",
    "launched",
    "links_in",
    "links_of",
    "pick_times",
    "replica",
    "timed_profile",
    "ungrouped",
]


def pick_times(
    times: Sequence[LayerTimes],
    tensor_parallel: int,
    execution: Execution,
    granularity: Granularity = "layer",
    *,
    rows: int | None = None,
) -> LayerTimes | None:
    """The layers timed as a configuration runs them.

    Args:
        times: All that was timed.
        tensor_parallel: Ranks that share each layer.
        execution: Of the configuration; ``auto`` takes the faster of eager and graphs, ``stock`` is eager.
        granularity: Whether blocks are whole.
        rows: Sequences of its micro-batch; None for any.

    Returns:
        Those of that execution; if there are none, the fastest of any; None if no layers of that degree, granularity
        and number of rows were timed.
    """
    alike = [
        each
        for each in times
        if (each.tensor_parallel, each.granularity) == (tensor_parallel, granularity) and rows in (None, each.rows)
    ]
    wanted = {"auto": {"eager", "graphs"}, "stock": {"eager"}}.get(execution, {execution})
    fitting = [each for each in alike if each.execution in wanted] or alike
    return min(fitting, key=lambda each: sum(each.seconds) + each.pass_seconds, default=None)


def links_of(links: Links, group_links: Sequence[Links], ranks: int) -> Links:
    """The messages of a configuration: its all-reduces as timed over as many ranks as share a layer.

    Args:
        links: Timed over all processes.
        group_links: Timed over some of them.
        ranks: That share a layer.

    Returns:
        ``links``, with all-reduces of the group of that size; unchanged if there is none.
    """
    group = next((each for each in group_links if each.ranks == ranks), links)
    return dataclasses.replace(
        links,
        reduce_bytes=group.reduce_bytes,
        reduce_seconds=group.reduce_seconds,
        replayed_reduce_seconds=group.replayed_reduce_seconds,
        ranks=group.ranks,
    )


def links_in(links: Links, execution: Execution, phase: Phase) -> Links:
    """The messages as an execution sends them: in CUDA graphs nothing is launched one by one.

    Decoding, what stages send to each other lies between graphs.
    """
    if execution not in {"graphs", "compiled"}:
        return links
    sends = links.replayed_send_seconds if phase == "prefill" else ()
    return dataclasses.replace(
        links,
        send_seconds=sends or links.send_seconds,
        reduce_seconds=links.replayed_reduce_seconds or links.reduce_seconds,
    )


def counted_profile(case: Case, tensor_parallel: int, granularity: Granularity = "layer") -> ModelProfile:
    """One rank's share of the layers, not timed; decoding, on the static caches that generation uses.

    Raises:
        WorkloadError: If the model can't be shared by so many ranks.
    """
    profile = case.profile(granularity).sharded(tensor_parallel)
    if case.phase == "prefill":
        return profile
    return on_static_caches(profile, 1, case.sequence + case.new_tokens)


def timed_profile(
    case: Case,
    configuration: Configuration,
    times: LayerTimes,
    messages: Messages,
) -> ModelProfile:
    """One rank's share of the layers with the seconds that they took alone, and their all-reduces added.

    Args:
        case: Model and work.
        configuration: Its tensor-parallel ranks are those of ``times``.
        times: Of `pick_times`.
        messages: Between the ranks.

    Returns:
        A profile for `ungrouped` devices: all-reduces are in its seconds.
    """
    profile = counted_profile(case, times.tensor_parallel, times.granularity)
    tokens = LayerTable(profile, case.workload(configuration)).tokens
    group = replica(messages.cluster, configuration)

    def all_reduces(layer: LayerCost) -> float:
        if group.group_size == 1 or not layer.num_all_reduces:
            return 0.0
        each = layer.all_reduce_bytes_per_token * tokens / layer.num_all_reduces
        slowest = reduce(slower_link, group.group_links)
        return layer.num_all_reduces * messages.reduce_seconds(slowest, each, group.group_size)

    added = [all_reduces(layer) for layer in profile.layers]
    return profile.with_seconds(
        [own + more for own, more in zip(times.seconds, added, strict=True)],
        resident_seconds=[
            None if own is None else own + more for own, more in zip(times.resident_seconds, added, strict=True)
        ],
    )


def replica(cluster: Cluster, configuration: Configuration) -> Cluster:
    """The devices of a configuration's first replica: a device, or a tensor-parallel group, per stage.

    Raises:
        HardwareError: If the cluster has fewer devices than the configuration takes.
    """
    strategy = configuration.strategy
    part = cluster.subset(strategy.num_devices).replicas(strategy.data_parallel)[0]
    return part.grouped(strategy.tensor_parallel)


def ungrouped(group: Cluster) -> Cluster:
    """The same stages without their groups' all-reduces."""
    return dataclasses.replace(group, group_size=1, group_links=())


def launched(group: Cluster, case: Case, execution: Execution) -> Cluster:
    """The same stages with the launch overhead that an execution has: of CUDA graphs, but where it is eager."""
    if case.phase == "prefill" and execution in {"eager", "stock"}:
        return group
    return replayed(group, case.phase, compiled=execution == "compiled")
