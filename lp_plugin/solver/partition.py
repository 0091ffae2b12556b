"""The exact solver: where to cut a chain of layers over stages in a given order.

Knows no model and no hardware, only numbers. A stage that holds layers ``start .. stop - 1`` costs::

    entry[start] + inner(start, stop) + exit[stop]

``inner`` is any function of the run that never falls when the run grows (so it may jump where a working set leaves a
memory tier), and infinite where the stage can't hold the run; `allowed` takes conditions that may come and go.
``entry`` and ``exit`` depend on the cut alone (receiving and sending what crosses it) and may be anything not negative.
Stages may all differ.

Answers are exact: dynamic programs over all runs of layers that can matter (`lp_plugin.solver.runs`). Among the
partitions with the least bottleneck, the one with the smallest spread (most in the emptiest stage) is taken, and of
those the lexicographically first.

Source:
    Bokhari, Partitioning problems in parallel, pipelined and distributed computing, 1988 (the program);
    Pinar and Aykanat, Fast optimal load balancing algorithms for 1D partitioning, 2004 (bounding the windows).
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from lp_plugin.errors import WorkloadError
from lp_plugin.solver.runs import FloatArray, IntArray, Kind, Runs, StageCosts, kinds_of

__all__ = ["StageCosts", "least_bottleneck", "least_total", "partition", "stage_cost"]

_FEW_RUNS = 2_000  # so many are looked at without asking which can matter
_MOST_KEPT = 2_000_000  # runs whose costs are kept
_MOST_AT_ONCE = 500_000  # runs evaluated at once
_CLOSE = 1e-3  # a first guess no further above a lower bound is good enough
_HUGE = float(np.finfo(np.float64).max)
_INFINITE = float("inf")


def stage_cost(stage: StageCosts, start: int, stop: int) -> float:
    """Cost of one stage that holds layers ``start .. stop - 1``; inf if it can't."""
    starts, stops = np.array([start]), np.array([stop])
    cost = stage.entry[starts] + stage.inner(starts, stops) + stage.exit[stops]
    return float(cost[0]) if stage.allowed(starts, stops)[0] else _INFINITE


def partition(
    stages: Sequence[StageCosts], num_layers: int, *, total_limit: float = _INFINITE
) -> tuple[int, ...] | None:
    """Boundaries of the partition with the least bottleneck; exact.

    Args:
        stages: Costs of each stage position, first stage first. Equal positions may be the same object, which
            saves time.
        num_layers: Layers to place.
        total_limit: What the stages together may cost. Sums are compared as floats: exact if the costs lie on a
            grid, as those of `lp_plugin.solver.cost` do.

    Returns:
        ``len(stages) + 1`` rising numbers from 0 to ``num_layers``, half-open (DeepSpeed's ``parts``); no stage
        is empty. Of equal bottlenecks the smallest spread, of those the lexicographically first. None if no
        partition is within the limits.

    Raises:
        WorkloadError: If there are more stages than layers, or no stage.
    """
    found = _least(stages, num_layers, stages, total_limit)
    if found is None:
        return None
    chain = found[1].within(found[0])
    floor = chain.greatest_floor()
    if total_limit < _INFINITE and chain.least_total(floor) > total_limit:
        chain = chain.within_total(total_limit)
        floors = chain.distinct_costs()[::-1]
        floor = floors[_first_that(lambda index: chain.least_total(floors[index]) <= total_limit, len(floors))]
    return chain.first(floor, total_limit)


def least_bottleneck(
    stages: Sequence[StageCosts],
    num_layers: int,
    *,
    totals: Sequence[StageCosts] | None = None,
    total_limit: float = _INFINITE,
) -> float:
    """The least cost of the most expensive stage over all partitions; inf if none is finite.

    Args:
        stages: As for `partition`.
        num_layers: As for `partition`.
        totals: Costs of the same stages whose sum is limited; ``stages`` themselves if left out.
        total_limit: What they may come to.

    Raises:
        WorkloadError: If there are more stages than layers, or no stage.
    """
    found = _least(stages, num_layers, totals or stages, total_limit)
    return _INFINITE if found is None else found[0]


def least_total(stages: Sequence[StageCosts], num_layers: int) -> float:
    """The least sum of all stages' costs over all partitions; inf if none is finite.

    Raises:
        WorkloadError: If there are more stages than layers, or no stage.
    """
    _check_size(len(stages), num_layers)
    return _Chain(stages, stages, num_layers, _HUGE).least_total()


def _least(
    stages: Sequence[StageCosts], num_layers: int, totals: Sequence[StageCosts], total_limit: float
) -> tuple[float, _Chain] | None:
    """The least bottleneck, and a chain that holds all partitions up to it; None without any."""
    _check_size(len(stages), num_layers)
    best = _INFINITE
    for bound in _guesses(kinds_of(stages, stages), num_layers):
        chain = _Chain(stages, totals, num_layers, bound)
        best = chain.least_bottleneck()
        if best < _INFINITE:
            break
    if best == _INFINITE:
        return None
    if total_limit == _INFINITE or chain.within(best).least_total() <= total_limit:
        return best, chain
    widest = chain.within(_HUGE)
    if widest.least_total() > total_limit:
        return None
    top = _bottleneck(kinds_of(stages, stages), widest.first(0.0, total_limit))
    bound = min(2 * best or top, top)
    while (chain := widest.within(bound)).least_total() > total_limit:
        bound = min(2 * bound, top)
    chain = chain.within_total(total_limit)
    costs = chain.distinct_costs()
    least = _first_that(lambda index: chain.within(costs[index]).least_total() <= total_limit, len(costs))
    return costs[least], chain


def _check_size(num_stages: int, num_layers: int) -> None:
    if not 1 <= num_stages <= num_layers:
        raise WorkloadError(
            f"{num_layers} layers can't fill {num_stages} stages: each stage needs at least one layer; "
            f"ask for 1 to {num_layers} stages."
        )


class _Chain:
    """All partitions whose every stage costs at most ``bound``; a stage also has a weight in the limited sum.

    With a bottleneck known, ``inner <= bound`` confines the starts of each stage to a window and its runs to a band.
    """

    def __init__(
        self, stages: Sequence[StageCosts], weights: Sequence[StageCosts], num_layers: int, bound: float
    ) -> None:
        self.bound = self._widest = bound
        self._given = stages, weights, num_layers
        self._num_layers = num_layers
        self._kinds = kinds_of(stages, weights)
        self._windows = _windows(self._kinds, num_layers, bound)
        self._bands = {kind: self._band(kind) for kind in dict.fromkeys(self._kinds)} if self._windows else {}
        many = sum(int(np.sum(sizes)) for *_, sizes in self._bands.values())
        self._kept = self._evaluate() if many <= _MOST_KEPT else None

    def within(self, bound: float) -> _Chain:
        """All partitions whose every stage costs at most another bound."""
        if self._kept is None or bound > self._widest:
            return _Chain(*self._given, bound)
        chain = copy.copy(self)
        chain.bound = bound
        return chain

    def within_total(self, limit: float) -> _Chain:
        """Only runs that are part of a partition whose weights come to ``limit`` or less."""
        remaining = self._remaining(np.add)
        spent = np.full(self._num_layers + 1, _INFINITE)
        spent[0] = 0.0
        kept = []
        for position in range(len(self._kinds)):
            parts, reached = [], np.full(self._num_layers + 1, _INFINITE)
            for runs in self._runs(position):
                weights = spent[runs.starts] + runs.weights
                cheap = (weights + remaining[position + 1][runs.stops] <= limit) & (runs.costs <= self.bound)
                np.minimum.at(reached, runs.stops[cheap], weights[cheap])
                parts.append(runs.those(cheap))
            kept.append(Runs.joined(parts))
            spent = reached
        chain = copy.copy(self)
        chain._kept, chain._widest = kept, self.bound
        return chain

    def distinct_costs(self) -> list[float]:
        """The costs of all runs, rising."""
        costs = np.unique(np.concatenate([runs.costs for runs in self._kept or []]))
        return [float(cost) for cost in costs[costs <= self.bound]]

    def least_bottleneck(self) -> float:
        """Least cost of the most expensive stage."""
        return _final(self._sweep(np.maximum, np.minimum, 0.0, _INFINITE, weigh=False))

    def greatest_floor(self) -> float:
        """Most that the cheapest stage can cost."""
        return _final(self._sweep(np.minimum, np.maximum, _INFINITE, -_INFINITE, weigh=False))

    def least_total(self, floor: float = 0.0) -> float:
        """Least sum of weights of partitions whose every stage costs at least ``floor``."""
        return _final(self._sweep(np.add, np.minimum, 0.0, _INFINITE, floor))

    def first(self, floor: float, total_limit: float) -> tuple[int, ...]:
        """The lexicographically first partition with every stage from ``floor`` to the bound, within the total.

        There must be one.
        """
        limited = total_limit < _INFINITE
        remaining = self._remaining(np.add if limited else np.maximum, floor)  # without a limit: whether there is a way
        boundaries, spent = [0], 0.0
        for position in range(len(self._kinds)):
            start = boundaries[-1]
            runs = Runs.joined([runs.between(start, start) for runs in self._runs(position)])
            total = remaining[position + 1][runs.stops] + (spent + runs.weights if limited else 0.0)
            chosen = (total <= min(total_limit, _HUGE)) & (runs.costs >= floor) & (runs.costs <= self.bound)
            choice = int(np.argmax(chosen))
            boundaries.append(int(runs.stops[choice]))
            spent += float(runs.weights[choice])
        return tuple(boundaries)

    def _remaining(self, combine: np.ufunc, floor: float = 0.0) -> list[FloatArray]:
        """Least combined weight of stages ``position ..`` by first layer; [stage][num_layers + 1]."""
        end = np.full(self._num_layers + 1, _INFINITE)
        end[self._num_layers] = 0.0
        return [*reversed([values.copy() for values in self._sweep(combine, np.minimum, 0.0, _INFINITE, floor)]), end]

    def _sweep(
        self,
        combine: np.ufunc,
        best: np.ufunc,
        nothing: float,
        impossible: float,
        floor: float = 0.0,
        *,
        weigh: bool = True,
    ) -> Iterator[FloatArray]:
        """Best combined weight or cost of stages ``position ..`` by first layer, from the last stage to the first."""
        ahead, values = np.full(self._num_layers + 1, impossible), np.empty(self._num_layers + 1)
        ahead[self._num_layers] = nothing
        for position in reversed(range(len(self._kinds))):
            values.fill(impossible)
            for runs in self._runs(position):
                reached = combine(runs.weights if weigh else runs.costs, ahead[runs.stops])
                reached[(runs.costs > self.bound) | (runs.costs < floor)] = impossible
                values[runs.starts[runs.heads]] = best.reduceat(reached, runs.heads)
            yield values
            ahead, values = values, ahead

    def _band(self, kind: Kind) -> tuple[IntArray, IntArray, IntArray]:
        """Starts that matter to a kind, the first stop from each that does, and how many do."""
        first, last = kind.positions[0], kind.positions[-1]
        starts = np.arange(self._windows[first][0], self._windows[last][1] + 1)
        lows = np.maximum(starts + 1, self._windows[first + 1][0])
        highs = np.full(len(starts), self._windows[last + 1][1])
        if not _is_small(len(self._kinds), self._num_layers):
            highs = np.minimum(highs, kind.furthest(self.bound)[starts])
        return starts, lows, np.maximum(highs - lows + 1, 0)

    def _evaluate(self) -> list[Runs]:
        """The runs of each position."""
        made = {kind: kind.evaluate(*band, self.bound) for kind, band in self._bands.items()}
        return [made[kind].between(*window) for kind, window in zip(self._kinds, self._windows, strict=False)]

    def _runs(self, position: int) -> Iterator[Runs]:
        """Runs that the stage could hold, a part of the starts at a time."""
        if self._kept is not None:
            yield from self._kept[position : position + 1]
            return
        kind, (low, high) = self._kinds[position], self._windows[position]
        starts, lows, sizes = self._bands[kind]
        most = max(_MOST_AT_ONCE // max(int(np.max(sizes)), 1), 1)
        for first in range(low - starts[0], high - starts[0] + 1, most):
            part = slice(first, min(first + most, high - starts[0] + 1))
            yield kind.evaluate(starts[part], lows[part], sizes[part], self.bound)


def _final(sweep: Iterator[FloatArray]) -> float:
    """The value of all stages together: that of layer 0 at the end of a sweep."""
    return float(deque(sweep, maxlen=1)[0][0])


def _is_small(num_stages: int, num_layers: int) -> bool:
    return num_stages * num_layers * (num_layers + 1) // 2 <= _FEW_RUNS


def _windows(kinds: Sequence[Kind], num_layers: int, bound: float) -> list[tuple[int, int]]:
    """First and last layer that each stage, and the end, can start with; empty if no partition can be."""
    count = len(kinds)
    if _is_small(count, num_layers):
        inner = [(position, num_layers - count + position) for position in range(1, count)]
        return [(0, 0), *inner, (num_layers, num_layers)]
    latest = _latest(kinds, num_layers, bound)
    earliest = [num_layers]
    for position in reversed(range(count)):
        earliest.append(max(int(np.searchsorted(kinds[position].furthest(bound), earliest[-1])), position))
    windows = list(zip(reversed(earliest), latest, strict=True))
    return windows if all(first <= last for first, last in windows) else []


def _guesses(kinds: Sequence[Kind], num_layers: int) -> list[float]:
    """Bounds on the bottleneck worth trying, up to none at all; empty if no partition can be."""
    if _is_small(len(kinds), num_layers):
        return [_HUGE]
    filled = _latest(kinds, num_layers, _HUGE)
    if filled[-1] < num_layers:
        return []
    low, best = 0.0, _bottleneck(kinds, filled)
    while best - low > _CLOSE * best:
        bound = low + (best - low) / 2
        filled = _latest(kinds, num_layers, bound)
        reached = _bottleneck(kinds, filled) if filled[-1] == num_layers else _INFINITE
        best, low = min(best, reached), low if reached <= bound else bound
    return sorted({best, min(4 * best, _HUGE), _HUGE})  # the first may be too small


def _latest(kinds: Sequence[Kind], num_layers: int, bound: float) -> list[int]:
    """The last layer that each stage, and the end, can start with: stages filled as far as the bound allows.

    They are the boundaries of a partition, unless a stage can't hold the layer it would start with, or may not.
    """
    boundaries = [0]
    for position, kind in enumerate(kinds):
        furthest = int(kind.furthest(bound)[boundaries[-1]])
        boundaries.append(min(furthest, num_layers - (len(kinds) - position - 1)))
    return boundaries


def _bottleneck(kinds: Sequence[Kind], boundaries: Sequence[int]) -> float:
    """Cost of the most expensive stage, whatever `allowed` says; stages without layers cost nothing."""
    pairs = np.array(list(pairwise(boundaries)))
    slowest = 0.0
    for kind in dict.fromkeys(kinds):
        starts, stops = pairs[kind.positions].T
        filled = starts < stops
        slowest = max(slowest, float(np.max(kind.costs(starts[filled], stops[filled]), initial=0.0)))
    return slowest


def _first_that(holds: Callable[[int], bool], count: int) -> int:
    """The smallest number below ``count`` that holds, if larger ones do too; the last always does."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
