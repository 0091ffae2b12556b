"""Seconds and bytes of a stage against plain loops over its layers."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import all_cuts, best_plan, within
from plain_stages import PlainStages
from strategies import STEADY, clusters, profiles, workloads

from lp_plugin import (
    Cluster,
    Device,
    HardwareError,
    LayerCost,
    Link,
    MemoryTier,
    ModelConfigError,
    ModelProfile,
    Workload,
)
from lp_plugin.objective import Constraints
from lp_plugin.solver.cost import StageTable, bottleneck_seconds, stage_tables, work_lower_bound
from lp_plugin.solver.solve import solve

FREE = Link(name="free", bandwidth_bytes_per_second=1.0, latency_seconds=0.0)
TIED = {"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "dtype": "float16", "tie_word_embeddings": True}  # fmt: skip


def runs_of(num_layers: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(start, stop) for start in range(num_layers) for stop in range(start + 1, num_layers + 1)]
    starts, stops = zip(*pairs, strict=True)
    return np.array(starts), np.array(stops)


@settings(STEADY, max_examples=200)
@given(st.data())
def test_every_run_costs_what_plain_loops_say(data: st.DataObject) -> None:
    workload, profile = data.draw(workloads()), data.draw(profiles())
    cluster = data.draw(clusters(groups=True))
    starts, stops = runs_of(profile.num_layers)
    plain = PlainStages(profile, cluster, workload)
    for position, table in enumerate(stage_tables(profile, cluster, workload)):
        memory = table.memory(starts, stops)
        found = {
            "weight_bytes": memory.weights,
            "kv_bytes": memory.kv_cache,
            "activation_bytes": memory.activations,
            "buffer_bytes": memory.buffers,
            "training_bytes": memory.training,
            "memory_bytes": table.total_bytes(starts, stops),
            "working_set_bytes": table.working_set(starts, stops),
            "traffic_bytes": table.traffic(starts, stops),
            "tier": table.tier(starts, stops),
            "compute_seconds": table.compute(starts, stops),
            "resident_seconds": table.compute_in(0, starts, stops),
            "transfer_seconds": table.entry[starts] + table.exit[stops],
            "hit_fraction": table.hit_fraction(starts, stops),
            "room": table.room(starts, stops),
        }
        assert memory.total.tolist() == found["memory_bytes"].tolist()
        for index, run in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            stage = plain(position, *run)
            for name, values in found.items():
                if name in {"working_set_bytes", "traffic_bytes", "hit_fraction"}:  # the expected part of experts
                    assert values[index] == pytest.approx(getattr(stage, name), rel=1e-12), name
                else:
                    assert values[index] == getattr(stage, name), name


@STEADY
@given(profiles(), clusters(groups=True), workloads())
def test_what_a_stage_takes_never_falls_when_it_grows(
    profile: ModelProfile, cluster: Cluster, workload: Workload
) -> None:
    starts, stops = runs_of(profile.num_layers)
    runs = list(zip(starts.tolist(), stops.tolist(), strict=True))
    for table in stage_tables(profile, cluster, workload):
        for values in (table.compute(starts, stops), table.total_bytes(starts, stops), -table.room(starts, stops)):
            known = dict(zip(runs, values.tolist(), strict=True))
            for (start, stop), value in known.items():
                assert known.get((start - 1, stop), np.inf) >= value
                assert known.get((start, stop + 1), np.inf) >= value


def test_a_larger_and_faster_tier_is_refused() -> None:
    """The solver needs costs that never fall; a slow small tier before a fast large one would break that."""
    tiers = (
        MemoryTier(name="slow", capacity_bytes=10, bandwidth_bytes_per_second=1.0),
        MemoryTier(name="fast", capacity_bytes=1000, bandwidth_bytes_per_second=100.0),
    )
    with pytest.raises(HardwareError, match="'slow' and 'fast': the next tier must be no faster"):
        Device(
            name="odd",
            tiers=tiers,
            peak_flops=(("float32", 1.0),),
            compute_efficiency=1.0,
            layer_overhead_seconds=0.0,
        )


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
    layers = tuple(
        LayerCost(name=str(index), weight_bytes=size, weight_traffic_bytes=size)
        for index, size in enumerate((9, 1, 10, 1, 4))
    )
    profile = ModelProfile(name="sizes", layers=layers, dtype="float32", input_bytes_per_token=0.0)
    cluster = Cluster.homogeneous(device, 1)
    (table,) = stage_tables(profile, cluster, Workload(batch=1, sequence=1, micro_batch=1))
    starts, stops = np.array([0, 0, 0, 0]), np.array([1, 2, 3, 4])  # 9, 10, 20, 21 bytes
    assert table.working_set(starts, stops).tolist() == [9, 10, 20, 21]
    assert table.tier(starts, stops).tolist() == [0, 0, 1, 2]
    assert table.compute(starts, stops).tolist() == [9 / 4, 10 / 4, 20 / 2, 21 / 1]


def whole(profile: ModelProfile, workload: Workload) -> tuple[StageTable, np.ndarray, np.ndarray]:
    (table,) = stage_tables(profile, Cluster.homogeneous("h200", 1), workload)
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
    tokens = 256  # so many that the optimizer's step takes less than activations
    workload = Workload(phase="train", batch=16, sequence=tokens, micro_batch=1)
    tables = stage_tables(profile, Cluster.homogeneous("h200", 4), workload)
    run = np.array([2]), np.array([4])  # the same two blocks on each stage
    activations = [float(table.memory(*run).activations[0]) for table in tables]
    saved = 2 * tokens * profile.layers[2].saved_bytes_per_token
    assert saved > 0
    assert np.diff(activations).tolist() == [-saved] * 3
    few = stage_tables(profile, Cluster.homogeneous("h200", 4), dataclasses.replace(workload, batch=2))
    assert [table.memory(*run).activations[0] for table in few] == [*[activations[2]] * 3, activations[3]]
    rest = {(memory.weights[0], memory.training[0], memory.buffers[0]) for memory in (t.memory(*run) for t in tables)}
    assert len(rest) == 1
    forward = stage_tables(profile, Cluster.homogeneous("h200", 4), dataclasses.replace(workload, phase="prefill"))
    assert {float(table.memory(*run).training[0]) for table in forward} == {0.0}
    again = stage_tables(profile, Cluster.homogeneous("h200", 4), dataclasses.replace(workload, checkpointing=True))
    inputs = 2 * tokens * profile.layers[1].output_bytes_per_token  # all that waits
    assert np.diff([table.memory(*run).activations[0] for table in again]).tolist() == [-inputs] * 3


def test_zero_stage_1_spreads_the_adam_states_over_replicas() -> None:
    profile = ModelProfile.from_config({**TIED, "tie_word_embeddings": False})
    plain = Workload(phase="train", batch=1, sequence=1, micro_batch=1, data_parallel=4)
    sizes = []
    for workload in (plain, dataclasses.replace(plain, zero_stage=1)):
        table, start, stop = whole(profile, workload)
        sizes.append(float(table.memory(start, stop).training[0]) / profile.num_parameters)
    assert sizes == [2 + 12, 2 + 12 / 4]


@pytest.mark.parametrize(
    ("dtype", "options", "stays", "step"),
    [
        ("float32", {}, 4 + 8, 4),
        ("float32", {"zero_stage": 1}, 4 + (4 + 8) / 4, 4 / 4),
        ("float16", {}, 2 + 12, 4),
        ("bfloat16", {}, 2 + 2 + 12 / 4, 4 / 4),
        ("float16", {"zero_stage": 1}, 2 + 12 / 4, 0),
        ("bfloat16", {"zero_stage": 1}, 2 + 12 / 4, 0),
        ("bfloat16", {"zero_stage": 1, "float32_gradients": True}, 2 + 4 + 12 / 4, 0),
        ("bfloat16", {"zero_stage": 1, "data_parallel": 1}, 2 + 12, 4 - 2),
    ],
)
def test_training_bytes_per_parameter_are_deepspeeds(
    dtype: str, options: dict[str, Any], stays: float, step: float
) -> None:
    """Gradients, master weights, moments, of 4 replicas; and gradients in float32 for the optimizer's step."""
    layer = LayerCost(name="one", parameters=1000, weight_bytes=1000 * (4 if dtype == "float32" else 2))
    profile = ModelProfile(name="one", layers=(layer,), dtype=dtype, input_bytes_per_token=0.0)
    workload = Workload(phase="train", batch=1, sequence=1, micro_batch=1, **({"data_parallel": 4} | options))
    table, start, stop = whole(profile, workload)
    memory = table.memory(start, stop)
    assert (memory.training[0], memory.activations[0], memory.buffers[0]) == (1000 * stays, 0, 1000 * step)


def test_gradients_are_copied_for_their_reduction_two_gigabytes_at_a_time() -> None:
    layer = LayerCost(name="one", parameters=10**9, weight_bytes=4 * 10**9)
    profile = ModelProfile(name="one", layers=(layer,), dtype="float32", input_bytes_per_token=0.0)
    table, start, stop = whole(profile, Workload(phase="train", batch=1, sequence=1, micro_batch=1))
    assert table.total_bytes(start, stop)[0] == 16 * 10**9 + 2 * 10**9


@STEADY
@given(profiles(), clusters(roomy=True), workloads())
def test_no_partition_beats_the_lower_bound(profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
    assume(len(cluster.devices) <= profile.num_layers)
    best = best_plan(PlainStages(profile, cluster, workload))
    assume(best is not None)
    bound = work_lower_bound(stage_tables(profile, cluster, workload), profile.num_layers)
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
    tables = stage_tables(profile, Cluster.homogeneous("h200", 6), Workload(batch=4, sequence=1, micro_batch=1))
    assert len({id(table) for table in tables}) == 3  # first, between, last


@STEADY
@given(profiles(), clusters(groups=True), workloads())
def test_the_slowest_stage_of_boundaries(profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
    assume(len(cluster.devices) <= profile.num_layers)
    stage, tables = PlainStages(profile, cluster, workload), stage_tables(profile, cluster, workload)
    for bounds in all_cuts(profile.num_layers, len(cluster.devices)):
        stages = [stage(position, *run) for position, run in enumerate(pairwise(bounds))]
        fits = within(stage, stages, Constraints())
        assert bottleneck_seconds(tables, bounds) == (max(plain.seconds for plain in stages) if fits else None)


def device(name: str, *, flops: float = 1.0, rate: float = 1.0) -> Device:
    return Device(
        name=name,
        tiers=(MemoryTier(name="memory", capacity_bytes=10**9, bandwidth_bytes_per_second=rate),),
        peak_flops=(("float32", flops),),
        compute_efficiency=1.0,
        layer_overhead_seconds=0.0,
    )


def test_measured_seconds_are_scaled_to_other_devices() -> None:
    """By the ratio of the rooflines; on a device of the same name they stay what they are."""
    bound_by_flops = LayerCost(name="flops", flops_per_token=8.0, traffic_bytes_per_token=1.0, seconds=5.0)
    bound_by_bytes = LayerCost(name="bytes", flops_per_token=1.0, traffic_bytes_per_token=8.0, seconds=3.0)
    free = LayerCost(name="free", seconds=2.0)
    here, other = device("here"), device("other", flops=4.0, rate=2.0)
    profile = ModelProfile(
        name="measured", layers=(bound_by_flops, bound_by_bytes, free), dtype="float32", measured_on=here
    )
    workload, index = Workload(batch=1, sequence=1, micro_batch=1), np.arange(3)
    seconds = [
        stage_tables(profile, Cluster.homogeneous(used, 1), workload)[0].compute(index, index + 1).tolist()
        for used in (here, other)
    ]
    assert seconds == [[5, 3, 2], [5 / 4, 3 / 2, 2]]


def test_resident_seconds_are_scaled_as_the_first_tier() -> None:
    """They count where the stage fits it, and only there; nothing fits a tier that the device lacks."""
    here = Cluster.homogeneous("h200", 1).devices[0]
    cache, memory = here.tiers
    slower = dataclasses.replace(cache, bandwidth_bytes_per_second=0.8 * cache.bandwidth_bytes_per_second)
    other = dataclasses.replace(here, name="other", tiers=(slower, memory))
    plain = dataclasses.replace(here, tiers=(memory,))
    kept = int(0.6 * cache.usable_bytes)
    layers = tuple(
        LayerCost(name=name, weight_bytes=kept, weight_traffic_bytes=kept, seconds=9.0, resident_seconds=2.0)
        for name in ("one", "two")
    )
    profile = ModelProfile(name="measured", layers=layers, dtype="float16", measured_on=here)
    starts, stops = np.array([0, 0]), np.array([1, 2])
    one, two = (
        stage_tables(profile, Cluster.homogeneous(used, 1), Workload(batch=1, sequence=1, micro_batch=1))[0]
        .compute(starts, stops)
        .tolist()
        for used in (here, other)
    )
    assert one == [2, 18]
    assert two == pytest.approx([2 / 0.8, 18])
    [alone] = stage_tables(profile, Cluster.homogeneous(plain, 1), Workload(batch=1, sequence=1, micro_batch=1))
    assert alone.compute(starts, stops).tolist() == [9, 18]


def test_equal_layers_cost_the_same_in_any_order() -> None:
    """Sums of tenths differ by their order; on the grid they don't."""
    costs = [0.1, 0.2, 0.3, 0.7, 0.1, 0.3, 0.2, 0.7, 1e-9, 0.1, 0.1, 0.2, 0.3, 0.7, 1e-9]
    profile = ModelProfile.from_costs(costs)
    (table,) = stage_tables(profile, Cluster.homogeneous("h200", 1), Workload(batch=1, sequence=1, micro_batch=1))
    starts, stops = runs_of(len(costs))
    totals: dict[tuple[float, ...], set[float]] = {}
    for start, stop, seconds in zip(starts, stops, table.compute(starts, stops), strict=True):
        totals.setdefault(tuple(sorted(costs[start:stop])), set()).add(float(seconds))
        assert seconds == pytest.approx(sum(costs[start:stop]), rel=1e-9)
    assert max(map(len, totals.values())) == 1


def test_sums_are_exact_however_many_kinds_of_devices_there_are() -> None:
    """Each device is slow at a layer of its own, so that the whole is many times what any device would take."""
    count = 64
    slow = [device(f"device {index}", flops=2.0**-index) for index in range(count)]
    layers = tuple(LayerCost(name=str(index), flops_per_token=1 + index / 10) for index in range(2 * count))
    profile = ModelProfile(name="uneven", layers=layers, dtype="float32")
    cluster = Cluster(devices=tuple(slow), links=(FREE,) * (count - 1))
    tables = stage_tables(profile, cluster, Workload(batch=1, sequence=1, micro_batch=1))
    runs = np.arange(count) * 2
    seconds = [float(table.compute(runs[i : i + 1], runs[i : i + 1] + 2)[0]) for i, table in enumerate(tables)]
    assert sum(seconds) == sum(reversed(seconds)) == math.fsum(seconds)


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-300, 1e-200, 1.0, 1e200, 1e300])
def test_costs_of_any_size(scale: float) -> None:
    profile = ModelProfile.from_costs([3 * scale, scale, 2 * scale])
    (table,) = stage_tables(profile, Cluster.homogeneous("h200", 1), Workload(batch=1, sequence=1, micro_batch=1))
    assert table.compute(np.array([0, 0, 1]), np.array([1, 3, 3])).tolist() == pytest.approx(
        [3 * scale, 6 * scale, 3 * scale], rel=1e-12
    )


@pytest.mark.parametrize("costs", [[1e308] * 10, [1.7e308, 1.7e308]])
def test_costs_whose_sum_is_no_number(costs: list[float]) -> None:
    with pytest.raises(ModelConfigError, match="more than a number can hold"):
        stage_tables(
            ModelProfile.from_costs(costs), Cluster.homogeneous("h200", 1), Workload(batch=1, sequence=1, micro_batch=1)
        )
