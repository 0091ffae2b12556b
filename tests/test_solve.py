"""Plans for one fixed micro-batch: what is decided, and that the description is right."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from oracles import best_plan, emptiest_share, plain_stage
from strategies import STEADY, clusters, cost_profiles, profiles, workloads

from lp_plugin import Cluster, Device, Link, MemoryTier, ModelProfile, Plan, Workload, WorkloadError
from lp_plugin.solve import emptiest, evaluate, fits, solve

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


def assert_described(plan: Plan, profile: ModelProfile, cluster: Cluster) -> None:
    """Every figure of every stage is what plain loops give for its layers."""
    for position, (stage, (start, stop)) in enumerate(zip(plan.stages, pairwise(plan.boundaries), strict=True)):
        plain = plain_stage(profile, cluster, plan.workload, position, start, stop)
        assert (stage.start, stage.stop) == (start, stop)
        assert stage.layers == tuple(layer.name for layer in profile.layers[start:stop])
        assert stage.device == cluster.devices[position].name
        assert stage.tier == cluster.devices[position].tiers[plain.tier].name
        assert stage.capacity_bytes == cluster.devices[position].memory.usable_bytes
        assert stage.weight_bytes == plain.weight_bytes
        assert stage.kv_bytes == plain.kv_bytes
        assert stage.activation_bytes == plain.activation_bytes
        assert stage.buffer_bytes == plain.buffer_bytes
        assert stage.training_bytes == plain.training_bytes
        assert stage.memory_bytes == plain.memory_bytes
        assert stage.working_set_bytes == plain.working_set_bytes
        assert stage.compute_seconds == plain.compute_seconds
        assert stage.transfer_seconds == plain.transfer_seconds
        assert stage.seconds == plain.seconds


@STEADY
@given(profiles(tied=False) | cost_profiles(), clusters(roomy=True), workloads())
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


@STEADY
@given(profiles(tied=False) | cost_profiles(), clusters(), workloads())
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


@settings(STEADY, max_examples=200)
@given(profiles(min_layers=3), clusters(max_devices=3, roomy=True) | clusters(max_devices=3), workloads())
def test_the_fastest_tier_that_has_a_partition_is_taken(
    profile: ModelProfile, cluster: Cluster, workload: Workload
) -> None:
    assume(len(cluster.devices) <= profile.num_layers)
    assume(workload.phase != "train")
    plan, best = solve(profile, cluster, workload, "throughput"), best_plan(profile, cluster, workload)
    assert (plan is None) is (best is None)
    assume(plan is not None)
    assert plan.bottleneck_seconds == best.bottleneck


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
    "boundaries", [[], [0], [0, 4], [0, 2, 3], [1, 2, 4], [0, 2, 2, 4], [0, 3, 2, 4], [0, 1, 2, 4], [0, 0, 4]]
)
def test_evaluate_refuses(boundaries: list[int]) -> None:
    profile = ModelProfile.from_costs([1, 2, 3, 4])
    with pytest.raises(WorkloadError):
        evaluate(profile, Cluster.homogeneous(device(100), 2, FREE), ONE, boundaries)
