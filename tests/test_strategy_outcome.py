"""Outcomes of single strategies: rates, latencies, room and bounds, by hand and against plain loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
from dense16 import dense
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import all_cuts
from small_cases import FREE, device
from strategies import STEADY, clusters, profiles, workloads

from lp_plugin import Cluster, LayerCost, Link, ModelProfile, Workload
from lp_plugin.objective import Constraints
from lp_plugin.solver.solve import evaluate, fits
from lp_plugin.strategy.compare import compare
from lp_plugin.strategy.layouts import Strategy, layouts
from lp_plugin.strategy.outcome import Outcome, Outcomes

FEW = settings(STEADY, max_examples=40)


def of_all_replicas(**options: object) -> st.SearchStrategy[Workload]:
    """Workloads without replicas of their own, and with the micro-batch left open."""
    return workloads(cut=False, **options).map(lambda workload: dataclasses.replace(workload, data_parallel=1))


def outcomes(profile: ModelProfile, cluster: Cluster, workload: Workload, **bounds: float) -> Outcomes:
    return Outcomes(profile, cluster, workload, Constraints(**bounds))


@STEADY
@given(profiles(), clusters(equal=True, roomy=True, max_devices=4), workloads(max_batch=3), st.integers(1, 3))
def test_replicas_make_as_many_times_the_tokens_of_one(
    profile: ModelProfile, cluster: Cluster, workload: Workload, times: int
) -> None:
    assume(workload.phase != "train")
    count = len(cluster.devices)
    alone = outcomes(profile, cluster.subset(1), workload).at(Strategy(), 2)
    whole = dataclasses.replace(workload, batch=workload.batch * count)
    together = outcomes(profile, cluster, whole).at(Strategy(data_parallel=count), 2)
    assume(alone is not None)
    assert together is not None
    assert together.tokens_per_second == pytest.approx(count * alone.tokens_per_second, rel=1e-12)
    assert together.latency_seconds == alone.latency_seconds
    assert (together.sequences, together.bubble) == (count * alone.sequences, 0)
    if alone.max_sequences is not None:
        assert together.max_sequences == count * alone.max_sequences


def test_the_slowest_replica_and_the_largest_share_count() -> None:
    profile = ModelProfile.from_costs([6.0, 2.0])
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    found = outcomes(profile, cluster, Workload(batch=5, sequence=7, micro_batch=1)).at(Strategy(data_parallel=2), 3)
    assert found is not None
    assert found.tokens_per_second == 5 * 7 / (3 * 8.0)  # 3 and 2 sequences
    assert found.sequences == 5
    half = dataclasses.replace(device(1000), compute_efficiency=0.5)
    unequal = Cluster(devices=(device(1000), half), links=(FREE,))
    layer = LayerCost(name="layer", flops_per_token=3.0)
    working = ModelProfile(name="one", layers=(layer,), dtype="float16", input_bytes_per_token=0.0)
    slowest = outcomes(working, unequal, Workload(batch=2, sequence=1)).at(Strategy(data_parallel=2), 1)
    assert slowest is not None
    assert slowest.tokens_per_second == 2 / 6.0


def test_a_replica_that_does_not_fit_is_named() -> None:
    unequal = Cluster(devices=(device(1000), device(100)), links=(FREE,))
    profile = ModelProfile.from_costs([1.0], weight_bytes=[500])
    made = outcomes(profile, unequal, Workload(batch=2, sequence=1, micro_batch=1))
    assert made.at(Strategy(data_parallel=2), 1) is None
    assert "needs 500 B on a device with 100 B usable" in made.misfit(Strategy(data_parallel=2)).reason


def test_tensor_parallelism_of_one_block_by_hand() -> None:
    """The second block's share of the time: half the FLOPs, and two ring all-reduces of the hidden states."""
    cluster, sequence = Cluster.parse("h200:2"), 2048
    workload = Workload(batch=1, sequence=sequence)

    def at(layers: int) -> Outcome:
        made = outcomes(dense(num_hidden_layers=layers), cluster, workload).at(Strategy(tensor_parallel=2), 1)
        assert made is not None
        return made

    one, two = at(1), at(2)
    flops = 2 * 12 * 8192**2 * sequence + 4 * 8192 * sequence * (sequence + 1) / 2
    ring = 35e-6 + 2 * (1 / 2) * sequence * 8192 * 2 / (450e9 * 0.78 * 0.87)
    block = flops / 2 / (989.4e12 * 0.62) + 2 * ring
    assert two.latency_seconds - one.latency_seconds == pytest.approx(block, rel=1e-6)
    exchanged = [each.communication_share * each.latency_seconds for each in (one, two)]
    assert exchanged[1] - exchanged[0] == pytest.approx(2 * ring, rel=1e-6)
    assert two.bubble == 0


def test_transfers_bubble_and_bound_of_a_pipeline_by_hand() -> None:
    link = Link(name="wire", bandwidth_bytes_per_second=2.0, latency_seconds=1.0)
    profile = ModelProfile.from_costs([4.0, 4.0], output_bytes=[2, 0])
    cluster = Cluster.homogeneous(device(1000), 2, link)
    made = outcomes(profile, cluster, Workload(batch=3, sequence=1, micro_batch=1)).at(Strategy(pipeline_parallel=2), 3)
    assert made is not None
    transfer = 1 + 2 / 2
    assert made.latency_seconds == 2 * (4 + transfer)
    makespan = (2 + 2) * (4 + transfer)
    assert made.tokens_per_second == pytest.approx(3 / makespan)
    assert made.communication_share == pytest.approx(3 * transfer / makespan)
    assert made.bubble == pytest.approx(1 / 4)
    assert made.schedule_bound == 3 / 4


@pytest.mark.parametrize(("spec", "bandwidth"), [("h100-sxm:2x1", 50e9 * 0.8), ("h100-sxm:2", 450e9 * 0.78)])
def test_training_adds_the_all_reduce_of_the_gradients(spec: str, bandwidth: float) -> None:
    profile = dense(num_hidden_layers=2)
    workload = Workload(phase="train", batch=4, sequence=512)
    made = outcomes(profile, Cluster.parse(spec), workload).at(Strategy(data_parallel=2), 2)
    half = dataclasses.replace(workload, batch=2)
    alone = outcomes(profile, Cluster.parse("h100-sxm:1"), half).at(Strategy(), 2)
    assert made is not None
    assert alone is not None
    gradients = sum(layer.weight_bytes for layer in profile.layers)
    ring = 35e-6 + 2 * (1 / 2) * gradients / (bandwidth * 0.87)
    assert made.gradient_seconds == pytest.approx(ring, rel=1e-9)
    assert made.latency_seconds == pytest.approx(alone.latency_seconds + ring, rel=1e-9)
    assert made.tokens_per_second == pytest.approx(4 * 512 / (alone.latency_seconds + ring), rel=1e-9)
    assert made.communication_share == pytest.approx(ring / made.latency_seconds, rel=1e-9)
    assert made.plan is not None
    assert made.plan.workload.data_parallel == 2


def test_the_ring_of_all_replicas_is_as_slow_as_its_slowest_link() -> None:
    """Four replicas in two nodes of two: the network is in the middle of the chain."""
    profile, workload = dense(num_hidden_layers=2), Workload(phase="train", batch=4, sequence=64)
    made = outcomes(profile, Cluster.parse("h100-sxm:2x2"), workload).at(Strategy(data_parallel=4), 1)
    assert made is not None
    gradients = sum(layer.weight_bytes for layer in profile.layers)
    assert made.gradient_seconds == pytest.approx(35e-6 + 2 * (3 / 4) * gradients / (50e9 * 0.8 * 0.87), rel=1e-9)


def test_gradients_cross_the_slowest_link_between_the_replicas_of_a_stage() -> None:
    """Two nodes of two: PP=2 inside each node, so both stages' replicas are joined by the network."""
    profile, workload = dense(num_hidden_layers=2), Workload(phase="train", batch=2, sequence=64)
    made = outcomes(profile, Cluster.parse("h100-sxm:2x2"), workload)
    pipelines = made.at(Strategy(data_parallel=2, pipeline_parallel=2), 1)
    assert pipelines is not None
    assert pipelines.plan is not None
    fullest = max(stage.weight_bytes for stage in pipelines.plan.stages)
    assert pipelines.gradient_seconds == pytest.approx(35e-6 + fullest / (50e9 * 0.8 * 0.87), rel=1e-9)


@FEW
@given(profiles(tied=False), clusters(equal=True, max_devices=4), of_all_replicas(phase="decode"), st.data())
def test_a_decode_batch_that_does_not_fit_is_cut_to_the_most_that_do(
    profile: ModelProfile, cluster: Cluster, workload: Workload, data: st.DataObject
) -> None:
    made = outcomes(profile, cluster, workload)
    kept, _ = layouts(profile, cluster)
    strategy = data.draw(st.sampled_from(kept))
    cuts = data.draw(st.sampled_from(made.cuts(strategy)))
    share = -(-workload.batch // strategy.data_parallel)
    stages = strategy.pipeline_parallel
    most = 0
    for sequences in range(share, 0, -1):
        tried = dataclasses.replace(workload, batch=sequences, micro_batch=math.ceil(sequences / cuts))
        plans = (evaluate(profile, cluster.subset(stages), tried, cut) for cut in all_cuts(profile.num_layers, stages))
        if any(fits(plan) for plan in plans):
            most = sequences
            break
    found = made.at(strategy, cuts)
    assert (found.sequences if found else 0) == min(most * strategy.data_parallel, workload.batch)
    if found and found.max_sequences is not None:
        assert found.max_sequences >= found.sequences or strategy.data_parallel > 1


def test_a_decode_batch_is_cut_where_it_must_be() -> None:
    """Weights of 100 bytes and a cache of 10 per sequence: 90 sequences on 1,000 bytes, 95 beside half the weights."""
    layers = tuple(
        LayerCost(name=name, weight_bytes=50, weight_traffic_bytes=50, kv_bytes_per_token=5, flops_per_token=1.0)
        for name in ("first", "second")
    )
    profile = ModelProfile(name="two", layers=layers, dtype="float16", input_bytes_per_token=0.0)
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    made = compare(profile, cluster, Workload(phase="decode", batch=1000, sequence=1))
    held = {outcome.strategy.label: outcome.sequences for outcome in made.outcomes}
    assert held == {"1 device": 90, "DP=2": 180, "PP=2": 190}
    fitting = compare(profile, cluster, Workload(phase="decode", batch=100, sequence=1))
    assert {outcome.sequences for outcome in fitting.outcomes if outcome.strategy.num_devices == 2} == {100}


@pytest.mark.parametrize(("cuts", "sequences"), [(1, 45), (2, 60), (45, 88), (1000, 89)])
def test_a_large_micro_batch_leaves_less_room(cuts: int, sequences: int) -> None:
    """900 bytes for 10 per sequence in flight and 10 per sequence of a micro-batch."""
    layer = LayerCost(name="layer", weight_bytes=100, kv_bytes_per_token=10, buffer_bytes_per_token=10)
    profile = ModelProfile(name="one", layers=(layer,), dtype="float16", input_bytes_per_token=0.0)
    workload = Workload(phase="decode", batch=1000, sequence=1)
    found = outcomes(profile, Cluster.homogeneous(device(1000), 1), workload).at(Strategy(), cuts)
    assert max(held for held in range(90) if 10 * held + 10 * math.ceil(held / cuts) <= 900) == sequences
    assert found is not None
    assert found.sequences == sequences


@STEADY
@given(profiles(), clusters(equal=True, roomy=True, max_tiers=1), of_all_replicas())
def test_nothing_exceeds_the_roofline_of_the_cluster(
    profile: ModelProfile, cluster: Cluster, workload: Workload
) -> None:
    assume(workload.phase != "train")
    layers = tuple(dataclasses.replace(layer, seconds=None, backward_seconds=None) for layer in profile.layers)
    made = compare(dataclasses.replace(profile, layers=layers), cluster, workload)
    for outcome in made.outcomes:
        assert outcome.tokens_per_second <= outcome.roofline_tokens_per_second * (1 + 1e-9)
        assert 0 <= outcome.roofline_share <= 1 + 1e-9
        assert 0 <= outcome.communication_share + outcome.bubble <= 1 + 1e-9


def test_weights_read_per_token_grow_with_the_number_of_micro_batches() -> None:
    made = outcomes(dense(), Cluster.parse("h200:2"), Workload(phase="decode", batch=16, sequence=100))
    weights = 16 * 12 * 8192**2 * 2
    for cuts in (1, 2, 4, 16):
        for strategy in (Strategy(pipeline_parallel=2), Strategy(tensor_parallel=2)):
            found = made.at(strategy, cuts)
            assert found is not None
            assert found.schedule_bound == min(1, cuts / strategy.pipeline_parallel)
            assert found.weight_bytes_per_token == pytest.approx(weights * cuts / 16, rel=1e-3)
