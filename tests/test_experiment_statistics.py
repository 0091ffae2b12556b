"""Statistics of paired trials, against the standard library and against every possible resample."""

import itertools
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lp_plugin.bench.experiment.statistics import Ratio, ratio_of_rates, spread

SECONDS = st.floats(1e-6, 1e6)


@given(st.lists(SECONDS, min_size=1, max_size=9))
def test_a_spread_is_what_the_standard_library_says(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert found.count == len(values)
    assert found.median == pytest.approx(statistics.median(values))
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert (found.lowest, found.highest) == (min(values), max(values))
    if len(values) == 1:
        assert found.deviation is None
        assert found.relative_deviation is None
    else:
        assert found.deviation == pytest.approx(statistics.stdev(values), rel=1e-6, abs=1e-9 * max(values))
        assert found.relative_deviation == found.deviation / found.mean


def test_nothing_measured_is_nothing() -> None:
    assert spread([]) is None
    assert ratio_of_rates([], [1.0]) is None
    assert ratio_of_rates([1.0], []) is None
    assert ratio_of_rates([2.0], [1.0]) == Ratio(value=0.5)
    assert Ratio(value=0.5).times(4) == Ratio(value=2.0)


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=2, max_size=7))
def test_a_ratio_is_of_medians_and_within_that_of_the_extremes(pairs: list[tuple[float, float]]) -> None:
    seconds, baseline = zip(*pairs, strict=True)
    found = ratio_of_rates(seconds, baseline)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.value == pytest.approx(statistics.median(baseline) / statistics.median(seconds))
    assert min(baseline) / max(seconds) * (1 - 1e-9) <= found.low <= found.high
    assert found.high <= max(baseline) / min(seconds) * (1 + 1e-9)
    assert ratio_of_rates(seconds, baseline) == found


def test_the_interval_is_that_of_all_resamples_of_pairs() -> None:
    seconds, baseline = (1.0, 1.02, 0.97, 1.05), (1.11, 1.08, 1.12, 1.10)
    every = sorted(
        statistics.median(baseline[k] for k in drawn) / statistics.median(seconds[k] for k in drawn)
        for drawn in itertools.product(range(4), repeat=4)
    )
    found = ratio_of_rates(seconds, baseline)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    below_low = sum(each < found.low * (1 - 1e-12) for each in every) / len(every)
    at_low = sum(each <= found.low * (1 + 1e-12) for each in every) / len(every)
    below_high = sum(each < found.high * (1 - 1e-12) for each in every) / len(every)
    at_high = sum(each <= found.high * (1 + 1e-12) for each in every) / len(every)
    assert below_low <= 0.025 + 0.005
    assert at_low >= 0.025 - 0.005
    assert below_high <= 0.975 + 0.005
    assert at_high >= 0.975 - 0.005


def test_what_slows_both_of_a_pair_does_not_widen_the_interval() -> None:
    slow = (1.0, 1.5, 0.8, 2.0, 1.2)
    paired = ratio_of_rates(slow, tuple(1.1 * each for each in slow))
    assert paired is not None
    assert paired.low == pytest.approx(1.1)
    assert paired.high == pytest.approx(1.1)
    crossed = ratio_of_rates(slow, tuple(1.1 * each for each in reversed(slow)))
    assert crossed is not None
    assert crossed.low is not None
    assert crossed.high is not None
    assert crossed.high - crossed.low > 0.3


def test_trials_beyond_the_shorter_side_count_in_the_median_only() -> None:
    found = ratio_of_rates([1.0, 1.0], [2.0, 2.0, 8.0])
    assert found == Ratio(value=2.0, low=2.0, high=2.0)
