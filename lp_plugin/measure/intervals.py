"""Sets of moments as arrays of intervals: what at least one of them covers, what two sets share, what one has alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["Intervals", "Moments", "difference", "intersection", "make_intervals", "measure", "shares", "union"]

Moments = npt.NDArray[np.int64]
"""Points in time, nanoseconds."""
Intervals = npt.NDArray[np.int64]
"""[intervals, 2]: start and stop of each, nanoseconds, half-open. What the functions below give is sorted, disjoint,
without empty ones, and with gaps between."""


def make_intervals(starts_and_stops: object) -> Intervals:
    """An array from any sequence of pairs, an empty one too."""
    return np.asarray(starts_and_stops, dtype=np.int64).reshape(-1, 2)


def union(intervals: Intervals) -> Intervals:
    """What at least one interval covers."""
    intervals = intervals[intervals[:, 0] < intervals[:, 1]]
    if not len(intervals):
        return intervals
    intervals = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reached = np.maximum.accumulate(intervals[:, 1])
    begins = np.flatnonzero(np.r_[True, intervals[1:, 0] > reached[:-1]])
    ends = np.r_[begins[1:], len(intervals)] - 1
    return np.stack([intervals[begins, 0], reached[ends]], axis=1)


def intersection(first: Intervals, second: Intervals) -> Intervals:
    """What both cover."""
    return _combined(first, second, np.logical_and)


def difference(first: Intervals, second: Intervals) -> Intervals:
    """What the first covers and the second does not."""
    return _combined(first, second, lambda one, other: one & ~other)


def measure(intervals: Intervals) -> int:
    """Nanoseconds that at least one interval covers."""
    covered = union(intervals)
    return int((covered[:, 1] - covered[:, 0]).sum())


def shares(intervals: Intervals, stop: int, columns: int) -> npt.NDArray[np.float64]:
    """Of equal columns from 0 to ``stop`` nanoseconds, the share of each that at least one interval covers."""
    covered = union(intervals)
    steps = np.stack([np.zeros(len(covered)), covered[:, 1] - covered[:, 0]], axis=1)  # nothing till a start, then all
    until = np.interp(np.linspace(0, stop, columns + 1), np.r_[0, covered.ravel()], np.r_[0, np.cumsum(steps)])
    return np.diff(until) / (stop / columns)


def _combined(
    first: Intervals,
    second: Intervals,
    keeps: Callable[[npt.NDArray[np.bool_], npt.NDArray[np.bool_]], npt.NDArray[np.bool_]],
) -> Intervals:
    """The pieces between neighbouring edges of both sets for which ``keeps`` says so."""
    one, other = union(first), union(second)
    edges = np.unique(np.concatenate([one.ravel(), other.ravel()]))
    kept = keeps(_covered(one, edges[:-1]), _covered(other, edges[:-1]))
    return union(np.stack([edges[:-1][kept], edges[1:][kept]], axis=1))


def _covered(disjoint: Intervals, moments: Moments) -> npt.NDArray[np.bool_]:
    """Whether each moment lies in one of the intervals, which are disjoint."""
    begun = np.searchsorted(np.sort(disjoint[:, 0]), moments, side="right")
    ended = np.searchsorted(np.sort(disjoint[:, 1]), moments, side="right")
    return begun > ended
