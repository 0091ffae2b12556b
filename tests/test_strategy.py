"""Strategies compared: order, marks, verdicts, constraints, sweeps."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from dense16 import dense
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cases import FREE, device
from strategies import STEADY, clusters, cost_profiles, profiles, workloads

from lp_plugin import Cluster, ModelProfile, Workload, WorkloadError
from lp_plugin.objective import Constraints
from lp_plugin.strategy.compare import (
    compare,
    micro_batch_sweep,
    on_front,
    usual_strategies,
)
from lp_plugin.strategy.layouts import Strategy, layouts
from lp_plugin.strategy.outcome import Outcomes

FEW = settings(STEADY, max_examples=40)


def of_all_replicas(**options: object) -> st.SearchStrategy[Workload]:
    """Workloads without replicas of their own, and with the micro-batch left open."""
    return workloads(cut=False, **options).map(lambda workload: dataclasses.replace(workload, data_parallel=1))


@pytest.mark.parametrize(
    ("spec", "labels"),
    [
        ("h100-sxm:1", ["1 device"]),
        ("h100-sxm:8", ["TP=8", "DP=8", "PP=8"]),
        ("h100-sxm:16", ["TP=8 x PP=2", "DP=16", "PP=16"]),
        ("h100-sxm:12", ["TP=4 x PP=3", "DP=12", "PP=12"]),
        ("h100-sxm:32", ["TP=8 x PP=4", "DP=32", "DP=2 x PP=16"]),  # 19 layers
    ],
)
def test_usual_strategies(spec: str, labels: list[str]) -> None:
    assert [strategy.label for strategy in usual_strategies(dense(), Cluster.parse(spec))] == labels


@FEW
@given(cost_profiles() | profiles(), clusters(max_devices=4), of_all_replicas())
def test_a_comparison_is_complete_ordered_and_marked(
    profile: ModelProfile, cluster: Cluster, workload: Workload
) -> None:
    made = compare(profile, cluster, workload)
    kept, left_out = layouts(profile, cluster)
    assert {outcome.strategy for outcome in made.outcomes} == set(kept)
    assert made.left_out == left_out
    fitting = [outcome for outcome in made.outcomes if outcome.fits]
    assert list(made.outcomes[: len(fitting)]) == fitting  # what does not fit comes last
    assert all(one.tokens_per_second >= two.tokens_per_second for one, two in itertools.pairwise(fitting))
    assert [outcome.on_front for outcome in made.outcomes] == on_front(made.outcomes)
    assert all(bool(outcome.reason) != outcome.fits for outcome in made.outcomes)
    assert made.throughput is (fitting[0] if fitting else None)
    tried = Outcomes(profile, cluster, workload, Constraints())
    for strategy in kept:
        each = [found for cuts in tried.cuts(strategy) if (found := tried.at(strategy, cuts))]
        shown = [outcome for outcome in fitting if outcome.strategy == strategy]
        if each:
            assert shown[0].tokens_per_second >= 0.99 * max(found.tokens_per_second for found in each)
            soonest = min(found.latency_seconds for found in each)
            assert min(outcome.latency_seconds for outcome in shown) <= soonest / 0.99
        assert bool(each) == bool(shown)


@FEW
@given(cost_profiles(), clusters(max_devices=4, equal=True), of_all_replicas())
def test_the_verdict_says_whether_to_pipeline(profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
    made = compare(profile, cluster, workload)
    if made.throughput is None:
        assert made.verdict.startswith("Nothing fits")
    elif len(cluster.devices) == 1:
        assert "nothing to divide" in made.verdict
    elif made.throughput.strategy.pipeline_parallel == 1:
        assert made.verdict.startswith("Don't pipeline: ")
    else:
        assert made.verdict.startswith(("Pipeline: ", "A pipeline gains next to nothing: "))
    if made.throughput is not None:
        assert f"{made.throughput.strategy.label} " in made.verdict
        assert f"{made.throughput.tokens_per_second:,.0f} tokens/s" in made.verdict


def test_a_model_too_large_for_one_device_is_pipelined() -> None:
    profile = ModelProfile.from_costs([1.0] * 4, weight_bytes=[300] * 4)
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    made = compare(profile, cluster, Workload(batch=8, sequence=1, micro_batch=1))
    assert made.verdict.startswith("Pipeline: PP=2")
    assert "nothing without a pipeline fits" in made.verdict
    assert "DP=2 needs 1.20 kB on a device with 1.00 kB usable" in made.verdict
    small = compare(ModelProfile.from_costs([1.0] * 4), cluster, Workload(batch=8, sequence=1, micro_batch=1))
    assert small.verdict.startswith("Don't pipeline: DP=2")
    none = compare(profile, cluster.subset(1), Workload(batch=8, sequence=1, micro_batch=1))
    assert "1 device, which needs 1.20 kB on a device with 1.00 kB usable" in none.verdict


def test_constraints_are_those_of_all_replicas_together() -> None:
    profile, cluster = ModelProfile.from_costs([1.0, 1.0]), Cluster.homogeneous(device(1000), 2, FREE)
    workload = Workload(batch=8, sequence=1, micro_batch=1)

    def fitting(**bounds: float) -> set[str]:
        made = compare(profile, cluster, workload, Constraints(**bounds))
        return {outcome.strategy.label for outcome in made.outcomes if outcome.fits}

    assert fitting(min_tokens_per_second=1.0) == {"DP=2", "PP=2"}  # two at a time in 2 s; one after the other in 1 s
    assert fitting(min_tokens_per_second=0.5) == {"DP=2", "PP=2", "1 device"}
    assert fitting(max_latency_seconds=1.9) == set()
    made = compare(profile, cluster, workload, Constraints(min_tokens_per_second=100.0))
    assert {outcome.reason for outcome in made.outcomes} == {"can't be cut so that it keeps to: at least 100 tokens/s"}
    assert made.throughput is None
    assert made.latency is None


@pytest.mark.parametrize("given", [1, 3, 8, 100])
def test_a_given_micro_batch_is_kept_where_the_share_is_large_enough(given: int) -> None:
    workload = Workload(batch=100, sequence=16, micro_batch=given)
    made = compare(dense(num_hidden_layers=2), Cluster.parse("h100-sxm:4"), workload)
    for outcome in made.outcomes:
        assert outcome.micro_batch == min(given, 100 // outcome.strategy.data_parallel)


def test_requests_that_fix_what_is_compared() -> None:
    cluster, profile = Cluster.parse("h100-sxm:4"), dense(num_hidden_layers=2)
    plain = Workload(batch=8, sequence=16)
    with pytest.raises(WorkloadError, match="data_parallel is 2"):
        compare(profile, cluster, Workload(phase="train", batch=8, sequence=16, data_parallel=2))
    with pytest.raises(WorkloadError, match="tensor_parallel is 2"):
        compare(profile.sharded(2), cluster, plain)
    with pytest.raises(WorkloadError, match="group_size is 2"):
        compare(profile, cluster.grouped(2), plain)
    with pytest.raises(WorkloadError, match="max_position_embeddings"):
        compare(profile, cluster, Workload(batch=8, sequence=100_000))
    with pytest.raises(WorkloadError, match="a sweep varies it"):
        micro_batch_sweep(profile, cluster, plain.with_micro_batch(2))


def test_a_sweep_shows_what_each_number_of_micro_batches_gives() -> None:
    profile, cluster = dense(num_hidden_layers=4), Cluster.parse("h100-sxm:4")
    workload = Workload(batch=24, sequence=128)
    chosen = (Strategy(data_parallel=4), Strategy(pipeline_parallel=4))
    rows = micro_batch_sweep(profile, cluster, workload, chosen)
    assert [row.num_micro_batches for row in rows] == [1, 2, 4, 8, 16, 24]
    made = Outcomes(profile, cluster, workload, Constraints())
    for row in rows:
        few, many = row.outcomes
        assert (few is None) == (row.num_micro_batches > 6)
        assert many == made.at(chosen[1], row.num_micro_batches)
        assert many is not None
        assert many.micro_batch == math.ceil(24 / row.num_micro_batches)
    assert len(micro_batch_sweep(profile, cluster, workload)[0].outcomes) == 3
