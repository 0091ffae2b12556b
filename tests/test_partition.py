"""The exact solver against every partition tried, against other methods, and on the edges."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracles import all_cuts, best_plan, brute_force, parametric_search
from strategies import STEADY, clusters, cost_profiles, profiles, workloads

from lp_plugin import Cluster, Link, ModelProfile, Workload, WorkloadError, make_plan
from lp_plugin.partition import partition, stage_cost
from lp_plugin.solve import solve

EXAMPLE = [4, 18, 2, 5, 12, 11]
FREE = Link(name="free", bandwidth_bytes_per_second=1.0, latency_seconds=0.0)


class Runs:
    """`StageCosts` out of plain lists."""

    def __init__(
        self,
        seconds: Sequence[float],
        memory: Sequence[int] = (),
        limit: float = np.inf,
        entry: Sequence[float] = (),
        exit_: Sequence[float] = (),
    ) -> None:
        count = len(seconds)
        self.entry = np.array(entry or [0.0] * (count + 1), dtype=float)
        self.exit = np.array(exit_ or [0.0] * (count + 1), dtype=float)
        self._seconds = np.concatenate([[0.0], np.cumsum(seconds)])
        self._memory = np.concatenate([[0], np.cumsum(memory or [0] * count)])
        self._limit = limit

    def inner(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.float64]:
        fits = self._memory[stops] - self._memory[starts] <= self._limit
        return np.where(fits, self._seconds[stops] - self._seconds[starts], np.inf)


def assert_valid(boundaries: tuple[int, ...], num_layers: int, num_stages: int) -> None:
    assert type(boundaries) is tuple
    assert all(type(bound) is int for bound in boundaries)
    assert len(boundaries) == num_stages + 1
    assert (boundaries[0], boundaries[-1]) == (0, num_layers)
    assert all(low < high for low, high in pairwise(boundaries))


def costs_of(stages: Sequence[Runs], boundaries: Sequence[int]) -> list[float]:
    return [stage_cost(stage, start, stop) for stage, (start, stop) in zip(stages, pairwise(boundaries), strict=True)]


def random_instance(generator: np.random.Generator) -> tuple[list[Runs], int, Callable[..., float | None]]:
    """Stages for the solver, layers, and the same costs as a plain function of stage, start and stop."""
    num_layers = int(generator.integers(1, 13))
    num_stages = int(generator.integers(1, min(6, num_layers) + 1))
    most = int(generator.choice([1, 3, 20, 1000]))
    limited, bounded, unequal = generator.integers(0, 2, size=3)
    tightness = generator.uniform(0.5, 2.5) / num_stages

    def rows(largest: int, length: int, on: int = 1) -> list[list[int]]:
        made = generator.integers(0, largest + 1, size=(num_stages, length)) * on
        return [row.tolist() for row in (made if unequal else np.broadcast_to(made[0], made.shape))]

    seconds = rows(most, num_layers)
    memory = rows(10, num_layers)
    limits = [int(sum(memory[0]) * tightness) + int(generator.integers(0, 5)) if limited else 10**6] * num_stages
    entry, exit_ = rows(most, num_layers + 1, bounded), rows(most, num_layers + 1, bounded)
    stages = [Runs(*row) for row in zip(seconds, memory, limits, entry, exit_, strict=True)]

    def cost(stage: int, start: int, stop: int) -> int | None:
        if sum(memory[stage][start:stop]) > limits[stage]:
            return None
        return entry[stage][start] + sum(seconds[stage][start:stop]) + exit_[stage][stop]

    return (stages if unequal else [stages[0]] * num_stages), num_layers, cost


@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_instances_against_every_partition(seed: int) -> None:
    generator = np.random.default_rng(seed)
    worse, better, infeasible = 0, 0, 0
    for _ in range(1000):
        stages, num_layers, cost = random_instance(generator)
        boundaries = partition(stages, num_layers)
        best = brute_force(num_layers, len(stages), cost)
        if best is None or boundaries is None:
            assert best is boundaries
            infeasible += 1
            continue
        assert_valid(boundaries, num_layers, len(stages))
        costs = costs_of(stages, boundaries)
        worse += max(costs) > best.bottleneck
        better += max(costs) < best.bottleneck
        assert sum(value**2 for value in costs) == best.squares
        assert boundaries in best.boundaries
    assert (worse, better) == (0, 0)
    assert 20 < infeasible < 500  # both outcomes are met


def test_the_same_instance_gives_the_same_boundaries() -> None:
    once, again = ([partition(*random_instance(np.random.default_rng(seed))[:2]) for seed in range(50)] for _ in "ab")
    assert once == again


def test_equal_bottlenecks_are_spread_evenly() -> None:
    weights = [9, 1, 1, 1, 1, 1, 1]  # the 9 sets the bottleneck; the ones could be cut anywhere
    boundaries = partition([Runs(weights)] * 3, 7)
    assert boundaries == (0, 1, 4, 7)


@pytest.mark.parametrize("num_stages", [7, 8, 100])
def test_more_stages_than_layers(num_stages: int) -> None:
    with pytest.raises(WorkloadError, match=f"6 layers can't fill {num_stages} stages.*ask for 1 to 6"):
        partition([Runs(EXAMPLE)] * num_stages, 6)


def test_no_stage() -> None:
    with pytest.raises(WorkloadError, match="0 stages"):
        partition([], 6)


def test_as_many_stages_as_layers_and_one_stage() -> None:
    assert partition([Runs(EXAMPLE)] * 6, 6) == (0, 1, 2, 3, 4, 5, 6)
    assert partition([Runs(EXAMPLE)], 6) == (0, 6)
    assert partition([Runs([3], memory=[5], limit=4)], 1) is None


@pytest.mark.parametrize("weight", [0.0, 1e-200, 1e200])
def test_costs_whose_squares_are_no_floats(weight: float) -> None:
    boundaries = partition([Runs([weight] * 5)] * 2, 5)
    assert boundaries in {(0, 2, 5), (0, 3, 5)} if weight else boundaries is not None
    assert_valid(boundaries, 5, 2)


def test_the_first_guess_may_be_infeasible() -> None:
    stages = [Runs([1] * 6, memory=[1] * 6, limit=limit) for limit in (1, 1, 4)]
    assert partition(stages, 6) == (0, 1, 2, 6)


@pytest.fixture(scope="module")
def deepspeed_balanced() -> Callable[[list[int], int], list[int]]:
    """DeepSpeed's ``partition_method="parameters"``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import, from DeepSpeed and what it imports
        from deepspeed.runtime.utils import partition_balanced

    return lambda weights, num_parts: [int(bound) for bound in partition_balanced(weights, num_parts)]


def bottleneck(weights: Sequence[int], boundaries: Sequence[int]) -> int:
    return max(sum(weights[start:stop]) for start, stop in pairwise(boundaries))


def test_an_instance_that_deepspeed_cuts_worse(deepspeed_balanced: Callable[[list[int], int], list[int]]) -> None:
    ours = partition([Runs(EXAMPLE)] * 4, 6)
    assert ours == (0, 1, 2, 5, 6)
    assert bottleneck(EXAMPLE, ours) == 19
    assert bottleneck(EXAMPLE, deepspeed_balanced(EXAMPLE, 4)) == 22


def test_never_worse_than_deepspeed_and_often_better(
    deepspeed_balanced: Callable[[list[int], int], list[int]],
) -> None:
    generator = np.random.default_rng(300)
    gains = []
    for _ in range(300):
        weights = generator.integers(1, 100, size=generator.integers(6, 17)).tolist()
        num_stages = int(generator.integers(3, len(weights)))
        ours = bottleneck(weights, partition([Runs(weights)] * num_stages, len(weights)))
        theirs = bottleneck(weights, deepspeed_balanced(weights, num_stages))
        assert ours <= theirs
        gains.append(theirs / ours)
    assert sum(gain > 1 for gain in gains) >= 20


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_layers_over_64_stages(seed: int) -> None:
    weights = np.random.default_rng(seed).integers(0, 10_000, size=1000).tolist()
    begin = time.perf_counter()
    boundaries = partition([Runs(weights)] * 64, 1000)
    assert time.perf_counter() - begin < 10
    assert_valid(boundaries, 1000, 64)
    assert bottleneck(weights, boundaries) == parametric_search(weights, 64)


def test_one_heavy_layer_among_a_thousand() -> None:
    weights = [1] * 500 + [10_000] + [1] * 499
    boundaries = partition([Runs(weights)] * 64, 1000)
    assert bottleneck(weights, boundaries) == parametric_search(weights, 64) == 10_000


@settings(STEADY, max_examples=300)
@given(st.data())
def test_make_plan_is_exact_on_unequal_tiers_and_links(data: st.DataObject) -> None:
    profile = data.draw(cost_profiles(max_layers=7) | profiles(min_layers=3))
    roomy = data.draw(st.sampled_from([True, True, False]))
    cluster = data.draw(clusters(max_devices=min(4, profile.num_layers), roomy=roomy))
    workload = data.draw(workloads())
    best = best_plan(profile, cluster, workload)
    plan = solve(profile, cluster, workload, "throughput")
    if best is None or plan is None:
        assert best is plan
        return
    assert_valid(plan.boundaries, profile.num_layers, len(cluster.devices))
    assert plan.bottleneck_seconds == best.bottleneck
    assert plan.boundaries in best.boundaries
    made = make_plan(profile, cluster, workload)
    assert made.boundaries == plan.boundaries


def test_all_cuts_are_all() -> None:
    assert list(all_cuts(4, 2)) == [(0, 1, 4), (0, 2, 4), (0, 3, 4)]
    assert len(list(all_cuts(12, 6))) == 462


def test_example_through_make_plan() -> None:
    plan = make_plan(
        ModelProfile.from_costs(EXAMPLE),
        Cluster.homogeneous("h200", 4, FREE),
        Workload(batch=8, sequence=1, micro_batch=1),
    )
    assert plan.boundaries == (0, 1, 2, 5, 6)
    assert plan.bottleneck_seconds == 19
