"""Seconds and bytes of a stage against plain loops over its layers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import best_plan, count_pairs, plain_stage
from strategies import STEADY, clusters, profiles, workloads

from lp_plugin import (
    Cluster,
    Device,
    HardwareError,
    LayerCost,
    Link,
    MemoryTier,
    ModelProfile,
    Workload,
)
from lp_plugin.cost import StageTable, attention_pairs, stage_tables, work_lower_bound
from lp_plugin.solve import solve

FREE = Link(name="free", bandwidth_bytes_per_second=1.0, latency_seconds=0.0)
TIED = {"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "dtype": "float16", "tie_word_embeddings": True}  # fmt: skip


def tables_of(profile: ModelProfile, cluster: Cluster, workload: Workload) -> list[StageTable]:
    return stage_tables(profile, cluster, workload, tier_limit=9)


def runs_of(num_layers: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(start, stop) for start in range(num_layers) for stop in range(start + 1, num_layers + 1)]
    starts, stops = zip(*pairs, strict=True)
    return np.array(starts), np.array(stops)


@STEADY
@given(st.data())
def test_every_run_costs_what_plain_loops_say(data: st.DataObject) -> None:
    workload = data.draw(workloads())
    profile = data.draw(profiles())
    cluster = data.draw(clusters())
    starts, stops = runs_of(profile.num_layers)
    for position, table in enumerate(tables_of(profile, cluster, workload)):
        memory = table.memory(starts, stops)
        tiers, compute = table.tier(starts, stops), table.compute(starts, stops)
        working_set, inner = table.working_set(starts, stops), table.inner(starts, stops)
        for index, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            plain = plain_stage(profile, cluster, workload, position, start, stop)
            assert memory.weights[index] == plain.weight_bytes
            assert memory.kv_cache[index] == plain.kv_bytes
            assert memory.activations[index] == plain.activation_bytes
            assert memory.buffers[index] == plain.buffer_bytes
            assert memory.training[index] == plain.training_bytes
            assert memory.total[index] == plain.memory_bytes
            assert working_set[index] == plain.working_set_bytes
            assert tiers[index] == plain.tier
            assert compute[index] == plain.compute_seconds
            assert table.entry[start] + table.exit[stop] == plain.transfer_seconds
            fits = plain.memory_bytes <= cluster.devices[position].memory.usable_bytes
            assert inner[index] == (plain.compute_seconds if fits else np.inf)


@STEADY
@given(profiles(), clusters(), workloads(), st.integers(0, 2))
def test_inner_never_falls_when_a_stage_grows(
    profile: ModelProfile, cluster: Cluster, workload: Workload, tier_limit: int
) -> None:
    for table in stage_tables(profile, cluster, workload, tier_limit=tier_limit):
        count = profile.num_layers
        inner = {
            (start, stop): table.inner(np.array([start]), np.array([stop]))[0]
            for start in range(count)
            for stop in range(start + 1, count + 1)
        }
        for (start, stop), value in inner.items():
            assert inner.get((start - 1, stop), np.inf) >= value
            assert inner.get((start, stop + 1), np.inf) >= value


def test_a_larger_and_faster_tier_is_refused_or_planned_exactly() -> None:
    """The solver needs costs that never fall; a slow small tier before a fast large one would break that."""
    tiers = (
        MemoryTier(name="slow", capacity_bytes=10, bandwidth_bytes_per_second=1.0),
        MemoryTier(name="fast", capacity_bytes=1000, bandwidth_bytes_per_second=100.0),
    )
    layers = tuple(
        LayerCost(name=f"layer {index}", weight_bytes=size, weight_traffic_bytes=size)
        for index, size in enumerate([8, 8, 1, 1])
    )
    profile = ModelProfile(name="uneven", layers=layers, dtype="float32", input_bytes_per_token=0.0)
    workload = Workload(batch=1, sequence=1, micro_batch=1)
    try:
        device = Device(
            name="odd",
            tiers=tiers,
            peak_flops=(("float32", 1.0),),
            compute_efficiency=1.0,
            layer_overhead_seconds=0.0,
        )
    except HardwareError:
        return
    cluster = Cluster.homogeneous(device, 2, FREE)
    table = tables_of(profile, cluster, workload)[0]
    starts, stops = runs_of(4)
    inner = dict(zip(zip(starts.tolist(), stops.tolist(), strict=True), table.inner(starts, stops), strict=True))
    assert all(inner.get((start, stop + 1), np.inf) >= value for (start, stop), value in inner.items())


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("sequence", [1, 2, 5, 30])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 29, 30, 31])
def test_attention_pairs_counted_one_by_one(phase: str, sequence: int, window: int | None) -> None:
    assert attention_pairs(sequence, window, decode=phase == "decode") == count_pairs(sequence, window, phase)


def test_a_stage_lives_in_the_fastest_tier_that_holds_its_working_set() -> None:
    device = Device(
        name="three",
        tiers=(
            MemoryTier(name="near", capacity_bytes=10, bandwidth_bytes_per_second=4.0),
            MemoryTier(name="middle", capacity_bytes=100, bandwidth_bytes_per_second=2.0, usable_fraction=0.2),
            MemoryTier(name="far", capacity_bytes=1000, bandwidth_bytes_per_second=1.0),
        ),
        peak_flops=(("float32", 1.0),),
        compute_efficiency=1.0,
        layer_overhead_seconds=0.0,
    )
    layers = tuple(LayerCost(name=str(size), weight_bytes=size, weight_traffic_bytes=size) for size in (9, 1, 10, 1, 4))
    profile = ModelProfile(name="sizes", layers=layers, dtype="float32", input_bytes_per_token=0.0)
    cluster = Cluster.homogeneous(device, 1)
    (table,) = tables_of(profile, cluster, Workload(batch=1, sequence=1, micro_batch=1))
    starts, stops = np.array([0, 0, 0, 0]), np.array([1, 2, 3, 4])  # 9, 10, 20, 21 bytes
    assert table.working_set(starts, stops).tolist() == [9, 10, 20, 21]
    assert table.tier(starts, stops).tolist() == [0, 0, 1, 2]
    assert table.compute(starts, stops).tolist() == [9 / 4, 10 / 4, 20 / 2, 21 / 1]


def whole(profile: ModelProfile, workload: Workload) -> tuple[StageTable, np.ndarray, np.ndarray]:
    (table,) = tables_of(profile, Cluster.homogeneous("h200", 1), workload)
    return table, np.array([0]), np.array([profile.num_layers])


def test_tied_weights_count_once_in_one_stage_and_twice_in_two() -> None:
    profile = ModelProfile.from_config(TIED)
    untied = ModelProfile.from_config({**TIED, "tie_word_embeddings": False})
    matrix = 100 * 32 * 2
    table, start, stop = whole(profile, Workload(batch=1, sequence=1, micro_batch=1))
    assert table.memory(start, stop).weights[0] == 2 * profile.num_parameters
    assert profile.num_parameters == untied.num_parameters - 100 * 32
    apart = [table.memory(np.array([a]), np.array([b])).weights[0] for a, b in ((0, 2), (2, 5))]
    assert sum(apart) == 2 * profile.num_parameters + matrix


def test_tied_weights_have_one_gradient_and_one_adam_state_in_one_stage() -> None:
    profile = ModelProfile.from_config(TIED)
    table, start, stop = whole(profile, Workload(phase="train", batch=1, sequence=1, micro_batch=1))
    assert table.memory(start, stop).training[0] == (2 + 12) * profile.num_parameters


def test_training_keeps_more_on_earlier_stages() -> None:
    profile = ModelProfile.from_config({**TIED, "num_hidden_layers": 8, "tie_word_embeddings": False})
    workload = Workload(phase="train", batch=16, sequence=8, micro_batch=1)
    tables = tables_of(profile, Cluster.homogeneous("h200", 4), workload)
    run = np.array([2]), np.array([4])  # the same two blocks on each stage
    activations = [float(table.memory(*run).activations[0]) for table in tables]
    block = profile.layers[2]
    saved = 2 * 8 * (block.output_bytes_per_token + block.buffer_bytes_per_token)
    assert np.diff(activations).tolist() == [-saved] * 3
    few = tables_of(profile, Cluster.homogeneous("h200", 4), dataclasses.replace(workload, batch=2))
    assert [table.memory(*run).activations[0] for table in few] == [*[activations[2]] * 3, activations[3]]
    rest = {(memory.weights[0], memory.training[0], memory.buffers[0]) for memory in (t.memory(*run) for t in tables)}
    assert len(rest) == 1
    forward = tables_of(profile, Cluster.homogeneous("h200", 4), dataclasses.replace(workload, phase="prefill"))
    assert {float(table.memory(*run).training[0]) for table in forward} == {0.0}


@STEADY
@given(profiles(), clusters(roomy=True), workloads())
def test_no_partition_beats_the_lower_bound(profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
    assume(len(cluster.devices) <= profile.num_layers)
    best = best_plan(profile, cluster, workload)
    assume(best is not None)
    bound = work_lower_bound(tables_of(profile, cluster, workload), profile.num_layers)
    assert bound <= best.bottleneck * (1 + 1e-12)


def test_the_lower_bound_is_reached_by_layers_that_divide_evenly() -> None:
    profile = ModelProfile.from_costs([3] * 12)
    cluster = Cluster.homogeneous("h200", 4, FREE)
    plan = solve(profile, cluster, Workload(batch=1, sequence=1, micro_batch=1), "throughput")
    assert plan.lower_bound_seconds == plan.bottleneck_seconds == 9
    heavy = ModelProfile.from_costs([3, 40, 3, 3])
    assert solve(heavy, cluster, plan.workload, "throughput").lower_bound_seconds == 40


def test_equal_positions_are_one_object() -> None:
    profile = ModelProfile.from_costs([1] * 8)
    tables = tables_of(profile, Cluster.homogeneous("h200", 6), Workload(batch=4, sequence=1, micro_batch=1))
    assert len({id(table) for table in tables}) == 3  # first, between, last
