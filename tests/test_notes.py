"""What a plan's reader is told of tiers, micro-batches and the KV cache: true, and only where it applies."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import assume, given
from small_cases import FREE, ONE, device
from strategies import STEADY, clusters, cost_profiles, profiles, workloads

from lp_plugin import Cluster, LayerCost, MemoryTier, ModelProfile, Plan, Workload, make_plan
from lp_plugin.solver.solve import evaluate, solve
from lp_plugin.why.notes import plan_notes

DENSE16 = Path(__file__).parent.parent / "examples" / "dense16"


def said(plan: Plan, start: str) -> str:
    """The one note that starts so; empty if there is none."""
    found = [note for note in plan.notes if note.startswith(start)]
    assert len(found) <= 1
    return found[0] if found else ""


def blocks(*weights: int, tokens: float = 0.0) -> ModelProfile:
    layers = tuple(
        LayerCost(name=f"block {i}", kind="block", weight_bytes=size, weight_traffic_bytes=size, kv_bytes_per_token=4,
                  flops_per_token=1.0, output_bytes_per_token=tokens)
        for i, size in enumerate(weights)
    )  # fmt: skip
    return ModelProfile(name="blocks", layers=layers, dtype="float16", input_bytes_per_token=0.0)


def test_a_tier_that_holds_everything_is_named() -> None:
    plan = make_plan(blocks(40, 40), Cluster.homogeneous(device(50, 1000), 2, FREE), ONE)
    assert said(plan, "Tier ") == "Tier tier0: every stage's working set stays in the 50 B tier0."


def test_a_layer_larger_than_the_tier_is_named_with_the_factor() -> None:
    plan = make_plan(blocks(75, 40), Cluster.homogeneous(device(50, 1000), 2, FREE), ONE)
    assert said(plan, "Tier ") == (
        "Tier tier1: a layer weighs 75 B and is 1.5 x TIER0 (50 B), "
        "so no partition at this granularity can stay in TIER0."
    )


def test_a_stage_larger_than_the_tier_is_named_though_each_layer_fits() -> None:
    plan = make_plan(blocks(40, 40), Cluster.homogeneous(device(50, 1000), 1, FREE), ONE)
    assert said(plan, "Tier ") == (
        "Tier tier1: the largest working set is 80 B, of which the usable 50 B of TIER0 hold too little."
    )


def test_no_claim_on_all_partitions_if_another_device_has_a_larger_tier() -> None:
    other = dataclasses.replace(device(100, 1000), name="other")
    cluster = Cluster(devices=(device(50, 1000), other), links=(FREE,))
    note = said(make_plan(blocks(75, 75), cluster, ONE), "Tier ")
    assert "no partition" not in note
    assert note.startswith("Tier tier1: the largest working set is 75 B, of which the usable 50 B")


def test_nothing_is_said_of_tiers_where_there_is_one() -> None:
    assert not said(make_plan(blocks(40, 40), Cluster.homogeneous(device(1000), 2, FREE), ONE), "Tier ")


def gained(fast_rate: float, overhead: float) -> str:
    """The sentence on the cache for one stage that takes 100 s from its slow tier, and what it would take at best."""
    tiers = (
        MemoryTier(name="fast", capacity_bytes=50, bandwidth_bytes_per_second=fast_rate),
        MemoryTier(name="slow", capacity_bytes=1000, bandwidth_bytes_per_second=1.0),
    )
    where = dataclasses.replace(device(1000), tiers=tiers, layer_overhead_seconds=overhead)
    layer = LayerCost(name="layer 0", weight_bytes=100, weight_traffic_bytes=100, flops_per_token=1.0, kind="block")
    profile = ModelProfile(name="gained", layers=(layer,), dtype="float16", input_bytes_per_token=0.0)
    plan = make_plan(profile, Cluster.homogeneous(where, 1, FREE), ONE)
    assert plan.bottleneck_seconds == 100
    return said(plan, "The cache tier")


def test_a_cache_that_gains_next_to_nothing_can_not_matter() -> None:
    """The stage waits for its slow tier by a hair; from the fast one it would wait for what is named."""
    even = "The cache tier can't matter here: even if all data came from fast, the slowest stage would "
    assert gained(4.0, 99.0) == f"{even}be at most 2% faster; most of it is launch overhead."
    assert gained(1.01, 1.0) == f"{even}be at most 2% faster; most of it is fast bandwidth."
    assert gained(4.0, 99.95) == f"{even}take the same 1 min 40 s; most of it is launch overhead."
    assert gained(4.0, 97.0) == (
        "The cache tier could matter: if all data came from fast, the slowest stage would take "
        "1 min 37 s instead of 1 min 40 s (1.03x faster)."
    )


def test_a_batch_that_must_be_cut() -> None:
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    plan = make_plan(blocks(1, 1, tokens=10.0), cluster, Workload(batch=200, sequence=1, micro_batch=2))
    assert said(plan, "The batch must be cut") == (
        "The batch must be cut: in one piece its activations at a stage boundary are 2.00 kB, more than a device's "
        "1.00 kB. It is cut into 100 micro-batches of 2 (20 B of activations each); "
        f"the bubble is {plan.bubble_fraction:.1%}."
    )


def test_a_batch_that_is_cut() -> None:
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    plan = make_plan(blocks(1, 1, tokens=1.0), cluster, Workload(batch=20, sequence=1, micro_batch=2))
    note = said(plan, "The batch is cut")
    assert note == (
        f"The batch is cut into 10 micro-batches of 2 (2 B of activations each); "
        f"the bubble is {plan.bubble_fraction:.1%}."
    )
    whole = make_plan(blocks(1, 1), cluster, Workload(batch=20, sequence=1, micro_batch=20))
    assert not said(whole, "The batch")


@pytest.mark.parametrize(("output", "start"), [(1.0, "The batch is cut"), (10.0, "The batch must be cut")])
def test_nothing_is_said_of_a_bubble_in_one_stage(output: float, start: str) -> None:
    workload = Workload(batch=200, sequence=1, micro_batch=2)
    plan = make_plan(blocks(1, 1, tokens=output), Cluster.homogeneous(device(1000), 1, FREE), workload)
    assert said(plan, start).endswith(f"100 micro-batches of 2 ({2 * output:.0f} B of activations each).")


def test_room_for_one_sequence_is_singular() -> None:
    """80 bytes per sequence of 10; 200 bytes less 100 of weights leave room for 1."""
    cluster = Cluster.homogeneous(device(100), 2, FREE)
    plan = make_plan(blocks(50, 50), cluster, Workload(batch=30, sequence=10, micro_batch=1))
    assert said(plan, "Prefill").endswith("about 1 sequence would fit.")


def test_a_kv_cache_that_would_not_fit() -> None:
    """2 x 4 bytes per token, 80 per sequence of 10; 2000 bytes less 200 of weights leave room for 22."""
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    plan = make_plan(blocks(100, 100), cluster, Workload(batch=30, sequence=10, micro_batch=1))
    assert said(plan, "Prefill keeps no KV cache") == (
        "Prefill keeps no KV cache. Kept for decoding it would be 8 B per token, 2.40 kB for this batch, against "
        "2.00 kB of device memory: about 22 sequences would fit."
    )
    fits = make_plan(blocks(100, 100), cluster, Workload(batch=22, sequence=10, micro_batch=1))
    assert not said(fits, "Prefill")


def test_a_kv_cache_keeps_its_window() -> None:
    profile = blocks(100, 100)
    layers = tuple(dataclasses.replace(layer, kv_window=5) for layer in profile.layers)
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    workload = Workload(batch=50, sequence=10, micro_batch=1)
    plan = make_plan(dataclasses.replace(profile, layers=layers), cluster, workload)
    assert "2.00 kB for this batch" in said(plan, "Prefill")
    assert "about 45 sequences" in said(plan, "Prefill")


def test_shards_of_a_kv_cache_are_counted_together() -> None:
    profile = ModelProfile.from_config(DENSE16)
    workload = Workload(batch=1024, sequence=10_000, micro_batch=1)
    whole = make_plan(profile, Cluster.homogeneous("h100-sxm", 16), workload)
    sharded = make_plan(profile.sharded(8), Cluster.homogeneous("h100-sxm", 16).grouped(8), workload)
    assert said(sharded, "Prefill keeps no KV cache") == said(whole, "Prefill keeps no KV cache") != ""


@pytest.mark.parametrize("phase", ["decode", "train"])
def test_a_kv_cache_is_prefills_business(phase: str) -> None:
    cluster = Cluster.homogeneous(device(100_000), 2, FREE)
    workload = Workload(phase=phase, batch=30, sequence=10, micro_batch=1)  # type: ignore[arg-type]
    assert not said(make_plan(blocks(100, 100), cluster, workload), "Prefill")


def test_notes_on_boundaries_that_were_given_are_figures_alone() -> None:
    profile, cluster = blocks(40, 40), Cluster.homogeneous(device(50, 1000), 2, FREE)
    assert plan_notes(evaluate(profile, cluster, ONE, [0, 1, 2]), profile, cluster) == (
        "Tier tier0: every stage's working set stays in the 50 B tier0.",
    )


@STEADY
@given(profiles() | cost_profiles(), clusters(), workloads())
def test_the_note_on_tiers_agrees_with_the_stages(profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
    assume(len(cluster.devices) <= profile.num_layers)
    plan = solve(profile, cluster, workload)
    assume(plan is not None)
    assert plan is not None
    firsts = [where.tiers[0].name for where in cluster.devices]
    is_fast = [stage.tier for stage in plan.stages] == firsts
    note = said(dataclasses.replace(plan, notes=plan_notes(plan, profile, cluster)), "Tier ")
    assert ("every stage's working set stays" in note) == (is_fast and note != "")
    assert (note == "") == all(len(where.tiers) == 1 for where in cluster.devices)
