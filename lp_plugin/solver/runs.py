"""Runs of layers that a stage could hold, with what they cost: what `lp_plugin.solver.partition` sweeps over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["BoolArray", "FloatArray", "IntArray", "Kind", "Runs", "StageCosts", "kinds_of"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


class StageCosts(Protocol):
    """The costs of one stage position for every run of layers it could hold."""

    entry: FloatArray
    """Cost of starting at each layer; shape [num_layers + 1]."""

    exit: FloatArray
    """Cost of stopping before each layer; shape [num_layers + 1]."""

    def inner(self, starts: IntArray, stops: IntArray) -> FloatArray:
        """Cost of holding ``starts .. stops - 1``, never falling as the run grows; inf if it can't be held."""

    def allowed(self, starts: IntArray, stops: IntArray) -> BoolArray:
        """Whether the stage may hold the run at all, for conditions that may come and go as the run grows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Runs of layers that one stage could hold, in order of start and stop."""

    starts: IntArray
    """First layers."""
    stops: IntArray
    """One past the last layers."""
    costs: FloatArray
    """What is bounded."""
    weights: FloatArray
    """What is summed over the stages."""
    heads: IntArray
    """Index of the first run of each start."""

    @classmethod
    def of(cls, starts: IntArray, stops: IntArray, costs: FloatArray, weights: FloatArray) -> Runs:
        """Runs in order."""
        changes = np.concatenate([np.ones(min(len(starts), 1), dtype=np.bool_), starts[1:] != starts[:-1]])
        return cls(starts=starts, stops=stops, costs=costs, weights=weights, heads=np.flatnonzero(changes))

    @classmethod
    def joined(cls, parts: Sequence[Runs]) -> Runs:
        """Parts in order, each with starts of its own."""
        columns = [[part.starts, part.stops, part.costs, part.weights] for part in parts]
        starts, stops, costs, weights = (np.concatenate(column) for column in zip(*columns, strict=True))
        return cls.of(starts, stops, costs, weights)

    def those(self, chosen: BoolArray | slice) -> Runs:
        """Only some of them."""
        return Runs.of(self.starts[chosen], self.stops[chosen], self.costs[chosen], self.weights[chosen])

    def between(self, low: int, high: int) -> Runs:
        """Only those that start with layers ``low .. high``."""
        first, last = np.searchsorted(self.starts, [low, high + 1])
        return self if last - first == len(self.starts) else self.those(slice(first, last))


class Kind:
    """The costs of one stage, for all positions that share them.

    Args:
        stage: Its costs.
        weight: Further costs of the same stage, to be summed.
        positions: Where it stands, rising.
        num_stages: Stages of the chain.
    """

    def __init__(self, stage: StageCosts, weight: StageCosts, positions: Sequence[int], num_stages: int) -> None:
        self.positions = positions
        self._stage, self._weight = stage, weight
        self._num_layers = len(stage.entry) - 1
        stages_after = num_stages - 1 - positions[-1]
        self._least_entry = float(np.min(stage.entry[positions[0] : self._num_layers]))
        self._least_exit = float(np.min(stage.exit[1 : self._num_layers + 1 - stages_after]))
        self._known: tuple[float, IntArray] = (-1.0, np.zeros(0, dtype=np.int64))

    def furthest(self, bound: float) -> IntArray:
        """For each start a stop beyond which every run costs more than ``bound``; never falling."""
        if self._known[0] != bound:
            starts = np.arange(self._num_layers)
            low, high = starts, np.full(self._num_layers, self._num_layers)
            while np.any(low < high):
                middle = (low + high + 1) // 2
                fits = self._least_entry + self._stage.inner(starts, middle) + self._least_exit <= bound
                low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
            self._known = (bound, low)
        return self._known[1]

    def costs(self, starts: IntArray, stops: IntArray) -> FloatArray:
        """Costs of runs, whether or not they are allowed."""
        return np.asarray(self._stage.entry[starts] + self._stage.inner(starts, stops) + self._stage.exit[stops])

    def evaluate(self, starts: IntArray, lows: IntArray, sizes: IntArray, bound: float) -> Runs:
        """The runs from each start to ``size`` stops from its ``low`` on, as far as they cost at most ``bound``."""
        firsts = np.repeat(starts, sizes)
        stops = np.arange(len(firsts)) + np.repeat(lows - np.cumsum(sizes) + sizes, sizes)
        costs = self.costs(firsts, stops)
        chosen = (costs <= bound) & self._stage.allowed(firsts, stops)
        if self._weight is self._stage:
            return Runs.of(firsts, stops, costs, costs).those(chosen)
        weights = self._weight.entry[firsts] + self._weight.inner(firsts, stops) + self._weight.exit[stops]
        chosen &= (weights < np.inf) & self._weight.allowed(firsts, stops)
        return Runs.of(firsts, stops, costs, weights).those(chosen)


def kinds_of(stages: Sequence[StageCosts], weights: Sequence[StageCosts]) -> list[Kind]:
    """The kind of each position; positions with the same costs and weights share one."""
    keys = [(id(stage), id(weight)) for stage, weight in zip(stages, weights, strict=True)]
    positions: dict[tuple[int, int], list[int]] = {}
    for position, key in enumerate(keys):
        positions.setdefault(key, []).append(position)
    made = {key: Kind(stages[at[0]], weights[at[0]], at, len(stages)) for key, at in positions.items()}
    return [made[key] for key in keys]
