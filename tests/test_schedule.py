"""Closed formulas against a simulation of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import simulate, simulate_overlapped
from strategies import STEADY

from lp_plugin import Cluster, Link, ModelProfile, Workload, make_plan
from lp_plugin.errors import WorkloadError
from lp_plugin.schedule import (
    bubble_bound,
    bubble_fraction,
    forward_timeline,
    makespan_seconds,
    overlapped_seconds,
    received_beside,
    ring_seconds,
)

FREE = Link(name="free", bandwidth_bytes_per_second=1.0, latency_seconds=0.0)
SECONDS = st.lists(st.integers(0, 20), min_size=1, max_size=6)
WITH_HOPS = SECONDS.flatmap(
    lambda stages: st.tuples(
        st.just(stages), st.lists(st.integers(0, 20), min_size=len(stages) - 1, max_size=len(stages) - 1)
    )
)


@STEADY
@given(SECONDS, st.integers(1, 12))
def test_makespan_is_that_of_the_simulation(seconds: list[int], micro_batches: int) -> None:
    visits = simulate(seconds, micro_batches)
    assert makespan_seconds(seconds, micro_batches) == max(visit.stop for visit in visits)


@STEADY
@given(SECONDS, st.integers(1, 12))
def test_timeline_is_that_of_the_simulation(seconds: list[int], micro_batches: int) -> None:
    simulated = sorted((v.stage, v.micro_batch, v.start, v.stop) for v in simulate(seconds, micro_batches))
    timeline = forward_timeline(seconds, micro_batches)
    assert [(i.stage, i.micro_batch, i.start_seconds, i.stop_seconds) for i in timeline] == simulated
    assert {interval.kind for interval in timeline} == {"forward"}


@STEADY
@given(SECONDS, st.integers(1, 12))
def test_bubble_is_the_idle_time_of_the_simulation(seconds: list[int], micro_batches: int) -> None:
    visits = simulate(seconds, micro_batches)
    whole = len(seconds) * max(visit.stop for visit in visits)
    busy = sum(visit.stop - visit.start for visit in visits)
    expected = (whole - busy) / whole if whole else 0.0
    assert bubble_fraction(seconds, micro_batches, makespan_seconds(seconds, micro_batches)) == pytest.approx(
        expected, abs=1e-12
    )
    assert -1e-12 <= bubble_fraction(seconds, micro_batches, makespan_seconds(seconds, micro_batches)) < 1


@STEADY
@given(SECONDS, st.integers(1, 8))
def test_ring_is_the_pace_of_a_simulation_that_never_drains(seconds: list[int], micro_batches: int) -> None:
    rounds = 40
    whole = max(visit.stop for visit in simulate(seconds, micro_batches, rounds))
    start_up = makespan_seconds(seconds, micro_batches)
    assert 0 <= whole - rounds * ring_seconds(seconds, micro_batches) <= start_up


@STEADY
@given(WITH_HOPS, st.integers(1, 12))
def test_hops_beside_compute_take_as_long_as_simulated(
    seconds: tuple[list[int], list[int]], micro_batches: int
) -> None:
    """Two buffers at each end of a link are enough: more of them make nothing faster."""
    expected = max(passage.stop for passage in simulate_overlapped(*seconds, micro_batches))
    assert overlapped_seconds(*seconds, micro_batches) == expected
    assert max(passage.stop for passage in simulate_overlapped(*seconds, micro_batches, buffers=2)) == expected


@STEADY
@given(SECONDS, st.integers(1, 12))
def test_hops_that_take_no_time_change_nothing(seconds: list[int], micro_batches: int) -> None:
    nothing = [0.0] * (len(seconds) - 1)
    assert overlapped_seconds(seconds, nothing, micro_batches) == makespan_seconds(seconds, micro_batches)


@pytest.mark.parametrize(("num_bytes", "on_gpu"), [(0, True), (2**20, True), (2**20 + 1, False), (2**25, False)])
def test_short_messages_come_beside_compute(num_bytes: int, on_gpu: bool) -> None:
    assert received_beside(num_bytes, on_gpu=True) == on_gpu
    assert received_beside(num_bytes, on_gpu=False)


def test_every_boundary_has_a_hop() -> None:
    with pytest.raises(WorkloadError, match=r"2 hops for 2 stages; give one for each boundary"):
        overlapped_seconds([1.0, 1.0], [1.0, 1.0], 2)


@pytest.mark.parametrize(("stages", "micro_batches", "share"), [(1, 1, 1.0), (2, 1, 0.5), (4, 12, 0.8)])
def test_bubble_bound_of_equal_stages(stages: int, micro_batches: int, share: float) -> None:
    assert bubble_bound(stages, micro_batches) == pytest.approx(share)
    equal = [7.0] * stages
    waiting = bubble_fraction(equal, micro_batches, makespan_seconds(equal, micro_batches))
    assert bubble_bound(stages, micro_batches) == pytest.approx(1 - waiting)


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_a_plans_bubble_agrees_with_its_own_makespan(phase: str) -> None:
    """Idle share = 1 - busy time / (devices x makespan), whatever schedule the makespan belongs to."""
    workload = Workload(phase=phase, batch=8, sequence=1, micro_batch=1)
    plan = make_plan(ModelProfile.from_costs([1, 1, 1, 1]), Cluster.homogeneous("h200", 4, FREE), workload)
    busy = plan.num_micro_batches * sum(plan.stage_seconds)
    assert plan.bubble_fraction == pytest.approx(1 - busy / (plan.num_stages * plan.makespan_seconds))
