"""Statistics of repeated, paired trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ratio", "Spread", "ratio_of_rates", "spread"]

_RESAMPLES = 10_000
_SEED = 0
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Repeated measurements of one quantity, in its own unit."""

    count: int
    """How many."""
    median: float
    """Of all."""
    mean: float
    """Of all."""
    lowest: float
    """Of all."""
    highest: float
    """Of all."""
    deviation: float | None
    """Standard deviation of the sample, n - 1 below the fraction; None for a single measurement."""

    @property
    def relative_deviation(self) -> float | None:
        """The standard deviation as a share of the mean; None for a single measurement or a mean of 0."""
        return self.deviation / abs(self.mean) if self.deviation is not None and self.mean else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A rate over the baseline's rate."""

    value: float
    """Of the medians."""
    low: float | None = None
    """Lower end of the 95% bootstrap interval; None with fewer than two pairs of trials."""
    high: float | None = None
    """Upper end."""

    def times(self, factor: float) -> Ratio:
        """Value and interval scaled."""
        if self.low is None or self.high is None:
            return Ratio(value=self.value * factor)
        return Ratio(value=self.value * factor, low=self.low * factor, high=self.high * factor)


def spread(values: Sequence[float]) -> Spread | None:
    """Median, mean, extremes and standard deviation; None of no values."""
    if not values:
        return None
    measured = np.asarray(values, dtype=np.float64)
    return Spread(
        count=len(measured),
        median=float(np.median(measured)),
        mean=float(measured.mean()),
        lowest=float(measured.min()),
        highest=float(measured.max()),
        deviation=float(measured.std(ddof=1)) if len(measured) > 1 else None,
    )


def ratio_of_rates(seconds: Sequence[float], baseline_seconds: Sequence[float]) -> Ratio | None:
    """How many times the baseline's rate, for the same work: median seconds of the baseline over median seconds.

    Trial k of one is paired with trial k of the other, since they ran next to each other: resampling draws pairs, so
    that what slows both for a while does not widen the interval. Trials beyond the shorter of both are not resampled.

    Args:
        seconds: Of each trial.
        baseline_seconds: Of each trial of the baseline.

    Returns:
        The ratio with its 95% percentile interval of 10,000 resamples, always the same ones; None without trials.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    if not seconds or not baseline_seconds:
        return None
    value = float(np.median(baseline_seconds) / np.median(seconds))
    count = min(len(seconds), len(baseline_seconds))
    if count < 2:
        return Ratio(value=value)
    drawn = np.random.default_rng(_SEED).integers(count, size=(_RESAMPLES, count))
    ratios = _medians(baseline_seconds, drawn) / _medians(seconds, drawn)
    low, high = np.quantile(ratios, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Ratio(value=value, low=float(low), high=float(high))


def _medians(values: Sequence[float], drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each resample; shape [resamples]."""
    return np.asarray(np.median(np.asarray(values, dtype=np.float64)[drawn], axis=1))
