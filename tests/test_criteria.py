"""What a stage costs and whether it is within its limits, against plain loops."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import best_plan
from plain_stages import PlainStages
from strategies import STEADY, clusters, profiles, workloads

from lp_plugin import Cluster, HardwareError, ModelProfile, Workload
from lp_plugin.objective import Constraints
from lp_plugin.solver.cost import stage_tables
from lp_plugin.solver.criteria import MemoryShare, MissingRoom, Seconds, StageLimits, most_room, stage_limits
from lp_plugin.solver.solve import solve

ONE = Workload(batch=1, sequence=1, micro_batch=1)


def runs_of(num_layers: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(start, stop) for start in range(num_layers) for stop in range(start + 1, num_layers + 1)]
    starts, stops = zip(*pairs, strict=True)
    return np.array(starts), np.array(stops)


@settings(STEADY, max_examples=150)
@given(st.data())
def test_costs_and_limits_of_every_run(data: st.DataObject) -> None:
    """A run is ruled out if, and only if, it exceeds a limit; what it costs is what plain loops say."""
    workload, profile = data.draw(workloads()), data.draw(profiles())
    cluster = data.draw(clusters(groups=True))
    plain, tables = PlainStages(profile, cluster, workload), stage_tables(profile, cluster, workload)
    position = data.draw(st.integers(0, len(tables) - 1))
    starts, stops = runs_of(profile.num_layers)
    runs = list(zip(starts.tolist(), stops.tolist(), strict=True))
    stages = [plain(position, *run) for run in runs]
    device, chosen = cluster.devices[position], data.draw(st.sampled_from(stages))
    share = chosen.memory_bytes / device.memory.usable_bytes
    limits = StageLimits(
        memory_share=data.draw(st.sampled_from([1.0, math.inf, share])),
        memory_bytes=data.draw(st.sampled_from([math.inf, chosen.memory_bytes])),
        seconds=data.draw(st.sampled_from([math.inf, chosen.seconds])),
        sequences=data.draw(st.sampled_from([0, 1, max(min(chosen.room, 10**6), 0)])),
        tier=data.draw(st.sampled_from([None, *(tier.name for tier in device.tiers)])),
    )
    within = [
        stage.memory_bytes / device.memory.usable_bytes <= limits.memory_share
        and stage.memory_bytes <= limits.memory_bytes
        and stage.seconds <= limits.seconds
        and (not limits.sequences or stage.room >= limits.sequences)
        and (limits.tier is None or stage.tier <= [tier.name for tier in device.tiers].index(limits.tier))
        for stage in stages
    ]
    most = most_room(tables, profile.num_layers)
    for criterion, expected in (
        (Seconds(tables[position], limits), [stage.seconds for stage in stages]),
        (MemoryShare(tables[position], limits), [stage.memory_bytes / device.memory.usable_bytes for stage in stages]),
        (MissingRoom(tables[position], limits, most), [most - min(stage.room, most) for stage in stages]),
    ):
        inner, allowed = criterion.inner(starts, stops), criterion.allowed(starts, stops)
        costs = criterion.entry[starts] + inner + criterion.exit[stops]
        held = (allowed & (inner < np.inf)).tolist()
        assert held == within
        assert [cost for cost, holds in zip(costs, held, strict=True) if holds] == [
            cost for cost, holds in zip(expected, held, strict=True) if holds
        ]
        known = dict(zip(runs, inner.tolist(), strict=True))
        for (start, stop), value in known.items():  # the solver relies on it
            assert value >= 0
            assert known.get((start - 1, stop), np.inf) >= value
            assert known.get((start, stop + 1), np.inf) >= value


@STEADY
@given(profiles(), clusters(), workloads())
def test_no_stage_has_more_room_than_the_most(profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
    stage = PlainStages(profile, cluster, workload)
    rooms = [
        stage(position, start, start + 1).room
        for position in range(len(cluster.devices))
        for start in range(profile.num_layers)
    ]
    finite = [room for room in rooms if math.isfinite(room)]
    assert most_room(stage_tables(profile, cluster, workload), profile.num_layers) == max([0, *finite])


def test_a_tier_that_a_device_lacks_is_named() -> None:
    tables = stage_tables(ModelProfile.from_costs([1]), Cluster.homogeneous("h200", 1), ONE)
    with pytest.raises(HardwareError, match="h200 has no memory tier 'l3'; it has l2, hbm"):
        Seconds(tables[0], StageLimits(tier="l3"))


def test_limits_that_constraints_come_to() -> None:
    given = Constraints(max_latency_seconds=3, min_tokens_per_second=4, min_sequences=5, max_memory_bytes=6, tier="hbm")
    workload = Workload(phase="prefill", batch=12, sequence=2, micro_batch=4)
    assert stage_limits(given, workload) == (
        StageLimits(memory_bytes=6, seconds=24 / 4 / 3, sequences=5, tier="hbm"),
        3.0,
    )
    assert stage_limits(Constraints(), workload) == (StageLimits(), math.inf)
    decode = Workload(phase="decode", batch=12, sequence=2, micro_batch=4)
    assert stage_limits(given, decode) == (StageLimits(memory_bytes=6, seconds=1, sequences=5, tier="hbm"), 3.0)
    assert stage_limits(dataclasses.replace(given, max_latency_seconds=None), decode)[1] == 12 / 4


@settings(STEADY, max_examples=300)
@given(
    st.floats(1e-9, 1e9),
    st.integers(1, 10**6),
    st.integers(1, 10**6),
    st.integers(1, 1000),
    st.sampled_from(["prefill", "decode"]),
)
def test_a_rate_is_met_as_a_plan_computes_it(
    seconds: float, batch: int, sequence: int, micro_batch: int, phase: str
) -> None:
    """To the last bit: a rate that a plan reaches can be asked for, the next higher one can't."""
    workload = Workload(phase=phase, batch=batch, sequence=sequence, micro_batch=min(micro_batch, batch))
    count = workload.num_micro_batches
    reached = workload.total_tokens / (count * seconds)
    for rate, met in ((reached, True), (math.nextafter(reached, math.inf), False)):
        limits, total = stage_limits(Constraints(min_tokens_per_second=rate), workload)
        assert (seconds <= limits.seconds) is met
        if phase == "decode":
            assert (count * seconds <= total) is met


@pytest.mark.parametrize("rate", [5e-324, 1e-310, 1e-300, 1e300, 1.7e308])
def test_rates_of_any_size(rate: float) -> None:
    workload = Workload(phase="decode", batch=3, sequence=1, micro_batch=1)
    limits, total = stage_limits(Constraints(min_tokens_per_second=rate), workload)
    for seconds, count in ((limits.seconds, 3), (total, 1)):
        assert seconds > 0
        assert math.isinf(seconds) or 3 / (count * seconds) >= rate > 3 / (count * math.nextafter(seconds, math.inf))


@STEADY
@given(profiles(), clusters(roomy=True), workloads())
def test_what_a_plan_reaches_can_be_asked_for(profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
    """Its own figures as constraints leave it what it is."""
    assume(len(cluster.devices) <= profile.num_layers)
    plan = solve(profile, cluster, workload)
    assume(plan is not None)
    assert best_plan(PlainStages(profile, cluster, workload)).boundaries == plan.boundaries
    slowest = plan.num_micro_batches * plan.bottleneck_seconds
    if workload.phase == "decode":
        slowest = max(slowest, plan.latency_seconds)
    asked = Constraints(
        max_latency_seconds=plan.latency_seconds or None,
        min_tokens_per_second=workload.total_tokens / slowest if slowest else None,
        max_memory_bytes=max(stage.memory_bytes for stage in plan.stages) or None,
        min_sequences=plan.max_sequences or None,
    )
    again = solve(profile, cluster, workload, "throughput", asked)
    assert again is not None
    assert again.bottleneck_seconds == plan.bottleneck_seconds
