"""Why a plan is as fast as it is: every figure against all partitions, tried one by one."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from small_cases import FREE, ONE, chain, device, every_plan, keeps
from strategies import STEADY, clusters, cost_profiles, profiles, workloads

from lp_plugin import Cluster, LayerCost, Link, MemoryTier, ModelProfile, Plan, Workload, make_plan
from lp_plugin.objective import Constraints
from lp_plugin.quantity import format_seconds
from lp_plugin.solver.cost import stage_tables
from lp_plugin.solver.criteria import StageLimits, stage_limits
from lp_plugin.solver.solve import evaluate, solve
from lp_plugin.why.margins import NO_GAIN, PlanCase, fewest_devices, grown, head_room, least_seconds, slowest_parts
from lp_plugin.why.reasons import why_notes

DENSE16 = Path(__file__).parent.parent / "examples" / "dense16"
REFERENCE = Workload(batch=1024, sequence=10_000)


def case(plan: Plan | None, profile: ModelProfile, cluster: Cluster) -> PlanCase:
    assert plan is not None
    return PlanCase(plan, profile, cluster)


@STEADY
@given(profiles() | cost_profiles(), clusters(max_devices=3), workloads(), st.data())
def test_the_best_within_any_limits_is_that_of_all_partitions(
    profile: ModelProfile, cluster: Cluster, workload: Workload, data: st.DataObject
) -> None:
    assume(len(cluster.devices) <= profile.num_layers)
    plans = list(every_plan(profile, cluster, workload))
    middle = plans[len(plans) // 2]
    constraints = Constraints(
        max_latency_seconds=data.draw(st.sampled_from([None, middle.latency_seconds or None])),
        max_memory_bytes=data.draw(st.sampled_from([None, max(stage.memory_bytes for stage in middle.stages) or None])),
    )
    memory = data.draw(st.booleans())
    limits, total = stage_limits(constraints, workload)
    limits = limits if memory else dataclasses.replace(limits, memory_share=math.inf)
    found = least_seconds(stage_tables(profile, cluster, workload), profile.num_layers, limits, total)
    kept = [plan.bottleneck_seconds for plan in plans if keeps(plan, constraints, cluster, memory=memory)]
    assert found == min(kept, default=math.inf)


@STEADY
@given(profiles(tied=False) | cost_profiles(), clusters(roomy=True), workloads())
def test_the_slowest_stage_is_explained_to_the_last_second(
    profile: ModelProfile, cluster: Cluster, workload: Workload
) -> None:
    assume(len(cluster.devices) <= profile.num_layers)
    found = case(solve(profile, cluster, workload), profile, cluster)
    assert sum(slowest_parts(found).values()) == pytest.approx(found.plan.bottleneck_seconds, rel=1e-9, abs=1e-9)


def test_positions_that_take_as_long_share_a_table_and_others_do_not() -> None:
    """The last of equal devices has nobody to send to; in training each has other memory."""
    wire = dataclasses.replace(FREE, latency_seconds=5.0)
    profile, cluster = ModelProfile.from_costs([1, 1, 1, 9]), Cluster.homogeneous(device(1000), 4, wire)
    workload = Workload(phase="train", batch=4, sequence=1, micro_batch=1)
    found = PlanCase(evaluate(profile, cluster, workload, [0, 1, 2, 3, 4]), profile, cluster)
    assert len({id(table) for table in found.tables}) == 4
    assert found.alike == [found.tables[position] for position in (0, 1, 1, 3)]
    free = StageLimits(memory_share=math.inf)
    assert least_seconds(found.alike, 4, free) == least_seconds(found.tables, 4, free) == 27 + 2 * 5


def bound_by(**costs: float) -> dict[str, float]:
    """Parts of a one-layer stage on a device with 8 bytes/s, 1 FLOP/s and a launch overhead of 3 s."""
    slow = dataclasses.replace(device(1000), layer_overhead_seconds=3.0)
    layer = LayerCost(name="block 0", kind="block", **costs)  # type: ignore[arg-type]
    profile = ModelProfile(name="one", layers=(layer,), dtype="float16", input_bytes_per_token=0.0)
    cluster = Cluster.homogeneous(slow, 1)
    return slowest_parts(case(solve(profile, cluster, ONE), profile, cluster))


def test_each_cause_is_named() -> None:
    assert bound_by(flops_per_token=5.0, traffic_bytes_per_token=32.0) == {"compute": 5.0}
    assert bound_by(flops_per_token=5.0, traffic_bytes_per_token=48.0) == {"tier0 bandwidth": 6.0}
    assert bound_by(flops_per_token=2.0, traffic_bytes_per_token=8.0) == {"launch overhead": 3.0}
    assert bound_by(flops_per_token=2.0, seconds=7.0) == {"measured layers": 7.0}


def test_transfers_and_all_reduces_are_named() -> None:
    link = Link(name="wire", bandwidth_bytes_per_second=1.0, latency_seconds=0.0, collective_efficiency=1.0)
    layers = tuple(
        LayerCost(
            name=f"block {i}",
            flops_per_token=4.0,
            output_bytes_per_token=2.0,
            num_all_reduces=1,
            all_reduce_bytes_per_token=3.0,
        )
        for i in range(2)
    )
    profile = ModelProfile(name="two", layers=layers, dtype="float16", input_bytes_per_token=0.0, tensor_parallel=2)
    cluster = Cluster(devices=(device(1000),) * 2, links=(link,), group_size=2, group_links=(link,) * 2)
    found = slowest_parts(case(solve(profile, cluster, ONE), profile, cluster))
    assert found == pytest.approx({"compute": 4.0, "all-reduces": link.all_reduce_seconds(3.0, 2), "transfers": 2.0})


@STEADY
@given(profiles() | cost_profiles(), clusters(equal=True, roomy=True), workloads(phase="prefill"))
def test_no_fewer_devices_do(profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
    assume(len(cluster.devices) <= profile.num_layers)
    found = case(solve(profile, cluster, workload), profile, cluster)
    best = {
        count: min(plan.bottleneck_seconds for plan in every_plan(profile, cluster.subset(count), workload))
        for count in range(1, len(cluster.devices) + 1)
    }
    boundaries, seconds = fewest_devices(found)
    few = len(boundaries) - 1
    assert evaluate(profile, cluster.subset(few), workload, boundaries).bottleneck_seconds == seconds
    enough = found.plan.bottleneck_seconds * (1 + NO_GAIN)
    assert seconds == best[few] <= enough
    assert few == 1 or best[few - 1] > enough


def test_more_devices_are_packed_as_the_catalogue_does() -> None:
    eight = Cluster.homogeneous("h100-sxm", 8)
    assert grown(eight, 9) == Cluster.homogeneous("h100-sxm", 9)
    assert grown(Cluster.homogeneous("h100-sxm", 1), 2) == Cluster.homogeneous("h100-sxm", 2)


def test_more_devices_of_ones_own_repeat_the_last_link() -> None:
    fast, slow = FREE, dataclasses.replace(FREE, name="slow", latency_seconds=1.0)
    other = dataclasses.replace(device(7), name="other")
    larger = grown(Cluster(devices=(device(9), device(9), other), links=(fast, slow)), 5)
    assert larger == Cluster(devices=(device(9), device(9), other, other, other), links=(fast, slow, slow, slow))
    assert grown(Cluster.homogeneous(device(9), 1), 2) is None
    grouped = grown(Cluster.homogeneous("h100-sxm", 8).grouped(2), 6)
    assert grouped is not None
    assert (len(grouped.devices), len(grouped.links), len(grouped.group_links)) == (6, 5, 6)


def assert_head_room(found: PlanCase, plans: list[Plan], head: int) -> None:
    """Up to the figure the plan is best of all, beyond it another is better; and so for the present speed."""
    room = head_room(found)
    assert room is not None

    def slowest(plan: Plan, added: float) -> float:
        holds = [stage.start <= head < stage.stop for stage in plan.stages]
        return max(stage.seconds + added * held for stage, held in zip(plan.stages, holds, strict=True))

    grid = [step / 4 for step in range(400)]
    room_left, free = room.most_seconds - room.seconds, room.free_seconds - room.seconds
    grid += [value for value in (room_left, free, room_left + 1e-6, free + 1e-6) if math.isfinite(value)]
    for added in grid:
        best = min(slowest(plan, added) for plan in plans)
        assert (slowest(found.plan, added) == best) == (added <= room_left), added
        assert (best <= found.plan.bottleneck_seconds) == (added <= free), added


@STEADY
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=6),
    st.integers(0, 30),
    st.integers(2, 4),
    st.lists(st.integers(0, 4), min_size=6, max_size=6),
    st.booleans(),
)
def test_the_heads_room_against_a_grid(
    blocks: list[int], head: int, stages: int, outputs: list[int], is_first: bool
) -> None:
    assume(stages <= len(blocks) + 1)
    profile = chain([float(block) for block in blocks], float(head), [float(value) for value in outputs])
    if is_first:
        profile = dataclasses.replace(profile, layers=profile.layers[::-1])
    cluster = Cluster.homogeneous(device(1000), stages, FREE)
    found = case(solve(profile, cluster, ONE), profile, cluster)
    assert_head_room(found, list(every_plan(profile, cluster, ONE)), 0 if is_first else len(blocks))


@STEADY
@given(profiles(min_layers=2, tied=False), clusters(roomy=True), workloads())
def test_the_heads_room_with_tiers_memory_and_unequal_devices(
    profile: ModelProfile, cluster: Cluster, workload: Workload
) -> None:
    assume(2 <= len(cluster.devices) <= profile.num_layers)
    kinds = ["block"] * (profile.num_layers - 1) + ["head"]
    layers = tuple(
        dataclasses.replace(layer, kind=kind, block=None if kind == "head" else i)
        for i, (layer, kind) in enumerate(zip(profile.layers, kinds, strict=True))
    )
    profile = dataclasses.replace(profile, layers=layers)
    found = case(solve(profile, cluster, workload), profile, cluster)
    plans = [plan for plan in every_plan(profile, cluster, workload) if keeps(plan, Constraints(), cluster)]
    assert_head_room(found, plans, profile.num_layers - 1)


def test_a_costlier_head_really_changes_the_plan() -> None:
    """[3 | 3 | 3 + head] stays best until the head costs 3: then [3 3 | 3 | head] takes 6, too."""
    cluster = Cluster.homogeneous(device(1000), 3, FREE)
    plan = make_plan(chain([3.0] * 3, 1.0), cluster, ONE)
    note = "These boundaries stay optimal until the head costs 1 block (now 0.33; a block takes 3.00 s)."
    assert note in plan.notes
    for head in (1.0, 2.0, 3.0):
        assert make_plan(chain([3.0] * 3, head), cluster, ONE).bottleneck_seconds == 3 + head
    assert make_plan(chain([3.0] * 3, 3.5), cluster, ONE).boundaries != plan.boundaries


def test_a_head_of_its_own_stage_may_cost_what_it_will() -> None:
    plan = make_plan(chain([3.0, 3.0], 5.0), Cluster.homogeneous(device(1000), 3, FREE), ONE)
    assert any(note.startswith("These boundaries stay optimal whatever the head costs") for note in plan.notes)


def test_nothing_is_said_of_the_head_where_it_makes_no_sense() -> None:
    profile, cluster = chain([3.0, 2.0], 5.0), Cluster.homogeneous(device(1000), 2, FREE)
    for options in (
        {"objective": "memory"},
        {"constraints": Constraints(max_latency_seconds=99.0)},
        {"num_stages": 1},
    ):
        notes = make_plan(profile, cluster, ONE, **options).notes  # type: ignore[arg-type]
        assert not any("the head" in note for note in notes)
    plain = ModelProfile.from_costs([1, 2, 3])
    assert not any("head" in note for note in make_plan(plain, cluster, ONE).notes)


def test_memory_that_binds_is_named_with_what_it_costs() -> None:
    """[9 | 1 1 1] takes 9 s, but 180 bytes; [9 1 | 1 1] takes 10 s and fits in 130."""
    profile = ModelProfile.from_costs([9, 1, 1, 1], weight_bytes=[10, 60, 60, 60])
    cluster = Cluster.homogeneous(device(130), 2, FREE)
    plan = make_plan(profile, cluster, ONE)
    free = least_seconds(stage_tables(profile, cluster, ONE), 4, StageLimits(memory_share=math.inf))
    assert (plan.bottleneck_seconds, free) == (10.0, 9.0)
    note = "What binds: without the memory limit the slowest stage would take 9.00 s instead of 10.0 s."
    assert note in plan.notes


def test_a_constraint_that_binds_is_named_and_others_are_not() -> None:
    profile = ModelProfile.from_costs([9, 1, 1, 1], weight_bytes=[10, 60, 60, 60])
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    bounds = Constraints(max_memory_bytes=130, min_tokens_per_second=0.001)
    notes = make_plan(profile, cluster, ONE, constraints=bounds).notes
    binding = [note for note in notes if note.startswith("What binds")]
    assert binding == [
        "What binds: without 'at most 130 B per device' the slowest stage would take 9.00 s instead of 10.0 s."
    ]


def test_limits_that_only_bind_together_are_named_together() -> None:
    profile = ModelProfile.from_costs([9, 1, 1, 1], weight_bytes=[10, 60, 60, 60])
    cluster = Cluster.homogeneous(device(130), 2, FREE)
    notes = make_plan(profile, cluster, ONE, constraints=Constraints(max_memory_bytes=130)).notes
    assert any("without the memory limit and all constraints the slowest stage would take 9.00 s" in n for n in notes)


def test_no_limit_is_blamed_where_none_binds() -> None:
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    free = make_plan(ModelProfile.from_costs([1, 2, 3]), cluster, ONE).notes
    assert "Memory does not hold it back: without limits no partition is faster by 0.1%." in free
    bounded = make_plan(ModelProfile.from_costs([1, 2, 3]), cluster, ONE, constraints=Constraints(max_memory_bytes=9))
    assert (
        "Neither memory nor a constraint holds it back: without limits no partition is faster by 0.1%." in bounded.notes
    )


def test_the_price_of_another_objective_is_said() -> None:
    profile = ModelProfile.from_costs([9, 1, 1, 1], weight_bytes=[10, 10, 10, 10])
    cluster = Cluster.homogeneous(device(1000), 2, FREE)
    notes = make_plan(profile, cluster, ONE, objective="memory").notes
    assert "Planned for memory; planned for throughput, the slowest stage would take 9.00 s instead of 10.0 s." in notes
    even = make_plan(ModelProfile.from_costs([1, 1], weight_bytes=[5, 5]), cluster, ONE, objective="memory").notes
    assert "Planned for memory, and no slower than if planned for throughput." in even


def cached(fast_rate: float, *, flops: float) -> tuple[str, Plan]:
    """The sentence on the cache for two layers of 40 bytes and a fast tier of 50, on two devices."""
    tiers = (
        MemoryTier(name="fast", capacity_bytes=50, bandwidth_bytes_per_second=fast_rate),
        MemoryTier(name="slow", capacity_bytes=1000, bandwidth_bytes_per_second=1.0),
    )
    where = dataclasses.replace(device(1000), tiers=tiers)
    layers = tuple(
        LayerCost(name=f"layer {i}", weight_bytes=40, weight_traffic_bytes=40, flops_per_token=flops) for i in range(4)
    )
    profile = ModelProfile(name="cached", layers=layers, dtype="float16", input_bytes_per_token=0.0)
    plan = make_plan(profile, Cluster.homogeneous(where, 2 if flops else 4, FREE), ONE)
    return next(note for note in plan.notes if "cache tier" in note), plan


def test_what_the_cache_tier_can_do() -> None:
    note, _ = cached(4.0, flops=1.0)
    assert note == (
        "The cache tier could matter: if all data came from fast, the slowest stage would take "
        "20.0 s instead of 1 min 20 s (4.00x faster)."
    )
    note, _ = cached(4.0, flops=500.0)
    assert note.startswith("The cache tier can't matter here: even if all data came from fast")
    assert note.endswith("the same 16 min 40 s; most of it is compute.")
    note, plan = cached(4.0, flops=0.0)
    assert {stage.tier for stage in plan.stages} == {"fast"}
    assert note == (
        "The cache tier matters: if no stage's data stayed in fast, the slowest stage would take "
        "40.0 s instead of 10.0 s (4.00x)."
    )


def test_nothing_is_said_of_a_cache_that_measured_seconds_do_not_know() -> None:
    two = device(100, 1000)
    notes = make_plan(ModelProfile.from_costs([1, 2]), Cluster.homogeneous(two, 2, FREE), ONE).notes
    assert not any("cache tier" in note for note in notes)


@pytest.mark.parametrize("count", [8, 12, 16])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_what_the_next_device_buys_is_what_it_gives(count: int, phase: str) -> None:
    profile = ModelProfile.from_config(DENSE16)
    workload = Workload(phase=phase, batch=64, sequence=10_000, micro_batch=4)  # type: ignore[arg-type]
    plan = make_plan(profile, Cluster.homogeneous("h100-sxm", count), workload)
    more = make_plan(profile, Cluster.homogeneous("h100-sxm", count + 1), workload)
    (note,) = [note for note in plan.notes if note.startswith("One more h100-sxm, micro-batch as now: ")]
    assert format_seconds(more.bottleneck_seconds) in note
    gain = more.tokens_per_second / plan.tokens_per_second - 1
    rate = more.tokens_per_second if abs(gain) >= 0.001 else plan.tokens_per_second
    assert f"{rate:,.0f} tokens/s" in note


def test_the_next_device_is_judged_by_the_objective() -> None:
    profile, cluster = ModelProfile.from_config(DENSE16), Cluster.homogeneous("h100-sxm", 8)
    workload = Workload(phase="decode", batch=16, sequence=10_000, micro_batch=1)
    for objective, words in (
        ("latency", "latency "),
        ("sequences", "room for "),
        ("memory", "fullest device "),
    ):
        notes = make_plan(profile, cluster, workload, objective=objective).notes  # type: ignore[arg-type]
        assert any(note.startswith(f"One more h100-sxm, micro-batch as now: {words}") for note in notes)


def test_a_device_more_than_layers_is_not_offered() -> None:
    plan = make_plan(ModelProfile.from_costs([1, 2]), Cluster.homogeneous(device(1000), 2, FREE), ONE)
    assert not any("One more" in note for note in plan.notes)


def test_one_more_device_may_break_a_constraint() -> None:
    wire = dataclasses.replace(FREE, latency_seconds=5.0)
    cluster = Cluster.homogeneous(device(1000), 2, wire)
    bounds = Constraints(max_latency_seconds=20.0)
    notes = make_plan(ModelProfile.from_costs([1, 2, 3]), cluster, ONE, constraints=bounds).notes
    assert (
        "One more own, micro-batch as now: no partition over 3 stages keeps to the memory and the constraints." in notes
    )


def test_notes_on_the_reference() -> None:
    profile = ModelProfile.from_config(DENSE16)
    sixteen = "\n".join(make_plan(profile, Cluster.homogeneous("h100-sxm", 16), REFERENCE).notes)
    assert "It holds a single layer, which no partition at this granularity can split." in sixteen
    assert "% compute" in sixteen
    assert "The cache tier can't matter here: even if all data came from l2" in sixteen
    assert "Memory does not hold it back" in sixteen
    assert "stay optimal until the head costs 0.999 blocks" in sixteen
    twelve = "\n".join(make_plan(profile, Cluster.homogeneous("h100-sxm", 12), REFERENCE).notes)
    assert "single layer" not in twelve
    assert "12 devices gain nothing over 8 at this granularity" in twelve


def test_a_given_plan_is_not_explained_and_a_free_one_needs_no_devices() -> None:
    profile, cluster = ModelProfile.from_costs([1, 2]), Cluster.homogeneous(device(1000), 2, FREE)
    assert why_notes(evaluate(profile, cluster, ONE, [0, 1, 2]), profile, cluster) == ()
    free = ModelProfile.from_costs([0, 0])
    assert why_notes(make_plan(free, cluster, ONE), free, cluster) == (
        "2 devices gain nothing over 1 at this granularity: the slowest stage takes 0 s against 0 s (+0.00%).",
    )


@STEADY
@given(profiles() | cost_profiles(), clusters(), workloads(), st.sampled_from(["throughput", "latency", "memory"]))
def test_any_plan_can_be_explained(profile: ModelProfile, cluster: Cluster, workload: Workload, objective: str) -> None:
    assume(len(cluster.devices) <= profile.num_layers)
    plan = solve(profile, cluster, workload, objective)  # type: ignore[arg-type]
    assume(plan is not None)
    assert plan is not None
    for note in why_notes(plan, profile, cluster):
        assert note.endswith(".")
        assert "nan" not in note.split()


def test_a_very_large_chain_is_not_solved_again_and_says_so() -> None:
    profile, cluster = ModelProfile.from_costs([1.0] * 7000), Cluster.homogeneous(device(1000), 3, FREE)
    plan = dataclasses.replace(evaluate(profile, cluster, ONE, [0, 2333, 4666, 7000]), objective="throughput")
    notes = why_notes(plan, profile, cluster)
    assert notes[0].startswith("Stage 2 (layer 4666 to layer 6999 on own) is the slowest with 38 min 54 s")
    assert notes[-1] == "Limits, devices and the head are not tried one by one for a chain of this size."
