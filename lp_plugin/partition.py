"""The exact solver: where to cut a chain of layers so that the slowest stage is as fast as possible.

Knows no model and no hardware, only numbers. A stage that holds layers ``start .. stop - 1`` costs::

    entry[start] + inner(start, stop) + exit[stop]

``inner`` never falls when the stage grows (infinite where the stage does not fit its device); ``entry`` and
``exit`` depend on the cut alone (receiving and sending what crosses it) and may be anything not negative.
Stages may all differ. The method is the dynamic program

    best[stage][stop] = min over start of max(best[stage - 1][start], cost[stage](start, stop))

over only those ``(start, stop)`` whose ``inner`` does not exceed the bottleneck of a partition already known:
``inner`` is monotone, so they form a band that a vectorised binary search finds. Among all partitions with the
least bottleneck a second pass takes one with the least sum of squared stage costs, so that stages are even.

Source:
    Bokhari, Partitioning problems in parallel, pipelined and distributed computing, 1988 (the program);
    Pinar and Aykanat, Fast optimal load balancing algorithms for 1D partitioning, 2004 (bounding the band).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from lp_plugin.errors import WorkloadError

__all__ = ["StageCosts", "partition", "stage_cost"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class StageCosts(Protocol):
    """The costs of one stage position for every run of layers it could hold."""

    @property
    def entry(self) -> FloatArray:
        """Cost of starting at each layer; shape [num_layers + 1]."""

    @property
    def exit(self) -> FloatArray:
        """Cost of stopping before each layer; shape [num_layers + 1]."""

    def inner(self, starts: IntArray, stops: IntArray) -> FloatArray:
        """Cost of holding ``starts .. stops - 1``, never falling as the run grows; inf if it can't be held."""


def stage_cost(stage: StageCosts, start: int, stop: int) -> float:
    """Cost of one stage that holds layers ``start .. stop - 1``."""
    inner = stage.inner(np.array([start]), np.array([stop]))[0]
    return float(stage.entry[start] + inner + stage.exit[stop])


def partition(stages: Sequence[StageCosts], num_layers: int) -> tuple[int, ...] | None:
    """Boundaries of the partition with the least bottleneck; exact.

    Args:
        stages: Costs of each stage position, first stage first. Equal positions may be the same object, which
            saves time.
        num_layers: Layers to place.

    Returns:
        ``len(stages) + 1`` rising numbers from 0 to ``num_layers``, half-open (DeepSpeed's ``parts``); no stage
        is empty. None if no partition has a finite cost.

    Raises:
        WorkloadError: If there are more stages than layers, or no stage.
    """
    if not 1 <= len(stages) <= num_layers:
        raise WorkloadError(
            f"{num_layers} layers can't fill {len(stages)} stages: each stage needs at least one layer; "
            f"ask for 1 to {num_layers} stages."
        )
    bound = _bottleneck(stages, _even_cut(stages[0], num_layers, len(stages)))
    distinct = {id(stage): stage for stage in stages}
    bands = {key: _band(stage, num_layers, bound) for key, stage in distinct.items()}
    best, _ = _sweep([bands[id(stage)] for stage in stages], num_layers, combine=np.maximum)
    if not np.isfinite(best):
        return None
    scale = best or 1.0  # squares of shares of the bottleneck can't overflow
    squares = {
        key: np.where(band <= best, np.square(np.minimum(band, best) / scale), np.inf) for key, band in bands.items()
    }
    _, boundaries = _sweep([squares[id(stage)] for stage in stages], num_layers, combine=np.add)
    return boundaries


def _bottleneck(stages: Sequence[StageCosts], boundaries: Sequence[int]) -> float:
    costs = [
        stage_cost(stage, start, stop)
        for stage, start, stop in zip(stages, boundaries[:-1], boundaries[1:], strict=True)
    ]
    return max(costs)


def _even_cut(stage: StageCosts, num_layers: int, num_stages: int) -> list[int]:
    """A first guess: cuts at equal shares of the layers' own costs, each stage holding at least one layer."""
    index = np.arange(num_layers)
    alone = stage.inner(index, index + 1)
    total = np.cumsum(np.where(np.isfinite(alone), alone, 0.0))
    targets = total[-1] * np.arange(1, num_stages) / num_stages
    cuts = np.searchsorted(total, targets) + 1
    lowest = np.arange(1, num_stages)
    cuts = np.maximum.accumulate(np.maximum(cuts, lowest) - lowest) + lowest  # strictly rising
    cuts = np.minimum(cuts, num_layers - num_stages + lowest)
    return [0, *(int(cut) for cut in cuts), num_layers]


def _band(stage: StageCosts, num_layers: int, bound: float) -> FloatArray:
    """Costs of all runs with ``inner <= bound``; entry [stop - 1, width] is the run of ``width + 1`` layers."""
    stops = np.arange(1, num_layers + 1)
    limit = min(bound, np.finfo(np.float64).max)
    low, high = np.zeros_like(stops), stops.copy()  # the least start that is allowed lies in [low, high]
    while np.any(low < high):
        middle = (low + high) // 2
        allowed = stage.inner(np.minimum(middle, stops - 1), stops) <= limit
        allowed |= middle == stops  # an empty run: never too heavy
        high = np.where(allowed, middle, high)
        low = np.where(allowed, low, middle + 1)
    width = max(int(np.max(stops - high)), 1)
    starts = stops[:, None] - 1 - np.arange(width)[None, :]
    inside = starts >= high[:, None]
    clipped = np.maximum(starts, 0)
    ends = np.broadcast_to(stops[:, None], starts.shape)
    costs = stage.entry[clipped] + stage.inner(clipped, ends) + stage.exit[ends]
    return np.where(inside & (costs <= limit), costs, np.inf)


def _sweep(bands: Sequence[FloatArray], num_layers: int, *, combine: np.ufunc) -> tuple[float, tuple[int, ...]]:
    """One pass of the dynamic program: least combined cost (``np.maximum`` or ``np.add``) and its boundaries."""
    best = np.full(num_layers + 1, np.inf)
    best[0] = 0.0
    choices = []
    for costs in bands:
        width = costs.shape[1]
        padded = np.concatenate([np.full(width - 1, np.inf), best[:-1]])
        before = sliding_window_view(padded, width)[:, ::-1]  # [stop - 1, k] is best[stop - 1 - k]
        reached = combine(before, costs)
        choice = np.argmin(reached, axis=1)
        choices.append(choice)
        best = np.concatenate([[np.inf], reached[np.arange(num_layers), choice]])
    boundaries = [num_layers]
    for choice in reversed(choices):
        boundaries.append(boundaries[-1] - 1 - int(choice[boundaries[-1] - 1]))
    return float(best[num_layers]), tuple(reversed(boundaries))
