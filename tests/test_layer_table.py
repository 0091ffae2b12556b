"""Arrays over the layers against counting one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_stages import count_pairs
from strategies import STEADY

from lp_plugin import Cluster, LayerCost, Link, ModelProfile, Workload
from lp_plugin.solver.layer_table import LayerTable, RangeMax, attention_pairs, prefix_sums


def table_of(layer: LayerCost, workload: Workload) -> LayerTable:
    return LayerTable(ModelProfile(name="one", layers=(layer,), dtype="float16"), workload)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("sequence", [1, 2, 5, 30])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 29, 30, 31, 58, 59, 60, 100])
def test_attention_pairs_counted_one_by_one(phase: str, sequence: int, window: int | None, causal: bool) -> None:
    pairs = attention_pairs(sequence, window, decode=phase == "decode", causal=causal)
    assert pairs == count_pairs(sequence, window, phase, causal=causal)


@STEADY
@given(st.lists(st.lists(st.integers(0, 9), min_size=17, max_size=17), min_size=1, max_size=3), st.integers(1, 17))
def test_maxima_of_all_runs(columns: list[list[int]], count: int) -> None:
    starts, stops = np.array([*itertools.combinations(range(count + 1), 2)]).T
    found = RangeMax(*(np.array(column[:count], dtype=float) for column in columns))(starts, stops)
    for column, maxima in zip(columns, found, strict=True):
        assert maxima.tolist() == [max(column[start:stop]) for start, stop in zip(starts, stops, strict=True)]


def test_prefix_sums() -> None:
    assert prefix_sums(np.array([1.0, 2.0, 4.0])).tolist() == [0, 1, 3, 7]


@pytest.mark.parametrize(
    ("num_experts", "per_token", "tokens"), [(2, 1, 3), (3, 1, 4), (4, 2, 3), (4, 4, 2), (5, 3, 2)]
)
def test_expected_experts_are_the_mean_over_all_choices(num_experts: int, per_token: int, tokens: int) -> None:
    """Every way that tokens can pick their experts, each as likely as the others."""
    picks = [*itertools.combinations(range(num_experts), per_token)]
    read = [len(set().union(*chosen)) for chosen in itertools.product(picks, repeat=tokens)]
    layer = LayerCost(
        name="experts",
        weight_bytes=100 * num_experts,
        expert_bytes=100 * num_experts,
        num_experts=num_experts,
        experts_per_token=per_token,
    )
    table = table_of(layer, Workload(batch=1, sequence=tokens, micro_batch=1))
    assert table.touched[0] == pytest.approx(100 * sum(read) / len(read))


def test_work_by_phase() -> None:
    """Forward once; training three times that, and a fourth time if checkpointed."""
    layer = LayerCost(name="one", flops_per_token=10.0, traffic_bytes_per_token=4.0, weight_traffic_bytes=6)
    base = {"batch": 2, "sequence": 5, "micro_batch": 2}
    for phase, checkpointing, passes, tokens in (
        ("prefill", False, 1, 10),
        ("decode", False, 1, 2),
        ("train", False, 3, 10),
        ("train", True, 4, 10),
    ):
        table = table_of(layer, Workload(phase=phase, checkpointing=checkpointing, **base))
        assert table.passes == passes
        assert table.flops[0] == passes * 10 * tokens
        assert table.traffic[0] == passes * (6 + 4 * tokens)


def test_a_backward_pass_has_as_many_all_reduces_as_a_forward_pass() -> None:
    """Of what computes twice as much."""
    link = Link(name="wire", latency_seconds=1.0, bandwidth_bytes_per_second=1.0, collective_efficiency=1.0)
    layer = LayerCost(name="sharded", num_all_reduces=2, all_reduce_bytes_per_token=4.0)
    device = Cluster.homogeneous("h200", 1).devices[0]
    for phase, checkpointing, trips in (("prefill", False, 1), ("train", False, 2), ("train", True, 3)):
        table = table_of(layer, Workload(phase=phase, batch=1, sequence=1, micro_batch=1, checkpointing=checkpointing))
        added = table.seconds(device, 0, (link, 2)) - table.seconds(device, 0)
        assert added[0] == trips * 2 * (1.0 + 2.0)  # a ring of two sends each tensor's 2 bytes once


def test_an_encoder_is_idle_when_decoding_but_stays() -> None:
    encoder = LayerCost(
        name="encoder",
        parameters=50,
        weight_bytes=100,
        weight_traffic_bytes=100,
        flops_per_token=10.0,
        traffic_bytes_per_token=4.0,
        output_bytes_per_token=8.0,
        buffer_bytes_per_token=16.0,
        runs_once=True,
        seconds=3.0,
    )
    device = Cluster.homogeneous("h200", 1).devices[0]
    table = table_of(encoder, Workload(phase="decode", batch=4, sequence=8, micro_batch=2))
    assert table.weights[0] == 100
    assert (
        table.seconds(device, 0)[0] == table.flops[0] == table.traffic[0] == table.touched[0] == table.buffers[0] == 0
    )
    assert table.cuts.tolist() == [0, 0]
    assert table_of(encoder, Workload(batch=4, sequence=8, micro_batch=2)).seconds(device, 0)[0] == 3


def test_the_cache_keeps_a_window() -> None:
    layer = LayerCost(name="local", kv_bytes_per_token=10, kv_window=4)
    for phase, sequence, per_sequence, kept in (
        ("decode", 3, 30, 90),
        ("decode", 9, 40, 120),
        ("prefill", 9, 40, 0),  # what decoding would keep
        ("train", 9, 0, 0),
    ):
        table = table_of(layer, Workload(phase=phase, batch=3, sequence=sequence, micro_batch=1))
        assert (table.kv_per_sequence[0], table.kv_cache[0]) == (per_sequence, kept)
