"""The Pareto front and the crossovers, against their definitions."""

from __future__ import annotations

from fractions import Fraction

import pytest
from dense16 import BASELINE, dense
from hypothesis import given
from hypothesis import strategies as st
from small_cases import device
from strategies import STEADY

from lp_plugin import Cluster, Link, ModelProfile, Workload, WorkloadError
from lp_plugin.solver.solve import evaluate
from lp_plugin.strategy.compare import SweepRow, best_of, compare, filling_crossover, on_front, sweep_crossover
from lp_plugin.strategy.layouts import Strategy
from lp_plugin.strategy.outcome import Outcome

RATES = st.integers(0, 4).map(float)


@st.composite
def points(draw: st.DrawFn) -> list[Outcome]:
    plan = evaluate(
        ModelProfile.from_costs([1.0]),
        Cluster.homogeneous(device(10), 1),
        Workload(batch=1, sequence=1, micro_batch=1),
        [0, 1],
    )
    rows = draw(st.lists(st.tuples(RATES, RATES, st.none() | st.integers(0, 3), st.booleans()), max_size=12))
    return [
        Outcome(
            strategy=Strategy(),
            plan=plan if fitting else None,
            tokens_per_second=rate,
            latency_seconds=latency,
            max_sequences=room,
        )
        for rate, latency, room, fitting in rows
    ]


@STEADY
@given(points())
def test_the_front_is_what_nothing_dominates(found: list[Outcome]) -> None:
    def dominates(one: Outcome, two: Outcome) -> bool:
        better = [
            one.tokens_per_second - two.tokens_per_second,
            two.latency_seconds - one.latency_seconds,
            (one.max_sequences or 0) - (two.max_sequences or 0),
        ]
        return one.fits and min(better) >= 0 and max(better) > 0

    expected = [each.fits and not any(dominates(other, each) for other in found) for each in found]
    assert on_front(found) == expected
    assert any(expected) == any(each.fits for each in found)


@STEADY
@given(st.lists(st.tuples(st.none() | RATES, st.none() | RATES), max_size=8))
def test_the_crossover_of_a_sweep(rates: list[tuple[float | None, float | None]]) -> None:
    def outcome(rate: float | None) -> Outcome | None:
        return None if rate is None else Outcome(strategy=Strategy(), tokens_per_second=rate)

    rows = [
        SweepRow(num_micro_batches=2**index, outcomes=(outcome(baseline), outcome(challenger)))
        for index, (challenger, baseline) in enumerate(rates)
    ]
    both = [(2**index, pair) for index, pair in enumerate(rates) if None not in pair]
    expected = [
        count
        for position, (count, _) in enumerate(both)
        if all(challenger > baseline for _, (challenger, baseline) in both[position:])  # type: ignore[operator]
    ]
    assert sweep_crossover(rows, 1, 0) == (expected[0] if expected else None)


SECONDS = st.lists(st.integers(1, 9).map(float), min_size=1, max_size=5)


def pipeline(seconds: list[float], replicas: int) -> Outcome:
    """An outcome whose stages take these seconds."""
    cluster = Cluster.homogeneous(
        device(10), len(seconds), Link(name="no", bandwidth_bytes_per_second=1.0, latency_seconds=0.0)
    )
    plan = evaluate(
        ModelProfile.from_costs(seconds),
        cluster,
        Workload(batch=1, sequence=1, micro_batch=1),
        range(len(seconds) + 1),
    )
    return Outcome(strategy=Strategy(data_parallel=replicas, pipeline_parallel=len(seconds)), plan=plan)


@STEADY
@given(SECONDS, SECONDS, st.integers(1, 3), st.integers(1, 3))
def test_the_crossover_of_filling_pipelines(first: list[float], second: list[float], some: int, others: int) -> None:
    def rate(seconds: list[float], replicas: int, count: int) -> Fraction:
        return Fraction(replicas * count) / Fraction(sum(seconds) + (count - 1) * max(seconds))

    ahead = [rate(first, some, count) > rate(second, others, count) for count in range(1, 400)]
    behind = [count for count, leads in enumerate(ahead, 1) if not leads]
    last = behind[-1] if behind else 0
    expected = None if last == 399 else last + 1
    assert filling_crossover(pipeline(first, some), pipeline(second, others)) == expected


def test_crossovers_that_make_no_sense() -> None:
    one = pipeline([1.0], 1)
    with pytest.raises(WorkloadError, match="micro-batches of 1 and 0"):
        filling_crossover(one, Outcome(strategy=BASELINE))
    decode = compare(
        dense(num_hidden_layers=1), Cluster.parse("h200:1"), Workload(phase="decode", batch=1, sequence=1)
    ).throughput
    assert decode is not None
    with pytest.raises(WorkloadError, match="prefill or training"):
        filling_crossover(decode, decode)


def test_best_of_prefers_sequences_then_latency_among_equals() -> None:
    def outcome(rate: float, sequences: int, latency: float) -> Outcome:
        return Outcome(strategy=Strategy(), tokens_per_second=rate, sequences=sequences, latency_seconds=latency)

    found = [outcome(100, 1, 1.0), outcome(99.5, 2, 3.0), outcome(99.2, 2, 2.0), outcome(98, 9, 0.5)]
    assert best_of(found) is found[2]
