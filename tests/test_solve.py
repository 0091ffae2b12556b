"""Plans for one fixed micro-batch: what is decided, and that the description is right."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from oracles import emptiest_share
from plain_stages import PlainStages
from strategies import STEADY, clusters, cost_profiles, profiles, workloads

from lp_plugin import (
    Cluster,
    Device,
    LayerCost,
    Link,
    MemoryTier,
    ModelConfigError,
    ModelProfile,
    Plan,
    Workload,
    WorkloadError,
)
from lp_plugin.objective import Constraints
from lp_plugin.quantity import shown
from lp_plugin.solver.cost import grid_quantum
from lp_plugin.solver.layer_table import LayerTable
from lp_plugin.solver.solve import emptiest, evaluate, fits, solve, uniform_boundaries

ONE = Workload(batch=1, sequence=1, micro_batch=1)
FREE = Link(name="free", bandwidth_bytes_per_second=1.0, latency_seconds=0.0)


def device(*capacities: int) -> Device:
    """A device whose tiers have these capacities, each twice as slow as the one before."""
    tiers = tuple(
        MemoryTier(name=f"tier{index}", capacity_bytes=capacity, bandwidth_bytes_per_second=8.0 / 2**index)
        for index, capacity in enumerate(capacities)
    )
    return Device(
        name="own",
        tiers=tiers,
        peak_flops=(("float32", 1.0), ("float16", 1.0)),
        compute_efficiency=1.0,
        layer_overhead_seconds=0.0,
    )


def grid_seconds(plan: Plan, profile: ModelProfile, cluster: Cluster) -> float:
    """How far a stage's seconds may lie from the sum of its layers and transfers: half a step of the grid for each."""
    groups = [(link, cluster.group_size) for link in cluster.group_links] or [None] * len(cluster.devices)
    table = LayerTable(profile, plan.workload)
    step = grid_quantum(table, set(zip(cluster.devices, groups, strict=True)), cluster.links)
    return (profile.num_layers + 2) * step / 2


def assert_described(plan: Plan, profile: ModelProfile, cluster: Cluster) -> None:
    """Every figure of every stage is what plain loops give for its layers, bytes rounded and seconds on the grid."""
    plain, apart = PlainStages(profile, cluster, plan.workload), grid_seconds(plan, profile, cluster)
    for position, (stage, (start, stop)) in enumerate(zip(plan.stages, pairwise(plan.boundaries), strict=True)):
        expected, used = plain(position, start, stop), cluster.devices[position]
        assert (stage.start, stage.stop) == (start, stop)
        assert stage.layers == tuple(layer.name for layer in profile.layers[start:stop])
        assert stage.device == used.name
        assert stage.tier == used.tiers[expected.tier].name
        assert stage.capacity_bytes == used.memory.usable_bytes
        assert stage.reserved_bytes == used.memory.capacity_bytes - used.memory.usable_bytes
        for name in ("weight_bytes", "kv_bytes", "activation_bytes", "buffer_bytes", "training_bytes", "memory_bytes"):
            assert getattr(stage, name) == getattr(expected, name)
        for name in ("compute_seconds", "resident_seconds", "transfer_seconds", "seconds"):
            assert abs(getattr(stage, name) - getattr(expected, name)) <= apart
        assert stage.working_set_bytes == round(expected.working_set_bytes)
        assert stage.traffic_bytes == round(expected.traffic_bytes)
        assert stage.hit_fraction == pytest.approx(expected.hit_fraction)
        room = None if expected.room == math.inf or plan.workload.phase == "train" else max(expected.room, 0)
        assert stage.max_sequences == room


@settings(STEADY, max_examples=200)
@given(profiles() | cost_profiles(), clusters(roomy=True, groups=True), workloads())
def test_stages_are_described_as_plain_loops_do(profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
    assume(len(cluster.devices) <= profile.num_layers)
    plan = solve(profile, cluster, workload, "throughput")
    assume(plan is not None)
    assert_described(plan, profile, cluster)
    assert fits(plan)
    assert plan.bottleneck_seconds == max(stage.seconds for stage in plan.stages)
    assert sum(len(stage.layers) for stage in plan.stages) == profile.num_layers
    assert (plan.model_digest, plan.cluster_digest, plan.workload_digest) == (
        profile.digest,
        cluster.digest,
        workload.digest,
    )
    assert [(layer.name, layer.kind, layer.block) for layer in plan.layers] == [
        (layer.name, layer.kind, layer.block) for layer in profile.layers
    ]
    assert plan.lower_bound_seconds <= plan.bottleneck_seconds
    uniform = evaluate(profile, cluster, workload, uniform_boundaries(profile.num_layers, plan.num_stages))
    assert plan.uniform_seconds == (uniform.bottleneck_seconds if fits(uniform) else None)


@STEADY
@given(profiles() | cost_profiles(), clusters(groups=True), workloads())
def test_objective_memory_empties_the_fullest_device(
    profile: ModelProfile, cluster: Cluster, workload: Workload
) -> None:
    assume(len(cluster.devices) <= profile.num_layers)
    least = emptiest_share(profile, cluster, workload)
    plan = emptiest(profile, cluster, workload)
    assert max(stage.memory_bytes / stage.capacity_bytes for stage in plan.stages) == least
    assert fits(plan) is (least <= 1)
    solved = solve(profile, cluster, workload, "memory")
    assert (solved is None) is (least > 1)
    assert (solve(profile, cluster, workload, "throughput") is None) is (least > 1)


def test_the_bottleneck_decides_whatever_the_tier() -> None:
    """Beside a slow device a fast one takes more than its fast tier holds; unless that is asked for."""
    layers = tuple(LayerCost(name=str(index), weight_bytes=8, weight_traffic_bytes=8) for index in range(4))
    profile = ModelProfile(name="four", layers=layers, dtype="float32", input_bytes_per_token=0.0)
    fast = device(16, 1000)
    slow = dataclasses.replace(
        fast, tiers=tuple(dataclasses.replace(tier, bandwidth_bytes_per_second=1.0) for tier in fast.tiers)
    )
    cluster = Cluster(devices=(fast, slow), links=(FREE,))
    free = solve(profile, cluster, ONE)
    assert (free.boundaries, free.stage_seconds) == ((0, 3, 4), (24 / 4, 8 / 1))
    assert [stage.tier for stage in free.stages] == ["tier1", "tier0"]
    assert free.stages[0].resident_seconds == 24 / 8
    kept = solve(profile, cluster, ONE, "throughput", Constraints(tier="tier0"))
    assert (kept.boundaries, kept.stage_seconds) == ((0, 2, 4), (16 / 8, 16 / 1))
    assert solve(profile, cluster, ONE, "throughput", Constraints(tier="tier1")).boundaries == free.boundaries
    assert solve(profile, cluster.subset(1), ONE, "throughput", Constraints(tier="tier0")) is None


def test_each_objective_has_a_partition_of_its_own() -> None:
    """Fastest bottleneck, least sum, most room, emptiest devices."""
    columns = [(2, 70, 30, 5), (4, 40, 30, 1), (5, 70, 1, 5), (8, 40, 10, 5), (7, 40, 1, 1), (4, 40, 10, 1)]
    layers = tuple(
        LayerCost(
            name=str(index),
            seconds=float(seconds),
            weight_bytes=weight,
            kv_bytes_per_token=kept,
            output_bytes_per_token=output,
        )
        for index, (seconds, weight, kept, output) in enumerate(columns)
    )
    profile = ModelProfile(name="torn", layers=layers, dtype="float32", input_bytes_per_token=0.0)
    cluster = Cluster.homogeneous(device(1000), 3, FREE)
    plans = {name: solve(profile, cluster, ONE, name) for name in ("throughput", "latency", "sequences", "memory")}
    assert {name: plan.boundaries for name, plan in plans.items()} == {
        "throughput": (0, 3, 4, 6),
        "latency": (0, 2, 5, 6),
        "sequences": (0, 1, 2, 6),
        "memory": (0, 2, 4, 6),
    }
    assert {name: plan.objective for name, plan in plans.items()} == {name: name for name in plans}
    assert min(plan.bottleneck_seconds for plan in plans.values()) == plans["throughput"].bottleneck_seconds
    assert min(plan.latency_seconds for plan in plans.values()) == plans["latency"].latency_seconds
    assert max(plan.max_sequences for plan in plans.values()) == plans["sequences"].max_sequences
    assert min(plan.memory_share for plan in plans.values()) == plans["memory"].memory_share


def test_a_tier_is_chosen_by_the_working_set() -> None:
    profile = ModelProfile.from_costs([1, 1, 1, 1], weight_bytes=[10, 10, 10, 10])
    for capacity, tier in ((20, "tier0"), (19, "tier1")):
        plan = solve(profile, Cluster.homogeneous(device(capacity, 1000), 2, FREE), ONE, "throughput")
        assert plan.boundaries == (0, 2, 4)
        assert {stage.tier for stage in plan.stages} == {tier}


def test_whole_numbers_of_any_make_give_a_plan_of_plain_numbers() -> None:
    """A measurement is often a NumPy array."""
    profile = ModelProfile.from_costs(
        np.array([1.0, 2.0]), weight_bytes=np.array([3, 4]), output_bytes=np.array([1, 1])
    )
    plan = solve(profile, Cluster.homogeneous(device(1000), 2, FREE), ONE, "throughput")
    assert {type(layer.weight_bytes) for layer in plan.layers} == {int}
    assert {type(stage.seconds) for stage in plan.stages} == {float}


def test_bytes_per_token_may_be_fractions() -> None:
    """Fits or not is one answer, for the solver and for the table that explains it."""
    profile = ModelProfile.from_costs([1], weight_bytes=[100], output_bytes=[0.25])
    cluster = Cluster.homogeneous(device(100), 1)
    solved = solve(profile, cluster, ONE, "throughput")
    assert (solved is not None) is fits(emptiest(profile, cluster, ONE))


def test_evaluate_takes_any_boundaries() -> None:
    profile = ModelProfile.from_costs([1, 2, 3, 4], weight_bytes=[60, 60, 1, 1])
    cluster = Cluster.homogeneous(device(100), 2, FREE)
    plan = evaluate(profile, cluster, ONE, [0, 3, 4])
    assert_described(plan, profile, cluster)
    assert plan.stage_seconds == (6, 4)
    assert not fits(plan)
    assert fits(evaluate(profile, cluster, ONE, (0, 1, 4)))


@pytest.mark.parametrize(
    "boundaries",
    [
        *([], [0], [0, 4], [0, 2, 3], [1, 2, 4], [0, 2, 2, 4], [0, 3, 2, 4], [0, 1, 2, 4], [0, 0, 4]),
        *([0, 1.5, 4], [0, 1.0, 4], [0, True, 4], [False, 1, 4], [0, "1", 4], "014", [0, math.nan, 4]),
        *([0, math.inf, 4], [0, -1, 4], [0, None, 4], [0, 10**5000, 4], [0, 1, 10**400], [0, [1], 4]),
    ],
    ids=shown,
)
def test_evaluate_refuses(boundaries: Any) -> None:
    profile = ModelProfile.from_costs([1, 2, 3, 4])
    with pytest.raises(WorkloadError, match=r"boundaries|stages for 2 devices"):
        evaluate(profile, Cluster.homogeneous(device(100), 2, FREE), ONE, boundaries)


def test_evaluate_takes_numbers_of_numpy_and_wants_a_micro_batch() -> None:
    profile, cluster = ModelProfile.from_costs([1, 2, 3, 4]), Cluster.homogeneous(device(100), 2, FREE)
    plan = evaluate(profile, cluster, ONE, np.array([0, 1, 4]))
    assert plan.boundaries == (0, 1, 4)
    assert {type(bound) for bound in plan.boundaries} == {int}
    with pytest.raises(WorkloadError, match="micro_batch is not chosen"):
        evaluate(profile, cluster, Workload(batch=1, sequence=1), [0, 1, 4])


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-300, 1.0, 1e300])
def test_costs_of_any_size(scale: float) -> None:
    costs = [4 * scale, 18 * scale, 2 * scale, 5 * scale, 12 * scale, 11 * scale]
    for objective in ("throughput", "latency", "memory"):
        plan = solve(ModelProfile.from_costs(costs), Cluster.homogeneous(device(1000), 4, FREE), ONE, objective)
        assert plan.boundaries == (0, 1, 2, 5, 6)
        assert plan.bottleneck_seconds == pytest.approx(19 * scale, rel=1e-12)


def test_costs_that_differ_beyond_what_a_sum_can_tell() -> None:
    plan = solve(ModelProfile.from_costs([1e300, 1e-300, 0, 5e-324]), Cluster.homogeneous(device(1000), 2, FREE), ONE)
    assert plan.boundaries == (0, 1, 4)
    assert plan.stage_seconds == (pytest.approx(1e300, rel=1e-15), 0)


def test_costs_that_add_up_to_no_number_are_refused() -> None:
    with pytest.raises(ModelConfigError, match="more than a number can hold"):
        solve(ModelProfile.from_costs([1e308, 1e308]), Cluster.homogeneous(device(1000), 2, FREE), ONE)


@pytest.mark.parametrize("costs", [[0] * 1000, [0] * 499 + [7] + [0] * 500, [1] * 499 + [10**6] + [1] * 500])
def test_a_thousand_layers_of_which_hardly_any_cost(costs: list[int]) -> None:
    plan = solve(ModelProfile.from_costs(costs), Cluster.homogeneous(device(1000), 64, FREE), ONE)
    assert plan.num_stages == 64
    assert plan.bottleneck_seconds == max(costs)


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**30])
def test_another_unit_of_time_gives_the_same_boundaries(factor: float) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        costs = rng.random(30)
        cluster, slower = (
            Cluster.homogeneous(
                device(10**9), 5, Link(name="wire", latency_seconds=0.1 * unit, bandwidth_bytes_per_second=8 / unit)
            )
            for unit in (1.0, factor)
        )
        plan = solve(ModelProfile.from_costs(costs, output_bytes=[0.5] * 30), cluster, ONE)
        scaled = solve(ModelProfile.from_costs(costs * factor, output_bytes=[0.5] * 30), slower, ONE)
        assert scaled.boundaries == plan.boundaries
        assert scaled.stage_seconds == tuple(seconds * factor for seconds in plan.stage_seconds)


def test_equal_layers_give_equal_stages_whatever_their_order() -> None:
    """Tenths have no exact sums; equal runs of layers count as equal all the same, and ties are settled."""
    profile, cluster = ModelProfile.from_costs([0.1] * 30), Cluster.homogeneous(device(1000), 5, FREE)
    plan = solve(profile, cluster, ONE)
    assert plan.boundaries == (0, 6, 12, 18, 24, 30)
    assert len(set(plan.stage_seconds)) == 1
    assert solve(profile, cluster, ONE) == plan
    mixed = [solve(ModelProfile.from_costs(order * 5), cluster, ONE) for order in ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1])]
    assert [found.boundaries for found in mixed] == [(0, 3, 6, 9, 12, 15)] * 2
    assert mixed[0].stage_seconds == mixed[1].stage_seconds


def test_a_stage_may_not_be_able_to_hold_the_layer_that_filling_up_leaves_it() -> None:
    """The first stages could take more than lets the second, small device hold what comes next."""
    heavy = [1] * 40 + [100] * 3
    profile = ModelProfile.from_costs([1] * 43, weight_bytes=heavy)
    cluster = Cluster(devices=(device(1000), device(50), device(1000)), links=(FREE, FREE))
    plan = solve(profile, cluster, ONE)
    assert plan is not None
    assert fits(plan)
    assert plan.boundaries == (0, 14, 28, 43)


def test_no_stage_is_without_parameters_in_training() -> None:
    """Engines make an optimizer for each stage, which refuses to have none."""
    costs = ((9, 1e12), (0, 9e12), (9, 1e12), (9, 1e12))
    layers = [
        LayerCost(name=str(index), parameters=count, flops_per_token=flops)
        for index, (count, flops) in enumerate(costs)
    ]
    profile = ModelProfile(name="gap", layers=tuple(layers), dtype="float32", input_bytes_per_token=0.0)
    found = {}
    for phase in ("train", "prefill"):
        for stages in (3, 4):
            workload = Workload(phase=phase, batch=1, sequence=1, micro_batch=1)
            plan = solve(profile, Cluster.homogeneous("h200", stages), workload)
            assert plan is not None
            found[phase, stages] = plan.boundaries
    assert found["prefill", 3] == (0, 1, 2, 4), "the heavy layer stands alone"
    assert found["train", 3] == (0, 2, 3, 4), "together with one that has parameters"
    assert found["train", 4] == (0, 1, 2, 3, 4), "as many stages as layers: one has to be without"
