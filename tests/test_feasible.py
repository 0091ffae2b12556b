"""Whether anything fits: against every partition with every micro-batch, tried one by one."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_cases import FREE, ONE, device, every_plan, keeps
from strategies import STEADY, clusters, profiles, workloads

from lp_plugin import Cluster, InfeasibleError, ModelProfile, Workload, make_plan
from lp_plugin.objective import Constraints
from lp_plugin.why.feasible import Request, attainable, largest_integer
from lp_plugin.workload import micro_batch_candidates

NONE = Constraints()


def ask(profile: ModelProfile, cluster: Cluster, workload: Workload, constraints: Constraints = NONE) -> Request:
    return Request(profile=profile, cluster=cluster, workload=workload, constraints=constraints)


def can_be_planned(request: Request) -> bool:
    try:
        make_plan(request.profile, request.cluster, request.workload, constraints=request.constraints)
    except InfeasibleError:
        return False
    return True


def drawn_bounds(data: st.DataObject, request: Request) -> Constraints:
    """Bounds near what some partition has, so that each may or may not be kept."""
    size = micro_batch_candidates(request.workload)[0]
    plans = list(every_plan(request.profile, request.cluster, request.workload.with_micro_batch(size)))
    plan = data.draw(st.sampled_from(plans))
    scale = data.draw(st.sampled_from([0.9, 0.999, 1.0]))
    rate = plan.workload.total_tokens / (plan.num_micro_batches * plan.bottleneck_seconds or 1.0) / scale
    room = None if plan.max_sequences is None or plan.workload.phase == "train" else plan.max_sequences + 1
    tiers = [tier.name for tier in request.cluster.devices[0].tiers]
    values = {
        "max_latency_seconds": plan.latency_seconds * scale or None,
        "min_tokens_per_second": rate,
        "min_sequences": room,
        "max_memory_bytes": int(max(stage.memory_bytes for stage in plan.stages) * scale) or None,
        "tier": tiers[0] if all(device.tiers[0].name == tiers[0] for device in request.cluster.devices) else None,
    }
    names = data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=3, unique=True))
    return Constraints(**{name: values[name] for name in names})  # type: ignore[arg-type]


@settings(STEADY, max_examples=300)
@given(
    profiles(min_layers=2, max_layers=5),
    clusters(max_devices=3) | clusters(max_devices=3, roomy=True),
    workloads() | workloads(cut=False),
    st.data(),
)
def test_feasible_exactly_when_some_partition_keeps_to_everything(
    profile: ModelProfile, cluster: Cluster, workload: Workload, data: st.DataObject
) -> None:
    assume(len(cluster.devices) <= profile.num_layers)
    request = ask(profile, cluster, workload)
    constraints = drawn_bounds(data, request)
    request = dataclasses.replace(request, constraints=constraints)
    sizes = micro_batch_candidates(workload)
    kept = (
        keeps(plan, constraints, cluster)
        for size in sizes
        for plan in every_plan(profile, cluster, workload.with_micro_batch(size))
    )
    assert request.is_feasible == any(kept)
    assert request.is_feasible == can_be_planned(request)


@settings(STEADY, max_examples=200)
@given(
    profiles(min_layers=2, max_layers=5),
    clusters(max_devices=3) | clusters(max_devices=3, roomy=True),
    workloads(),
    st.data(),
)
def test_the_tightest_bound_is_that_of_all_partitions(
    profile: ModelProfile, cluster: Cluster, workload: Workload, data: st.DataObject
) -> None:
    assume(len(cluster.devices) <= profile.num_layers)
    request = ask(profile, cluster, workload)
    request = dataclasses.replace(request, constraints=drawn_bounds(data, request))
    assume(not request.is_feasible)
    name = data.draw(st.sampled_from([name for name in request.constraints.given if name != "tier"] or [None]))
    assume(name is not None)
    others = request.without(name).constraints
    kept = [plan for plan in every_plan(profile, cluster, workload) if keeps(plan, others, cluster)]
    tokens, decode = workload.total_tokens, workload.phase == "decode"
    found = attainable(request, name)
    if name == "max_latency_seconds":
        assert found == min((plan.latency_seconds for plan in kept), default=None)
    elif name == "max_memory_bytes":
        fullest = [max(stage.memory_bytes for stage in plan.stages) for plan in kept]
        assert found == min(fullest, default=None)
    elif name == "min_sequences":
        room = [plan.max_sequences for plan in kept if plan.max_sequences]
        assert found == max(room, default=None)
    else:
        rounds = [max(plan.num_micro_batches * plan.bottleneck_seconds, plan.latency_seconds * decode) for plan in kept]
        best = max((tokens / one if one else math.inf for one in rounds), default=None)
        assert found == (best if best is None else pytest.approx(best, rel=1e-4 if decode else 1e-12))


def test_the_largest_integer_is_found_or_none() -> None:
    for top in range(12):
        for last in range(-1, 14):
            expected = min(last, top) if last >= 3 and top >= 3 else None
            assert largest_integer(3, top, lambda value, last=last: value <= last) == expected


def test_an_open_micro_batch_is_feasible_with_any() -> None:
    """Two sequences at once are faster per token than one: only then is the rate met."""
    fast = dataclasses.replace(device(1000), layer_overhead_seconds=0.0)
    profile = ModelProfile.from_costs([4, 4], weight_bytes=[1, 1])
    cluster = Cluster.homogeneous(fast, 2, FREE)
    rate = Constraints(min_tokens_per_second=0.5)
    open_one = ask(profile, cluster, Workload(batch=2, sequence=1), rate)
    assert open_one.is_feasible
    assert not ask(profile, cluster, Workload(batch=2, sequence=1, micro_batch=1), rate).is_feasible
    assert not ask(profile, cluster, ONE, rate).is_feasible
