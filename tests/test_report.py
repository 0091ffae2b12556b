"""Plans as text: every figure legible, every claim true."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from small_cases import FREE, ONE, chain, device

from lp_plugin import Cluster, Device, LayerCost, ModelProfile, Plan, Workload, make_plan
from lp_plugin.objective import Constraints
from lp_plugin.report import as_text, layer_table, plan_report, stage_table, summary, tier_table
from lp_plugin.solver.solve import evaluate

DENSE16 = Path(__file__).parent.parent / "examples" / "dense16"


def report(plan: Plan) -> str:
    return as_text(plan_report(plan))


@pytest.fixture(scope="module")
def reference() -> Plan:
    profile = ModelProfile.from_config(DENSE16)
    return make_plan(profile, Cluster.homogeneous("h100-sxm", 16), Workload(batch=1024, sequence=10_000))


def test_the_layer_table_of_the_reference(reference: Plan) -> None:
    assert "dense16 in float16, prefill: batch 1024 x sequence 10000, micro-batch 1, 16 stages" in report(reference)
    text = as_text(layer_table(reference))
    (blocks,) = [line for line in text.splitlines() if "block" in line]
    assert blocks.split()[-10:] == ["1.61", "GB", "164", "MB", "0", "B", "1.64", "GB", "3.41", "GB"]
    names = [line.split()[0] for line in text.splitlines()[-4:]]  # the 16 blocks share a row
    assert names == ["embedding", "block", "norm", "head"]


def test_halves_that_share_a_stage_are_named_as_their_block() -> None:
    profile = ModelProfile.from_config(DENSE16, granularity="sublayer")
    cluster, workload = Cluster.homogeneous("h100-sxm", 3), Workload(batch=8, sequence=100)
    text = as_text(stage_table(evaluate(profile, cluster, dataclasses.replace(workload, micro_batch=1), (0, 4, 6, 35))))
    first, middle, last = (line for line in text.splitlines() if "block" in line)
    assert "  embedding, block 0, block 1 attention  " in first
    assert "  block 1 mlp, block 2 attention  " in middle
    assert "  block 2 mlp, block 3-15, norm, head  " in last


def test_the_stage_table_of_the_reference(reference: Plan) -> None:
    text = as_text(stage_table(reference))
    assert "KV cache" not in text  # nothing to say in prefill
    assert "training" not in text
    assert "device" not in text
    assert text.count("<- slowest") == 1
    assert "hits" not in text  # nothing is served by L2
    rows = text.splitlines()[-5:]
    assert [row.split()[0] for row in rows] == ["0", "1", "7", "9", "15"]
    assert rows[2].split()[:3] == ["7", "..", "8"]  # at the network between the nodes
    assert rows[2].endswith("<- slowest")


def test_the_summary_of_the_reference(reference: Plan) -> None:
    text = str(summary(reference))
    assert "1024 micro-batches of 1" in text
    assert str(list(reference.boundaries)) in text
    assert f"{reference.tokens_per_second:,.0f} tokens/s" in text


def test_the_whole_report_holds_tables_summary_and_notes(reference: Plan) -> None:
    text = " ".join(report(reference).split())
    for part in (layer_table(reference), stage_table(reference), summary(reference)):
        assert " ".join(as_text(part).split()) in text
    assert all(note in text for note in reference.notes)


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
@pytest.mark.parametrize("count", [1, 8, 16])
@pytest.mark.parametrize("batch", [1, 16])
def test_no_figure_is_cut_off(phase: str, count: int, batch: int) -> None:
    profile = ModelProfile.from_config(DENSE16)
    boundaries = [0, *range(2, count + 1), 19]
    workload = Workload(phase=phase, batch=batch, sequence=10_000, micro_batch=batch)
    plan = evaluate(profile, Cluster.homogeneous("h100-sxm", count), workload, boundaries)
    assert "…" not in as_text(stage_table(plan))


def test_a_stage_that_does_not_fit_is_marked() -> None:
    profile = ModelProfile.from_costs([9, 1, 1], weight_bytes=[1, 60, 60])
    plan = evaluate(profile, Cluster.homogeneous(device(100), 2, FREE), ONE, [0, 1, 3])
    slowest, over = as_text(stage_table(plan)).splitlines()[-2:]
    assert slowest.endswith("<- slowest")
    assert over.endswith("<- does not fit")
    assert "120.0%" in over


def test_unequal_devices_are_named() -> None:
    other = dataclasses.replace(device(1000), name="other")
    cluster = Cluster(devices=(device(1000), other), links=(FREE,))
    text = as_text(stage_table(make_plan(ModelProfile.from_costs([1, 1]), cluster, ONE)))
    assert "device" in text
    assert "own" in text
    assert "other" in text


@pytest.mark.parametrize("name", ["[bold]", "layers[/x]", "[link=x]here", "", " ", "a b", "日本", "x" * 200])
def test_any_name_can_be_shown(name: str) -> None:
    profile = ModelProfile.from_costs([1, 2], names=[name, "other"], name=f"model {name}")
    text = report(make_plan(profile, Cluster.homogeneous(device(1000), 2, FREE), ONE))
    assert "".join(name.split())[:20] in "".join(text.split())


@pytest.mark.parametrize("name", ["hbm[/b]", "[red]", "[link=x]here", ":smile:", "a\\[b]"])
def test_any_name_of_a_model_device_or_tier_is_shown_as_it_is(name: str) -> None:
    def own(where: str) -> Device:
        tiers = [dataclasses.replace(tier, name=f"{name}{i}") for i, tier in enumerate(device(50, 1000).tiers)]
        return dataclasses.replace(device(50, 1000), name=where, tiers=tuple(tiers))

    cluster = Cluster(devices=(own(name), own("other")), links=(FREE,))
    profile = ModelProfile.from_costs([1, 2], names=[f"{name}a", "b"], weight_bytes=[20, 80], name=f"{name}m")
    plan = make_plan(profile, cluster, ONE, constraints=Constraints(tier=f"{name}1"))
    assert as_text(plan_report(plan, cluster)).splitlines()[0].startswith(f"{name}m in ")
    assert f"{name}a" in as_text(layer_table(plan))
    first, second = as_text(stage_table(plan, {1: f"leaves {name}0"})).splitlines()[-2:]
    assert first.split()[2] == name
    assert f"{name}0" in first.split()
    assert f"{name}1" in second.split()
    assert second.endswith(f"<- leaves {name}0")
    heading = as_text(tier_table(plan, cluster)).splitlines()[0]
    assert f"of {name}0" in heading
    assert f"of {name}1" in heading
    assert f"every stage in tier {name}1" in str(summary(plan))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "train"),
        ({"checkpointing": True}, "train with checkpointing"),
        ({"data_parallel": 8}, "train with 8 replicas"),
        ({"zero_stage": 1}, "train with ZeRO stage 1 over 1 replica"),
        ({"zero_stage": 1, "data_parallel": 8}, "train with ZeRO stage 1 over 8 replicas"),
        (
            {"zero_stage": 1, "data_parallel": 8, "checkpointing": True},
            "train with ZeRO stage 1 over 8 replicas, checkpointing",
        ),
        (
            {"zero_stage": 1, "float32_gradients": True},
            "train with ZeRO stage 1 over 1 replica, gradients summed up in float32",
        ),
    ],
)
def test_a_training_report_says_what_was_asked(asked: dict[str, Any], words: str) -> None:
    workload = Workload(phase="train", batch=4, sequence=1, micro_batch=1, **asked)
    plan = make_plan(ModelProfile.from_costs([1, 1]), Cluster.homogeneous(device(1000), 2, FREE), workload)
    assert f"costs in float32, {words}: batch 4 x sequence 1, micro-batch 1, 2 stages" in report(plan)
    throughput = certificate(plan)["throughput"]
    rate = f"{plan.tokens_per_second:,.0f} tokens/s predicted"
    if "data_parallel" in asked:
        rate += " of each of 8 replicas, their gradient all-reduce not counted"
    assert throughput.startswith(f"{rate}; 4 micro-batches of 1, bubble ")


def test_one_of_a_kind_is_singular() -> None:
    plan = make_plan(ModelProfile.from_costs([1, 1]), Cluster.homogeneous(device(1000), 1, FREE), ONE)
    assert report(plan).splitlines()[0].endswith("micro-batch 1, 1 stage")
    assert "; 1 micro-batch of 1, " in certificate(plan)["throughput"]


def test_marks_are_shown_and_part_equal_stages() -> None:
    profile = ModelProfile.from_costs([1, 1, 1], weight_bytes=[1, 1, 1])
    plan = evaluate(profile, Cluster.homogeneous(device(100), 3, FREE), ONE, [0, 1, 2, 3])
    assert len(as_text(stage_table(plan)).splitlines()) == 3
    *_, first, second = as_text(stage_table(plan, {0: "too slow", 1: "too slow"})).splitlines()
    assert first.split()[:3] == ["0", "..", "1"]
    assert first.endswith("<- too slow")
    assert second.endswith("<- slowest")


def two_tiers() -> Cluster:
    return Cluster.homogeneous(device(50, 1000), 2, FREE)


def test_hits_are_shown_where_there_are_any() -> None:
    plan = make_plan(ModelProfile.from_costs([1, 2], weight_bytes=[20, 80]), two_tiers(), ONE)
    text = as_text(stage_table(plan))
    assert "hits" in text
    fast, slow = text.splitlines()[-2:]
    assert fast.split()[-4:] == ["tier0", "100.0%", "1.00", "s"]
    assert "0.0%" in slow.split()


def test_the_tier_table_sets_working_sets_against_every_tier() -> None:
    layers = tuple(
        LayerCost(name=f"block {i}", kind="block", weight_bytes=size, weight_traffic_bytes=size)
        for i, size in enumerate((20, 80))
    )
    profile = ModelProfile(name="two", layers=layers, dtype="float16", input_bytes_per_token=0.0)
    plan = make_plan(profile, two_tiers(), ONE)
    fast, slow = as_text(tier_table(plan, two_tiers())).splitlines()[-2:]
    assert fast.split() == ["0", "20", "B", "40.0%", "2.0%", "100.0%", "0", "B", "2.50", "s", "2.50", "s"]
    assert slow.split() == ["1", "80", "B", "160.0%", "8.0%", "0.0%", "80", "B", "20.0", "s", "10.0", "s"]
    assert plan.dram_bytes_per_token == 80


def test_the_tier_table_of_the_reference(reference: Plan) -> None:
    cluster = Cluster.homogeneous("h100-sxm", 16)
    text = as_text(tier_table(reference, cluster))
    assert text.splitlines()[0].split()[:7] == ["stage", "working", "set", "of", "l2", "of", "hbm"]
    stage = reference.stages[1]
    assert f"{stage.working_set_bytes / 33e6:.3g} x" in text
    assert f"{stage.working_set_bytes / 72e9:.1%}" in text
    assert " ".join(text.split()) in " ".join(as_text(plan_report(reference, cluster)).split())


def test_tiers_that_some_devices_lack_are_left_blank() -> None:
    other = dataclasses.replace(device(1000), name="other")
    cluster = Cluster(devices=(device(50, 1000), other), links=(FREE,))
    plan = make_plan(ModelProfile.from_costs([1, 1], weight_bytes=[500, 500]), cluster, ONE)
    first, second = as_text(tier_table(plan, cluster)).splitlines()[-2:]
    assert first.split()[3:6] == ["10", "x", "50.0%"]
    assert second.split()[3] == "50.0%"


EVEN = "with equally many layers per stage"
NO_GAIN = "uniform is already optimal, nothing to gain"


def certificate(plan: Plan) -> dict[str, str]:
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in str(summary(plan)).splitlines()}


def test_what_is_proven_of_each_objective() -> None:
    profile = ModelProfile.from_costs([9, 1, 1, 1], weight_bytes=[10, 10, 10, 10])
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    end = "of all partitions (the search is exact)"
    said = {
        name: certificate(make_plan(profile, cluster, ONE, objective=name))["bottleneck"]  # type: ignore[arg-type]
        for name in ("throughput", "latency", "memory")
    }
    assert said["throughput"] == f"9.00 s per micro-batch, proven least {end}"
    assert said["latency"] == f"9.00 s per micro-batch; latency 12.0 s, proven least {end}"
    assert said["memory"] == f"10.0 s per micro-batch; the fullest device is 2.0% full, proven least {end}"


def test_room_for_sequences_is_proven_most() -> None:
    profile = ModelProfile.from_config(DENSE16)
    workload = Workload(phase="decode", batch=16, sequence=10_000, micro_batch=1)
    plan = make_plan(profile, Cluster.homogeneous("h100-sxm", 16), workload, objective="sequences")
    assert "; room for 214 sequences, proven most of all partitions" in certificate(plan)["bottleneck"]


def test_a_proof_names_the_constraints() -> None:
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    plan = make_plan(ModelProfile.from_costs([1, 2]), cluster, ONE, constraints=Constraints(max_memory_bytes=99))
    assert "of all partitions with at most 99 B per device (the search is exact)" in certificate(plan)["bottleneck"]


def test_nothing_is_claimed_of_boundaries_that_were_given() -> None:
    plan = evaluate(ModelProfile.from_costs([1, 1]), Cluster.homogeneous(device(1000), 2, FREE), ONE, [0, 1, 2])
    assert certificate(plan)["bottleneck"] == "1.00 s per micro-batch"
    assert certificate(plan)["uniform"] == "1.00 s with equally many layers per stage"
    assert "proven" not in str(summary(plan))
    assert "optimal" not in str(summary(plan))


def test_the_gap_to_the_lower_bound() -> None:
    plan = make_plan(chain([2.0, 2.0, 2.0], 0.0), Cluster.homogeneous(device(1000), 2, FREE), ONE)
    assert certificate(plan)["lower bound"] == (
        "3.00 s, the heaviest layer or all work spread evenly; the bottleneck is 33.3% above it"
    )


@pytest.mark.parametrize(
    ("costs", "weights", "limit", "words"),
    [
        ([1, 1, 1, 1], [1] * 4, None, f"2.00 s {EVEN}: {NO_GAIN}"),
        ([5, 1, 1, 1], [1] * 4, None, f"6.00 s {EVEN}, 20.0% more than the plan"),
        ([1, 1, 1, 1], [900, 900, 50, 50], None, "equally many layers per stage do not fit the memory"),
        ([2000, 1, 1, 1998], [1] * 4, None, f"33 min 21 s {EVEN}: {NO_GAIN} (0.05%)"),
        ([1, 1, 1, 1], [60, 60, 1, 1], 100, f"2.00 s {EVEN}, but that breaks a constraint"),
        ([1, 1, 1, 1], [1] * 4, 100, f"2.00 s {EVEN}: {NO_GAIN}"),
    ],
)
def test_what_a_uniform_split_gives(costs: list[int], weights: list[int], limit: int | None, words: str) -> None:
    profile = ModelProfile.from_costs(costs, weight_bytes=weights)
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    plan = make_plan(profile, cluster, ONE, constraints=Constraints(max_memory_bytes=limit))
    assert certificate(plan)["uniform"] == words


def test_a_uniform_split_as_fast_as_the_plan_may_still_break_a_constraint() -> None:
    """[0 | 1 2 3] of 2 s, like [0 1 | 2 3], which takes 120 bytes where 100 are allowed."""
    profile = ModelProfile.from_costs([1, 1, 0, 1], weight_bytes=[60, 60, 1, 1])
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    plan = make_plan(profile, cluster, ONE, constraints=Constraints(max_memory_bytes=100))
    assert plan.boundaries == (0, 1, 4)
    assert certificate(plan)["uniform"].endswith(": the same, if it keeps to the constraints")


def test_a_plan_that_costs_nothing_can_be_summed_up() -> None:
    plan = evaluate(ModelProfile.from_costs([0, 0]), Cluster.homogeneous(device(1000), 1), ONE, [0, 2])
    assert "inf tokens/s" in str(summary(plan))


def test_as_text_has_no_colours_and_no_trailing_blanks(reference: Plan) -> None:
    text = report(reference)
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
