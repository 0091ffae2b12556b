"""The exact solver against every partition tried, against other methods, and on the edges."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracles import all_cuts, brute_force, by_layer, parametric_search
from strategies import STEADY

from lp_plugin import WorkloadError
from lp_plugin.solver import partition as solver
from lp_plugin.solver.partition import StageCosts, least_bottleneck, least_total, partition, stage_cost

EXAMPLE = [4, 18, 2, 5, 12, 11]
INFINITE = float("inf")


class Runs:
    """`StageCosts` out of plain lists: layers' seconds, memory with a limit, transfers."""

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

    def allowed(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.ones(np.shape(stops), dtype=np.bool_)


class Table:
    """`StageCosts` out of any numbers for each run: ``inner[start][stop]`` never falls as the run grows."""

    def __init__(self, rng: random.Random, num_layers: int, most: int) -> None:
        count = num_layers + 1
        self.entry = np.array([rng.randrange(most + 1) for _ in range(count)], dtype=float)
        self.exit = np.array([rng.randrange(most + 1) for _ in range(count)], dtype=float)
        if rng.random() < 0.5:
            self.entry[:] = self.exit[:] = rng.randrange(most + 1)
        self._inner = np.full((count, count), np.nan)
        self._allowed = np.ones((count, count), dtype=np.bool_)
        forbidden, heavy = rng.choice([0, 0, 0.1, 0.5]), rng.choice([0, 0, 0.02])
        for size in range(1, count):
            for start in range(count - size):
                stop = start + size
                inside = (self._inner[start + 1, stop], self._inner[start, stop - 1]) if size > 1 else (0.0, 0.0)
                more = INFINITE if rng.random() < heavy else rng.choice([0, 0, rng.randrange(most + 1)])
                self._inner[start, stop] = max(inside) + more
                self._allowed[start, stop] = rng.random() >= forbidden

    def inner(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(self._inner[starts, stops])

    def allowed(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.asarray(self._allowed[starts, stops])

    def plain(self, start: int, stop: int) -> float | None:
        if not self._allowed[start, stop] or self._inner[start, stop] == INFINITE:
            return None
        return float(self.entry[start] + self._inner[start, stop] + self.exit[stop])


@pytest.fixture(params=["all", "windows", "pieces"])
def looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems solved as such, as large ones are, and as those whose runs are too many to keep."""
    if request.param != "all":
        monkeypatch.setattr(solver, "_FEW_RUNS", 0)
    if request.param == "pieces":
        monkeypatch.setattr(solver, "_MOST_KEPT", 0)
        monkeypatch.setattr(solver, "_MOST_AT_ONCE", 5)


def assert_valid(boundaries: tuple[int, ...], num_layers: int, num_stages: int) -> None:
    assert type(boundaries) is tuple
    assert all(type(bound) is int for bound in boundaries)
    assert len(boundaries) == num_stages + 1
    assert (boundaries[0], boundaries[-1]) == (0, num_layers)
    assert all(low < high for low, high in pairwise(boundaries))


def costs_of(stages: Sequence[StageCosts], boundaries: Sequence[int]) -> list[float]:
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
        assert boundaries == best.boundaries
    assert (worse, better) == (0, 0)
    assert 20 < infeasible < 500  # both outcomes are met


def random_tables(rng: random.Random, num_layers: int, num_stages: int) -> list[Table]:
    most = rng.choice([1, 3, 20])
    kinds = [Table(rng, num_layers, most) for _ in range(rng.choice([1, 2, num_stages]))]
    return [rng.choice(kinds) for _ in range(num_stages)]


def plain_costs(tables: Sequence[Table]) -> Callable[[int, int, int], float | None]:
    return lambda stage, start, stop: tables[stage].plain(start, stop)


@pytest.mark.usefixtures("looked_at")
@pytest.mark.parametrize("seed", range(2))
def test_any_tables_against_every_partition(seed: int) -> None:
    """Jumps, runs that can't be held or are forbidden though longer ones aren't, transfers of any size, a total."""
    rng = random.Random(seed)  # noqa: S311 - for the same instances in every run
    infeasible, binding = 0, 0
    for _ in range(800):
        num_layers = rng.randint(1, 11)
        num_stages = rng.randint(1, min(4, num_layers))
        tables = random_tables(rng, num_layers, num_stages)
        free = brute_force(num_layers, num_stages, plain_costs(tables))
        assert partition(tables, num_layers) == (free and free.boundaries)
        assert least_bottleneck(tables, num_layers) == (free.bottleneck if free else INFINITE)
        totals = [total_of(tables, bounds) for bounds in all_cuts(num_layers, num_stages)]
        assert least_total(tables, num_layers) == min(totals)
        if free is None:
            continue
        limit = min(rng.choices(totals, k=3)) - rng.choice([0, 0, 1])
        best = brute_force(num_layers, num_stages, plain_costs(tables), limit)
        assert partition(tables, num_layers, total_limit=limit) == (best and best.boundaries)
        infeasible += best is None
        binding += best is not None and best != free
    assert infeasible > 10
    assert binding > 50


def total_of(tables: Sequence[Table], bounds: tuple[int, ...]) -> float:
    costs = [table.plain(*run) for table, run in zip(tables, pairwise(bounds), strict=True)]
    return INFINITE if None in costs else sum(costs)


@pytest.mark.usefixtures("looked_at")
@pytest.mark.parametrize("seed", range(2))
def test_a_bottleneck_of_one_cost_under_a_total_of_another(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 - for the same instances in every run
    binding = 0
    for _ in range(600):
        num_layers = rng.randint(2, 9)
        num_stages = rng.randint(1, min(4, num_layers))
        tables, others = (random_tables(rng, num_layers, num_stages) for _ in "ab")
        known = [
            (max(table.plain(*run) or 0 for table, run in zip(tables, pairwise(bounds), strict=True)), total)
            for bounds in all_cuts(num_layers, num_stages)
            if total_of(tables, bounds) < INFINITE and (total := total_of(others, bounds)) < INFINITE
        ]
        limit = min(total for _, total in rng.choices(known, k=3)) if known else 10.0
        best = min((bottleneck for bottleneck, total in known if total <= limit), default=INFINITE)
        assert least_bottleneck(tables, num_layers, totals=others, total_limit=limit) == best
        binding += INFINITE > best > min(bottleneck for bottleneck, _ in known) if known else False
    assert binding > 20


@st.composite
def long_chains(draw: st.DrawFn) -> tuple[list[Table], int]:
    num_layers = draw(st.integers(12, 60))
    num_stages = draw(st.integers(1, min(12, num_layers)))
    rng = random.Random(draw(st.integers(0, 10**9)))  # noqa: S311
    return random_tables(rng, num_layers, num_stages), num_layers


@settings(STEADY, max_examples=150)
@given(long_chains())
def test_long_chains_against_a_plain_program(chain: tuple[list[Table], int]) -> None:
    tables, num_layers = chain
    best = by_layer(num_layers, len(tables), plain_costs(tables))
    boundaries = partition(tables, num_layers)
    if best is None or boundaries is None:
        assert best is boundaries
        return
    assert_valid(boundaries, num_layers, len(tables))
    costs = costs_of(tables, boundaries)
    assert (max(costs), min(costs)) == best


@settings(STEADY, max_examples=150)
@given(long_chains())
def test_no_earlier_cut_is_as_good(chain: tuple[list[Table], int]) -> None:
    """Of equals the lexicographically first: no smaller boundary can be put in the place of any, whatever follows."""
    tables, num_layers = chain
    boundaries = partition(tables, num_layers)
    if boundaries is None:
        return
    costs = costs_of(tables, boundaries)
    low, high = min(costs), max(costs)

    def good(stage: int, start: int, stop: int) -> bool:
        cost = tables[stage].plain(start, stop)
        return cost is not None and low <= cost <= high

    to_end = [{num_layers}]  # cuts from which the rest can be as good, from the last stage to the first
    for stage in reversed(range(len(tables))):
        to_end.append(
            {start for start in range(num_layers) for stop in to_end[-1] if stop > start and good(stage, start, stop)}
        )
    to_end.reverse()
    for stage, (start, stop) in enumerate(pairwise(boundaries)):
        assert not [
            earlier
            for earlier in range(start + 1, stop)
            if earlier in to_end[stage + 1] and good(stage, start, earlier)
        ]


def test_the_same_instance_gives_the_same_boundaries() -> None:
    once, again = ([partition(*random_instance(np.random.default_rng(seed))[:2]) for seed in range(50)] for _ in "ab")
    assert once == again


def test_equal_bottlenecks_are_spread_evenly() -> None:
    weights = [9, 1, 1, 1, 1, 1, 1]  # the 9 sets the bottleneck; the ones could be cut anywhere
    assert partition([Runs(weights)] * 3, 7) == (0, 1, 4, 7)
    assert partition([Runs([*weights, 1])] * 3, 8) == (0, 1, 4, 8)  # 9, 3, 4 before 9, 4, 3: the first of equals


@pytest.mark.parametrize("num_stages", [0, 7, 8, 100])
@pytest.mark.parametrize("question", [partition, least_bottleneck, least_total])
def test_more_stages_than_layers_or_none(num_stages: int, question: Callable[..., object]) -> None:
    with pytest.raises(WorkloadError, match=f"6 layers can't fill {num_stages} stages.*ask for 1 to 6"):
        question([Runs(EXAMPLE)] * num_stages, 6)


def test_as_many_stages_as_layers_and_one_stage() -> None:
    assert partition([Runs(EXAMPLE)] * 6, 6) == (0, 1, 2, 3, 4, 5, 6)
    assert partition([Runs(EXAMPLE)], 6) == (0, 6)
    assert partition([Runs([3], memory=[5], limit=4)], 1) is None


@pytest.mark.parametrize("weight", [0.0, 5e-324, 1e-310, 1e-200, 1e200, 1e300])
def test_costs_of_any_size(weight: float) -> None:
    assert partition([Runs([weight] * 5)] * 2, 5) == ((0, 2, 5) if weight else (0, 1, 5))


@pytest.mark.parametrize("factor", [2.0**-40, 0.5, 2.0, 2.0**40])
def test_another_unit_of_time_gives_the_same_boundaries(factor: float) -> None:
    rng = random.Random(7)  # noqa: S311
    for _ in range(50):
        num_layers = rng.randint(2, 40)
        weights = [[rng.random() for _ in range(num_layers)] for _ in range(rng.randint(1, min(num_layers, 8)))]
        scaled = [[value * factor for value in row] for row in weights]
        assert partition([*map(Runs, weights)], num_layers) == partition([*map(Runs, scaled)], num_layers)


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


@pytest.mark.parametrize(("num_layers", "num_stages"), [(1000, 64), (10_000, 1024)])
def test_many_layers_over_many_stages(num_layers: int, num_stages: int) -> None:
    weights = np.random.default_rng(num_layers).integers(0, 10_000, size=num_layers).tolist()
    boundaries = partition([Runs(weights)] * num_stages, num_layers)
    assert_valid(boundaries, num_layers, num_stages)
    assert bottleneck(weights, boundaries) == parametric_search(weights, num_stages)


@pytest.mark.parametrize("weights", [[1] * 500 + [10_000] + [1] * 499, [0] * 1000, [0] * 999 + [1]])
def test_a_thousand_layers_of_which_hardly_any_cost(weights: list[int]) -> None:
    """Nearly every partition has the least bottleneck."""
    boundaries = partition([Runs(weights)] * 64, 1000)
    assert_valid(boundaries, 1000, 64)
    assert bottleneck(weights, boundaries) == parametric_search(weights, 64) == max(weights)


def fill_all(stages: Sequence[Runs], num_layers: int, bound: float) -> bool:
    """Whether stages that are each filled up to a bound hold all layers, as sums of layers without transfers allow."""
    start = 0
    for position, stage in enumerate(stages):
        stop = start
        most = num_layers - (len(stages) - position - 1)
        while stop < most and stage_cost(stage, start, stop + 1) <= bound:
            stop += 1
        if stop == start:
            return False
        start = stop
    return start == num_layers


def test_a_thousand_layers_over_64_unequal_stages_with_little_memory() -> None:
    rng = np.random.default_rng(5)
    seconds, memory = rng.integers(1, 1000, size=1000), rng.integers(1, 100, size=1000)
    stages = [Runs((seconds * speed).tolist(), memory.tolist(), 900) for speed in rng.integers(1, 5, size=64)]
    boundaries = partition(stages, 1000)
    assert_valid(boundaries, 1000, 64)
    best = max(costs_of(stages, boundaries))
    assert best < INFINITE
    assert fill_all(stages, 1000, best)
    assert not fill_all(stages, 1000, math.nextafter(best, 0.0))


def test_all_cuts_are_all() -> None:
    assert list(all_cuts(4, 2)) == [(0, 1, 4), (0, 2, 4), (0, 3, 4)]
    assert len(list(all_cuts(12, 6))) == 462
