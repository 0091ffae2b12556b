"""`make_plan` as users call it: the reference workload, its notes, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import STEADY, clusters, cost_profiles, profiles, workloads
from test_solve import FREE, device

from lp_plugin import (
    Cluster,
    HardwareError,
    InfeasibleError,
    Link,
    ModelConfigError,
    ModelProfile,
    Plan,
    Workload,
    WorkloadError,
    load_plan,
    make_plan,
    save_plan,
)
from lp_plugin.objective import Constraints
from lp_plugin.quantity import shown
from lp_plugin.solver.solve import solve
from lp_plugin.workload import micro_batch_candidates

DENSE16 = Path(__file__).parent.parent / "examples" / "dense16"
REFERENCE = Workload(batch=1024, sequence=10_000)
ONE = Workload(batch=1, sequence=1, micro_batch=1)
FREE_FAST = Link(name="free", bandwidth_bytes_per_second=2.0**60, latency_seconds=0.0)


@pytest.fixture(scope="module")
def reference() -> dict[int, Plan]:
    """The reference workload on 8, 12 and 16 H100."""
    profile = ModelProfile.from_config(DENSE16)
    return {count: make_plan(profile, Cluster.homogeneous("h100-sxm", count), REFERENCE) for count in (8, 12, 16)}


def blocks(plan: Plan) -> list[int]:
    return [sum(name.startswith("block") for name in stage.layers) for stage in plan.stages]


def test_one_block_per_device_of_sixteen(reference: dict[int, Plan]) -> None:
    assert blocks(reference[16]) == [1] * 16
    assert blocks(reference[8]) == [2] * 8
    assert max(blocks(reference[12])) == 2
    assert sum(blocks(reference[12])) == 16


def test_sixteen_devices_halve_the_work_of_the_fullest_of_eight(reference: dict[int, Plan]) -> None:
    eight, sixteen = (max(stage.compute_seconds for stage in reference[count].stages) for count in (8, 16))
    assert 1.9 < eight / sixteen < 2.0  # embedding, norm and head stay whole
    slowest = max(reference[16].stages, key=lambda stage: stage.seconds)
    assert reference[16].stages.index(slowest) in {7, 8}  # on both sides of the network between two nodes
    assert slowest.transfer_seconds > 4 * reference[16].stages[1].transfer_seconds
    assert reference[12].bottleneck_seconds == pytest.approx(reference[8].bottleneck_seconds, rel=1e-6)


def test_notes_on_the_reference_say_what_arithmetic_says(reference: dict[int, Plan]) -> None:
    notes = "\n".join(reference[16].notes)
    assert "1.61 GB" in notes
    assert "32.2 x L2" in notes
    assert "must be cut" in notes
    assert "168 GB" in notes
    assert "80.0 GB" in notes
    assert "524 kB per token" in notes
    assert "5.37 TB" in notes
    assert "1.28 TB" in notes
    assert "214 sequences" in notes
    assert "gain nothing" not in notes


def test_twelve_devices_gain_nothing_over_eight(reference: dict[int, Plan]) -> None:
    notes = "\n".join(reference[12].notes)
    assert "12 devices gain nothing over 8" in notes
    assert "the fullest device holds 2 blocks either way" in notes
    assert "gain nothing" not in "\n".join(reference[8].notes)


def test_every_stage_of_the_reference_lives_in_hbm(reference: dict[int, Plan]) -> None:
    for plan in reference.values():
        assert {stage.tier for stage in plan.stages} == {"hbm"}
        assert plan.bottleneck_seconds >= plan.lower_bound_seconds
        assert [stage.device for stage in plan.stages] == ["h100-sxm"] * plan.num_stages


def test_the_reference_layers_weigh_what_the_config_says(reference: dict[int, Plan]) -> None:
    for plan in reference.values():
        weights = [layer.weight_bytes for layer in plan.layers if layer.name.startswith("block")]
        assert weights == [1_610_678_272] * 16
        assert sum(stage.weight_bytes for stage in plan.stages) == sum(layer.weight_bytes for layer in plan.layers)
        assert sum(layer.kv_bytes for layer in plan.layers) == 0


def test_decoding_the_reference_fits_214_sequences_and_no_more() -> None:
    profile, cluster = ModelProfile.from_config(DENSE16), Cluster.homogeneous("h100-sxm", 16)
    plan = make_plan(profile, cluster, Workload(phase="decode", batch=214, sequence=10_000))
    assert sum(stage.kv_bytes for stage in plan.stages) == 524_288 * 214 * 10_000
    with pytest.raises(InfeasibleError):
        make_plan(profile, cluster, Workload(phase="decode", batch=215, sequence=10_000))


SMALL_LAYERS = {"model_type": "starcoder2", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8,
                "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 264, "use_bias": False,
                "tie_word_embeddings": False, "dtype": "float16"}  # fmt: skip


@pytest.mark.parametrize("name", ["h100-sxm", "h200"])
def test_layers_that_fit_l2_are_placed_in_l2(name: str) -> None:
    profile = ModelProfile.from_config(SMALL_LAYERS)
    workload = Workload(phase="decode", batch=16, sequence=16)
    plan = make_plan(profile, Cluster.homogeneous(name, 8), workload)
    assert {stage.tier for stage in plan.stages} == {"l2"}
    assert blocks(plan) == [1] * 8
    assert any(note.startswith("Tier l2: every stage's working set stays in") for note in plan.notes)
    fewer = make_plan(profile, Cluster.homogeneous(name, 4), workload)
    assert "hbm" in {stage.tier for stage in fewer.stages}
    assert not any("every stage" in note for note in fewer.notes)


@STEADY
@given(profiles() | cost_profiles(), clusters(roomy=True), workloads(cut=False))
def test_the_lower_bound_holds_and_stages_add_up(profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
    stages = min(profile.num_layers, len(cluster.devices))
    try:
        plan = make_plan(profile, cluster, workload, stages)
    except InfeasibleError:
        return
    assert plan.bottleneck_seconds >= plan.lower_bound_seconds * (1 - 1e-12)
    assert plan.bottleneck_seconds == max(plan.stage_seconds)
    assert plan.num_stages == stages == len(plan.boundaries) - 1
    assert [name for stage in plan.stages for name in stage.layers] == [layer.name for layer in profile.layers]
    for stage in plan.stages:
        parts = (stage.weight_bytes, stage.kv_bytes, stage.activation_bytes, stage.buffer_bytes)
        assert stage.memory_bytes == sum(parts) + stage.training_bytes <= stage.capacity_bytes
        assert stage.seconds == stage.compute_seconds + stage.transfer_seconds
    assert plan.makespan_seconds >= plan.num_micro_batches * plan.bottleneck_seconds
    assert plan.workload.with_micro_batch(1) == workload.with_micro_batch(1)


@STEADY
@given(st.data())
def test_the_micro_batch_is_the_best_of_the_candidates(data: st.DataObject) -> None:
    profile = data.draw(profiles(min_layers=2))
    cluster = data.draw(clusters(max_devices=2, roomy=True))
    workload = data.draw(workloads(cut=False, max_batch=12))

    def rate(micro_batch: int) -> float:
        try:
            return make_plan(profile, cluster, workload.with_micro_batch(micro_batch)).tokens_per_second
        except InfeasibleError:
            return 0.0

    rates = {size: rate(size) for size in range(1, workload.batch + 1)}
    candidates = micro_batch_candidates(workload)
    best = max(rates[size] for size in candidates)
    if not best:
        with pytest.raises(InfeasibleError):
            make_plan(profile, cluster, workload)
        return
    plan = make_plan(profile, cluster, workload)
    assert plan.tokens_per_second == rates[plan.workload.micro_batch] == best
    assert plan.workload.micro_batch in candidates


@pytest.mark.parametrize(
    ("batch", "sizes"), [(1, [1]), (2, [1, 2]), (7, [1, 2, 4, 7]), (8, [1, 2, 4, 8]), (17, [1, 2, 4, 8, 16, 17])]
)
def test_candidates(batch: int, sizes: list[int]) -> None:
    assert micro_batch_candidates(Workload(batch=batch, sequence=1)) == sizes
    assert micro_batch_candidates(Workload(batch=batch, sequence=1, micro_batch=1)) == [1]


def test_fewer_stages_than_devices_use_the_first_devices() -> None:
    slow = dataclasses.replace(device(1000), name="slow")
    cluster = Cluster(devices=(device(1000), device(1000), slow), links=(FREE, FREE))
    plan = make_plan(ModelProfile.from_costs([1, 2, 3]), cluster, ONE, 2)
    assert [stage.device for stage in plan.stages] == ["own", "own"]
    assert plan.cluster_digest == cluster.subset(2).digest


def test_unequal_devices_get_unequal_shares() -> None:
    fast, slow = device(10**9), dataclasses.replace(device(10**9), peak_flops=(("float16", 0.25),))
    profile = ModelProfile.from_config({**SMALL_LAYERS, "num_hidden_layers": 10})
    plan = make_plan(profile, Cluster(devices=(fast, slow), links=(FREE,)), ONE)
    assert blocks(plan) == [8, 2]


def test_objective_memory_balances_bytes_instead_of_seconds() -> None:
    profile = ModelProfile.from_costs([9, 1, 1, 1], weight_bytes=[10, 10, 10, 10])
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    assert make_plan(profile, cluster, ONE).boundaries == (0, 1, 4)
    assert make_plan(profile, cluster, ONE, objective="memory").boundaries == (0, 2, 4)


@pytest.mark.parametrize("objective", ["speed", "", None, 1, math.nan, [], {}, "x" * 10**6, 10**5000], ids=shown)
def test_an_unknown_objective_is_refused(objective: Any) -> None:
    profile = ModelProfile.from_costs([1, 1])
    with pytest.raises(WorkloadError, match=r"objective is .* one of throughput, latency, sequences, memory"):
        make_plan(profile, Cluster.homogeneous(device(1000), 1), ONE, objective=objective)


@pytest.mark.parametrize("objective", ["throughput", "latency", "sequences", "memory"])
@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_room_is_planned_only_where_a_cache_is_kept(objective: str, phase: str) -> None:
    cluster, workload = Cluster.homogeneous("h200", 4), Workload(phase=phase, batch=4, sequence=16)
    decoder = ModelProfile.from_config(SMALL_LAYERS)
    if objective == "sequences" and phase == "train":
        with pytest.raises(WorkloadError, match="starcoder2 keeps no KV cache in train"):
            make_plan(decoder, cluster, workload, objective=objective)
    else:
        plan = make_plan(decoder, cluster, workload, objective=objective)
        assert plan.objective == objective
        assert (plan.max_sequences is None) is (phase == "train")
    plain = ModelProfile.from_costs([1] * 6)
    for wanted, asked in ((objective, None), ("throughput", Constraints(min_sequences=1))):
        if wanted == "sequences" or asked:
            with pytest.raises(WorkloadError, match=f"costs keeps no KV cache in {phase}"):
                make_plan(plain, cluster, workload, objective=wanted, constraints=asked)


@STEADY
@given(profiles(min_layers=2), clusters(max_devices=2, roomy=True), workloads(cut=False))
def test_each_objective_takes_the_micro_batch_that_serves_it(
    profile: ModelProfile, cluster: Cluster, workload: Workload
) -> None:
    merits: dict[str, Callable[[Plan], float]] = {
        "throughput": lambda plan: plan.tokens_per_second,
        "latency": lambda plan: -plan.latency_seconds,
        "memory": lambda plan: -plan.memory_share,
    }
    for objective, merit in merits.items():
        plan = make_plan(profile, cluster, workload, objective=objective)
        for size in micro_batch_candidates(workload):
            other = solve(profile, cluster, workload.with_micro_batch(size), objective)
            assert other is None or (merit(other), other.tokens_per_second) <= (merit(plan), plan.tokens_per_second)


@pytest.mark.parametrize(
    "stages", [0, -1, 7, 100, 2.0, True, "2", math.nan, math.inf, [2], 10**400, 10**5000], ids=shown
)
def test_too_many_stages_for_the_layers(stages: Any) -> None:
    profile = ModelProfile.from_costs([1] * 6)
    with pytest.raises(WorkloadError) as caught:
        make_plan(profile, Cluster.homogeneous(device(1000), 100, FREE), ONE, stages)
    assert str(caught.value).startswith(f"{shown(stages)} stages for costs with 6 layers")
    assert "ask for 1 to 6" in str(caught.value)


def test_too_many_devices_for_the_layers() -> None:
    with pytest.raises(WorkloadError, match="7 stages for costs with 6 layers"):
        make_plan(ModelProfile.from_costs([1] * 6), Cluster.homogeneous(device(1000), 7, FREE), ONE)


def test_too_few_devices() -> None:
    with pytest.raises(WorkloadError, match=r"5 stages for 4 devices.*more devices or fewer stages"):
        make_plan(ModelProfile.from_costs([1] * 6), Cluster.homogeneous(device(1000), 4, FREE), ONE, 5)


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_a_sequence_longer_than_the_model_allows(phase: str) -> None:
    profile, cluster = (
        ModelProfile.from_config({**SMALL_LAYERS, "max_position_embeddings": 64}),
        Cluster.parse("h200:2"),
    )
    assert make_plan(profile, cluster, Workload(phase=phase, batch=1, sequence=64))
    with pytest.raises(WorkloadError, match="sequence is 65 tokens, but starcoder2 allows 64"):
        make_plan(profile, cluster, Workload(phase=phase, batch=1, sequence=65))


def test_a_model_that_costs_nothing_has_a_plan() -> None:
    plan = make_plan(ModelProfile.from_costs([0, 0, 0]), Cluster.homogeneous(device(1000), 2, FREE), ONE)
    assert plan.bottleneck_seconds == 0
    assert plan.tokens_per_second == float("inf")


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-200, 1e200, 1e300])
@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_costs_of_any_size_have_a_plan(scale: float, phase: str, tmp_path: Path) -> None:
    profile = ModelProfile.from_costs([scale] * 6)
    plan = make_plan(profile, Cluster.homogeneous(device(1000), 2, FREE), Workload(phase=phase, batch=4, sequence=1))
    assert plan.boundaries == (0, 3, 6)
    assert plan.notes is not None
    assert 0 <= plan.bubble_fraction < 1
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def superfluous(plan: Plan) -> str:
    return next((note for note in plan.notes if "gain nothing" in note), "")


def test_no_note_where_more_devices_help() -> None:
    for count in range(1, 7):
        plan = make_plan(ModelProfile.from_costs([1] * 6), Cluster.homogeneous(device(1000), count, FREE), ONE)
        assert bool(superfluous(plan)) is (count in {4, 5})  # 2 layers at most, as with 3


@STEADY
@given(cost_profiles(max_weight=0), st.integers(1, 6))
def test_a_note_where_fewer_devices_are_as_fast_names_the_fewest(profile: ModelProfile, count: int) -> None:
    count = min(count, profile.num_layers)
    device_ = device(10**6)

    def slowest(devices: int) -> float:
        return make_plan(profile, Cluster.homogeneous(device_, devices, FREE_FAST), ONE).bottleneck_seconds

    plan = make_plan(profile, Cluster.homogeneous(device_, count, FREE_FAST), ONE)
    fewest = min(few for few in range(1, count + 1) if slowest(few) <= plan.bottleneck_seconds * 1.01)
    note = superfluous(plan)
    assert bool(note) is (fewest < count)
    if note:
        assert note.startswith(f"{count} devices gain nothing over {fewest} ")


def test_a_note_where_transfers_eat_the_gain() -> None:
    """One device takes 16 s; 4 take 4 + 14 s, and 8 take 2 + 14 s: no more than one."""
    slow = Link(name="slow", bandwidth_bytes_per_second=1.0, latency_seconds=7.0)
    plan = make_plan(ModelProfile.from_costs([2] * 8), Cluster.homogeneous(device(1000), 8, slow), ONE)
    assert plan.bottleneck_seconds == 16
    assert "8 devices gain nothing over 1 " in superfluous(plan)


def test_the_reason_given_for_superfluous_devices_is_true() -> None:
    """The heavy head decides: the fullest of 9 devices holds one block, the fullest of 2 holds 8."""
    names = [*(f"block {index}" for index in range(8)), "head"]
    profile = ModelProfile.from_costs([1] * 8 + [10], names=names)
    nine, two = (make_plan(profile, Cluster.homogeneous(device(1000), count, FREE), ONE) for count in (9, 2))
    assert (max(blocks(nine)), max(blocks(two))) == (1, 8)
    note = superfluous(nine)
    assert "9 devices gain nothing over 2 " in note
    assert "either way" not in note


def test_the_note_on_the_kv_cache_knows_sliding_windows() -> None:
    """What decoding would keep is what the planner itself plans for decoding."""
    config = {"model_type": "mistral", "num_hidden_layers": 32, "sliding_window": 4096, "dtype": "float16"}
    profile, cluster = ModelProfile.from_config(config), Cluster.homogeneous("h100-sxm", 2)
    workload = Workload(batch=64, sequence=32_768)
    (note,) = [note for note in make_plan(profile, cluster, workload).notes if "KV cache" in note] or [""]
    decoding = dataclasses.replace(workload, phase="decode")
    assert make_plan(profile, cluster, decoding)  # it fits, so there is nothing to warn of
    assert not note


def test_notes_are_sentences() -> None:
    profile = ModelProfile.from_config(DENSE16)
    for phase in ("prefill", "decode", "train"):
        plan = make_plan(profile, Cluster.homogeneous("h200", 8), Workload(phase=phase, batch=8, sequence=512))
        assert plan.notes
        assert all(re.fullmatch(r"[A-Z0-9].*\.", note) for note in plan.notes)


def test_boundaries_rise() -> None:
    plan = make_plan(ModelProfile.from_costs([1] * 6), Cluster.homogeneous(device(1000), 3, FREE), ONE)
    assert list(pairwise(plan.boundaries)) == [(stage.start, stage.stop) for stage in plan.stages]


@pytest.mark.parametrize(
    ("name", "values", "error", "remedy"),
    [
        ("profile", ("path", None, DENSE16), ModelConfigError, "ModelProfile: use ModelProfile.from_config"),
        ("cluster", ("h200:2", None, 5), HardwareError, "Cluster: use Cluster.parse"),
        ("workload", ({"batch": 1}, {}, None), WorkloadError, "Workload: use Workload("),
        ("constraints", ({"tier": "l2"}, "l2", 5), WorkloadError, "Constraints: use Constraints("),
    ],
)
def test_a_request_of_other_things_is_refused(
    name: str, values: tuple[Any, ...], error: type[Exception], remedy: str
) -> None:
    profile, cluster = ModelProfile.from_costs([1, 2]), Cluster.homogeneous("h200", 2)
    for value in values:
        request: dict[str, Any] = {"profile": profile, "cluster": cluster, "workload": ONE, name: value}
        with pytest.raises(error, match=re.escape(f"{name} is {shown(value)}; it must be a {remedy}")):
            make_plan(**request)
