"""Where each configuration cuts the layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lp_plugin.bench.experiment.costs import (
    counted_profile,
    launched,
    links_in,
    pick_times,
    replica,
    timed_profile,
    ungrouped,
)
from lp_plugin.bench.experiment.message_costs import Messages
from lp_plugin.bench.experiment.settings import Case, Configuration
from lp_plugin.exchange.rules import deepspeed_uniform
from lp_plugin.hardware import Cluster, Link
from lp_plugin.measured import LayerTimes, Links
from lp_plugin.model.layers import Granularity
from lp_plugin.planner import make_plan

__all__ = ["boundaries_of"]

_HIDDEN = Link(name="hidden behind compute", bandwidth_bytes_per_second=1e30, latency_seconds=0.0)


def boundaries_of(
    case: Case,
    configuration: Configuration,
    times: Sequence[LayerTimes],
    links: Links,
    cluster: Cluster,
    *,
    granularity: Granularity = "layer",
) -> tuple[int, ...]:
    """Boundaries as the configuration's partition asks.

    ``cache-aware``: the planner's, from the layers timed at the configuration's tensor-parallel degree (in the first
    tier where a stage fits it), or from the catalogue if none were. Hops run beside compute and are left out, but
    DeepSpeed's own ``eval_batch`` waits for them. ``uniform`` and ``parameters``: DeepSpeed's methods of that name.

    Args:
        case: Model and work.
        configuration: Strategy, partition, execution.
        times: Of layers; empty for what the planner chooses from the catalogue alone.
        links: Measured, of `links_of`.
        cluster: All devices, not grouped.
        granularity: Whether blocks are whole.

    Returns:
        Half-open, one number more than stages.

    Raises:
        InfeasibleError: If no partition fits the memory (``cache-aware``).
        WorkloadError: If stages outnumber layers, or the model can't be shared by so many ranks.
    """
    strategy = configuration.strategy
    profile = counted_profile(case, strategy.tensor_parallel, granularity)
    if configuration.partition == "uniform":
        return deepspeed_uniform(profile.num_layers, strategy.pipeline_parallel)
    if configuration.partition == "parameters":
        return _balanced([layer.parameters for layer in profile.layers], strategy.pipeline_parallel)
    group = launched(replica(cluster, configuration), case, configuration.execution)
    workload = case.workload(configuration)
    rows = workload.chosen_micro_batch
    chosen = pick_times(times, strategy.tensor_parallel, configuration.execution, granularity, rows=rows)
    if chosen is not None:
        messages = Messages(cluster=cluster, links=links_in(links, chosen.execution, case.phase))
        profile = timed_profile(case, configuration, chosen, messages)
        group = ungrouped(group)
    if configuration.execution != "stock":
        group = dataclasses.replace(group, links=(_HIDDEN,) * len(group.links))
    return make_plan(profile, group, workload).boundaries


def _balanced(parameters: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """DeepSpeed's ``partition_method="parameters"``, all parameters counted, by its own code."""
    deepspeed_uniform(len(parameters), num_stages)  # refuses empty stages, which DeepSpeed lets pass
    from deepspeed.runtime.utils import partition_balanced  # noqa: PLC0415 - seconds to import

    return tuple(int(bound) for bound in partition_balanced(list(parameters), num_stages))
