"""Derived figures, each against arithmetic done by hand."""

import dataclasses

import pytest
from made_up_results import CONFIG

from lp_plugin.bench.experiment.derived import (
    baseline_row,
    bubble_limit,
    control_row,
    error_summary,
    num_micro_batches,
    proposed_row,
    regrets,
    row_figures,
    stage_errors,
)
from lp_plugin.bench.experiment.results import CaseResult, Prediction, Row
from lp_plugin.bench.experiment.statistics import Ratio
from lp_plugin.schedule import forward_timeline


def row(name: str, seconds: float | None, *, predicted: float | None = None, **fields: object) -> Row:
    predictions = (
        ()
        if predicted is None
        else (Prediction(source="catalogue", seconds=predicted, stage_seconds=(0.5, 0.2), hop_seconds=(0.0,)),)
    )
    given = {"data_parallel": 1, "tensor_parallel": 1, "pipeline_parallel": 1, "partition": "cache-aware"} | fields
    trials = () if seconds is None else (seconds,) * 3
    return Row(name=name, micro_batch=2, seconds=trials, predictions=predictions, **given)  # type: ignore[arg-type]


BASE = row("tp=2", 10.0, predicted=11.0, tensor_parallel=2)
PIPE = row(
    "pp=2",
    8.0,
    predicted=9.0,
    pipeline_parallel=2,
    execution="eager",
    alone_seconds=(0.4, 0.25),
    first_token_seconds=(0.7, 0.6, 0.9),
    flops=4e12,
    peak_flops=1e12,
    traffic_bytes=6e9,
    peak_bandwidth=3e9,
)
CASE = CaseResult(
    name="case",
    model=CONFIG,
    dtype="float16",
    phase="prefill",
    processes=2,
    batch=35,
    micro_batch=2,
    sequence=100,
    new_tokens=0,
    tokens=3500,
    baseline="tp=2",
    rows=(
        BASE,
        row("pp=2 stock", 8.5, pipeline_parallel=2, execution="stock"),
        PIPE,
        row("dp=2", 7.0, predicted=12.0, data_parallel=2),
        row("pp=2 uniform", None, predicted=1.0, pipeline_parallel=2, reason="out of memory"),
        row("1", 1.0, predicted=1.0, reason="wrong results"),
        row("tp=2 (again)", 10.2, predicted=1.0, tensor_parallel=2),
    ),
)


def test_the_rows_that_a_report_speaks_of() -> None:
    assert baseline_row(CASE) is BASE
    assert proposed_row(CASE) is PIPE
    control = control_row(CASE)
    assert control is not None
    assert control.name == "tp=2 (again)"
    empty = dataclasses.replace(CASE, rows=(row("tp=2", None, reason="died"),))
    assert (baseline_row(empty), proposed_row(empty), control_row(empty)) == (None, None, None)


def test_rates_latencies_and_shares() -> None:
    found = row_figures(CASE, PIPE)
    assert found.rate is not None
    assert found.rate.median == 3500 / 8
    assert found.ratio == Ratio(value=1.25, low=1.25, high=1.25)
    assert found.seconds_per_token == 8 / 3500
    assert found.token_seconds is None
    assert found.first_token_seconds == 0.7
    assert found.flops_fraction == 0.5
    assert found.bandwidth_fraction == 0.25
    assert row_figures(CASE, BASE).ratio is None
    missing = row_figures(CASE, CASE.rows[4])
    assert {getattr(missing, field.name) for field in dataclasses.fields(missing)} == {None}
    alone = dataclasses.replace(CASE, rows=(PIPE,))
    assert row_figures(alone, PIPE).ratio is None


def test_micro_batches_are_those_of_the_largest_replica() -> None:
    assert num_micro_batches(CASE, PIPE) == 18
    assert num_micro_batches(CASE, CASE.rows[3]) == 9


def test_the_bubble_limit_is_the_schedule_of_the_stages_alone() -> None:
    limit = bubble_limit(CASE, PIPE)
    assert limit is not None
    assert (limit.num_micro_batches, limit.bound, limit.slowest_seconds) == (18, 18 / 19, 0.4)
    assert limit.rate_at_bound == pytest.approx(3500 / (19 * 0.4))
    assert limit.share_of_bound == pytest.approx(19 * 0.4 / 8)
    drained = max(each.stop_seconds for each in forward_timeline((0.4, 0.25), 18))
    assert limit.rate_of_stages == pytest.approx(3500 / drained)
    assert limit.share_of_stages == pytest.approx(drained / 8)
    assert limit.ratio_without_bubble is not None
    assert limit.ratio_without_bubble.value == pytest.approx(1.25 * 19 / 18)
    assert limit.stages_over_baseline == pytest.approx(10 / drained)
    assert bubble_limit(CASE, BASE) is None


def test_stages_alone_limit_what_did_not_run() -> None:
    short = dataclasses.replace(PIPE, seconds=(), reason="needs 2 GPUs; this host shows 1")
    limit, ran = bubble_limit(CASE, short), bubble_limit(CASE, PIPE)
    assert limit is not None
    assert ran is not None
    assert (limit.share_of_bound, limit.share_of_stages, limit.ratio_without_bubble) == (None, None, None)
    assert (limit.rate_at_bound, limit.stages_over_baseline) == (ran.rate_at_bound, ran.stages_over_baseline)
    nothing = dataclasses.replace(CASE, rows=(short,))
    without = bubble_limit(nothing, short)
    assert without is not None
    assert without.stages_over_baseline is None


def test_the_baselines_own_bubble_is_taken_out_too() -> None:
    piped = dataclasses.replace(BASE, pipeline_parallel=4)
    limit = bubble_limit(dataclasses.replace(CASE, rows=(piped, PIPE)), PIPE)
    assert limit is not None
    assert limit.ratio_without_bubble is not None
    assert limit.ratio_without_bubble.value == pytest.approx(1.25 * (18 / 21) / (18 / 19))


def test_errors_of_predictions_are_signed_and_leave_out_what_did_not_run_right() -> None:
    assert stage_errors(PIPE, PIPE.predictions[0]) == pytest.approx((0.25, -0.2))
    assert stage_errors(BASE, BASE.predictions[0]) == ()
    (summary,) = error_summary([CASE])
    assert (summary.source, summary.count) == ("catalogue", 3)
    assert summary.median == pytest.approx(0.125)
    assert summary.worst == pytest.approx(12 / 7 - 1)
    assert summary.where == "case: dp=2"


def test_regret_is_what_following_the_prediction_costs() -> None:
    (regret,) = regrets(CASE)
    assert (regret.chosen, regret.best) == ("pp=2", "dp=2")
    assert regret.fraction == pytest.approx(8 / 7 - 1)
    assert regrets(dataclasses.replace(CASE, rows=(BASE,))) == ()
