"""Plans as text: every figure legible, every claim true."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from test_solve import FREE, device

from lp_plugin import Cluster, MemoryTier, ModelProfile, Plan, Workload, make_plan
from lp_plugin.report import as_text, layer_table, plan_report, stage_table, summary
from lp_plugin.solve import evaluate

DENSE16 = Path(__file__).parent.parent / "examples" / "dense16"
ONE = Workload(batch=1, sequence=1, micro_batch=1)


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


def test_the_stage_table_of_the_reference(reference: Plan) -> None:
    text = as_text(stage_table(reference))
    assert "KV cache" not in text  # nothing to say in prefill
    assert "training" not in text
    assert "device" not in text
    assert text.count("<- slowest") == 1
    first, middle, last = text.splitlines()[-3:]
    assert middle.split()[:3] == ["1", "..", "14"]
    assert middle.endswith("<- slowest")
    assert (first.split()[0], last.split()[0]) == ("0", "15")


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


def two_tiers() -> Cluster:
    base = device(1000)
    fast = MemoryTier(name="fast", capacity_bytes=31, bandwidth_bytes_per_second=100.0)
    return Cluster.homogeneous(dataclasses.replace(base, tiers=(fast, *base.tiers)), 2, FREE)


def test_a_bottleneck_is_called_least_only_if_no_partition_is_faster() -> None:
    """[1, 1, 1 | 9] takes 9 s, but 32 bytes don't fit the fast tier; [1, 1 | 1, 9] takes 10 s and does."""
    profile = ModelProfile.from_costs([1, 1, 1, 9], weight_bytes=[30, 1, 1, 1])
    plan = make_plan(profile, two_tiers(), ONE)
    best = evaluate(profile, two_tiers(), ONE, [0, 3, 4]).bottleneck_seconds
    assert best == 9
    assert plan.bottleneck_seconds == 10
    assert "least with every stage in fast" in str(summary(plan))
    assert any("[0, 3, 4] leave it" in note and "9.00 s" in note for note in plan.notes)


def test_a_bottleneck_is_called_least_only_if_it_was_the_objective() -> None:
    profile = ModelProfile.from_costs([9, 1, 1, 1], weight_bytes=[10, 10, 10, 10])
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    assert "proven to be the least with every stage in" in str(summary(make_plan(profile, cluster, ONE)))
    assert "least with every stage" not in str(summary(make_plan(profile, cluster, ONE, objective="memory")))


def test_a_plan_that_costs_nothing_can_be_summed_up() -> None:
    plan = evaluate(ModelProfile.from_costs([0, 0]), Cluster.homogeneous(device(1000), 1), ONE, [0, 2])
    assert "inf tokens/s" in str(summary(plan))


def test_as_text_has_no_colours_and_no_trailing_blanks(reference: Plan) -> None:
    text = report(reference)
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
