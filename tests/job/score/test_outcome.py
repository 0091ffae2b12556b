"""The figures of a finished job, worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from lp_plugin import Cluster, ModelProfile, Plan, Workload
from lp_plugin.job.layout import Layout
from lp_plugin.report import as_text
from lp_plugin.schedule import Interval
from lp_plugin.score.batches import Step
from lp_plugin.score.outcome import Outcome, RankTimes
from lp_plugin.solver.solve import evaluate

STEPS = (
    Step(rows=2, length=8, micro_batches=((0, 1), (2, 3), (4,))),  # 16 tokens a micro-batch, as planned
    Step(rows=1, length=8, micro_batches=((5,), (6,))),  # half of that
)


def plan_of(*stage_seconds: float) -> Plan:
    """A plan for micro-batches of 16 tokens whose stages take these seconds."""
    count = len(stage_seconds)
    profile = ModelProfile.from_costs(list(stage_seconds), weight_bytes=[8] * count, output_bytes=[4] * count)
    workload = Workload(batch=8, sequence=8, micro_batch=2)
    plan = evaluate(profile, Cluster.homogeneous("cpu", count), workload, range(count + 1))
    stages = tuple(
        dataclasses.replace(stage, compute_seconds=seconds * 3 / 4, transfer_seconds=seconds / 4)
        for stage, seconds in zip(plan.stages, stage_seconds, strict=True)
    )
    return dataclasses.replace(plan, stages=stages)


def rank(wall: tuple[float, ...], forward: tuple[float, ...], alone: float, elapsed: float) -> RankTimes:
    return RankTimes(
        wall_seconds=wall,
        forward_seconds=forward,
        alone_seconds=alone,
        elapsed_seconds=elapsed,
        intervals=(Interval(stage=0, micro_batch=0, start_seconds=0.0, stop_seconds=1.0),),
        peak_bytes=0,
        host="CPU",
        threads=1,
    )


@pytest.fixture
def outcome() -> Outcome:
    return Outcome(
        plan=plan_of(1.0, 3.0),
        layout=Layout(num_stages=2),
        tokens_per_micro_batch=16,
        steps=STEPS,
        ranks=(rank((11.0, 4.0), (3.0, 1.0), 2.0, 20.0), rank((12.0, 3.5), (8.0, 2.0), 2.5, 19.0)),
        num_documents=10,
        num_scored=7,
        num_tokens=40,
        total_log_likelihood=-100.0,
        total_scored_tokens=50,
    )


def test_prediction_is_the_flow_shops_makespan(outcome: Outcome) -> None:
    """3 micro-batches: 1 + 3 + 2 * 3 = 10; then 2 of half the tokens: (1 + 3 + 3) / 2."""
    assert outcome.predicted_seconds == pytest.approx(10 + 3.5)


def test_bound_is_the_slowest_stage_for_every_micro_batch_and_the_fill(outcome: Outcome) -> None:
    """m + p - 1 times 2.5 seconds: 4 * 2.5; then 3 * 2.5 / 2."""
    assert outcome.bound_seconds == pytest.approx(10 + 3.75)
    assert outcome.as_json()["share_of_bubble_bound"] == pytest.approx(13.75 / 20)


def test_rates_and_shares(outcome: Outcome) -> None:
    assert outcome.wall_seconds == 20.0  # rank 0 also writes the scores
    assert outcome.step_seconds == [12.0, 4.0]
    assert outcome.tokens_per_second == pytest.approx(40 / 20)
    assert outcome.padded_tokens_per_second == pytest.approx((3 * 16 + 2 * 8) / 20)
    assert outcome.bubble_fraction == pytest.approx(1 - (3 + 1 + 8 + 2) / (2 * 20))
    assert outcome.stage_seconds(0) == pytest.approx(4 / 64 * 16)
    assert outcome.stage_seconds(1) == pytest.approx(10 / 64 * 16)
    assert outcome.perplexity == pytest.approx(math.exp(2))


def test_one_stage_has_no_bubble_in_its_bound() -> None:
    alone = Outcome(
        plan=plan_of(2.0),
        layout=Layout(num_stages=1),
        tokens_per_micro_batch=16,
        steps=STEPS[:1],
        ranks=(rank((6.0,), (6.0,), 2.0, 6.0),),
        num_documents=5,
        num_scored=5,
        num_tokens=48,
        total_log_likelihood=-1.0,
        total_scored_tokens=1,
    )
    assert alone.bound_seconds == alone.predicted_seconds == 6.0
    assert alone.bubble_fraction == 0.0


def test_replicas_compute_as_much_each(outcome: Outcome) -> None:
    """The steps are the first pipeline's; documents and their tokens are everyone's."""
    double = dataclasses.replace(outcome, layout=Layout(num_stages=2, data_parallel=2))
    assert double.padded_tokens_per_second == pytest.approx(2 * (3 * 16 + 2 * 8) / 20)
    assert double.tokens_per_second == outcome.tokens_per_second
    assert double.predicted_seconds == outcome.predicted_seconds
    assert double.bubble_fraction == outcome.bubble_fraction
    assert double.as_json()["data_parallel"] == 2


def test_figures_are_json(outcome: Outcome) -> None:
    figures = json.loads(json.dumps(outcome.as_json(), allow_nan=False))
    assert figures["steps"] == [[2, 8, 3], [1, 8, 2]]
    assert figures["boundaries"] == [0, 1, 2]
    assert figures["predicted_stage_seconds"] == [1.0, 3.0]
    assert figures["stage_alone_seconds"] == [2.0, 2.5]
    assert figures["perplexity"] == pytest.approx(math.exp(2))


def test_report_shows_a_row_per_stage_and_every_figure(outcome: Outcome) -> None:
    text = as_text(outcome.report(), width=120)
    for part in (
        "perplexity   7.38906 over 50 tokens of 10 documents",
        "2 tokens/s (62.5% of what was computed",
        "65.0% of the stages' time",
        "68.8% of m/(m+p-1)",
        "(-32.5%)",
        "a micro-batch of 16 tokens",
        "not measured",
    ):
        assert part in text
    rows = [line.split() for line in text.splitlines() if " .. " in line]
    # stage, layers, predicted (compute alone: three quarters), alone, in the pipeline, busy
    assert [row[:4] for row in rows] == [["0", "0", "..", "0"], ["1", "1", "..", "1"]]
    assert rows[0][4:11] == ["750", "ms", "2.00", "s", "1.00", "s", "20.0%"]
    assert rows[1][4:11] == ["2.25", "s", "2.50", "s", "2.50", "s", "50.0%"]


def test_resumed_with_nothing_left(outcome: Outcome) -> None:
    done = dataclasses.replace(outcome, plan=None, steps=(), num_scored=0, num_tokens=0)
    assert done.predicted_seconds == 0.0
    assert set(done.as_json()) == {
        "num_documents",
        "num_scored",
        "total_scored_tokens",
        "total_log_likelihood",
        "perplexity",
    }
    assert "nothing was left to score" in as_text(done.report())


@pytest.mark.parametrize(("likelihood", "tokens"), [(0.0, 0), (-1e6, 1)])
def test_perplexity_that_is_no_number_is_null_in_json(outcome: Outcome, likelihood: float, tokens: int) -> None:
    """No scored token at all; or a likelihood beyond what a float can hold."""
    odd = dataclasses.replace(outcome, total_log_likelihood=likelihood, total_scored_tokens=tokens)
    assert not math.isfinite(odd.perplexity)
    assert json.loads(json.dumps(odd.as_json(), allow_nan=False))["perplexity"] is None
    assert "perplexity" in as_text(odd.report())
