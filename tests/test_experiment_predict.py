"""Boundaries and predictions of experiments, against plain loops and simulated events."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import all_cuts, simulate, simulate_overlapped
from strategies import STEADY
from timed_cases import FOUR, LINKS, a_case, of_stages, some_times, the_timed

from lp_plugin import Cluster, Workload
from lp_plugin.bench.experiment.choose import boundaries_of
from lp_plugin.bench.experiment.costs import counted_profile, links_of, pick_times
from lp_plugin.bench.experiment.message_costs import Messages
from lp_plugin.bench.experiment.predict import flops_and_traffic, link_bytes, memory, predictions
from lp_plugin.bench.experiment.settings import Configuration
from lp_plugin.errors import InfeasibleError, WorkloadError
from lp_plugin.measured import Links
from lp_plugin.solver.solve import evaluate

# messages


@pytest.mark.parametrize(("num_bytes", "seconds"), [(0, 30e-6), (1024, 30e-6), (65536, 40e-6), (32 * 2**20, 160e-6)])
def test_messages_are_looked_up(num_bytes: int, seconds: float) -> None:
    assert Messages(cluster=FOUR, links=LINKS).send_seconds(FOUR.links[1], num_bytes) == pytest.approx(seconds)


@STEADY
@given(st.integers(1, 2**26), st.integers(1, 2**26))
def test_larger_messages_take_no_less(first: int, second: int) -> None:
    messages, link = Messages(cluster=FOUR, links=LINKS), FOUR.links[0]
    small, large = sorted([first, second])
    assert messages.send_seconds(link, small) <= messages.send_seconds(link, large)
    assert messages.reduce_seconds(link, small, 8) <= messages.reduce_seconds(link, large, 8)


def test_all_reduces_over_more_ranks_follow_the_ring() -> None:
    messages, link = Messages(cluster=FOUR, links=LINKS), FOUR.links[0]
    assert messages.reduce_seconds(link, 65536, 2) == pytest.approx(50e-6)
    assert messages.reduce_seconds(link, 65536 / 1.5, 4) == pytest.approx(50e-6)  # 3/4 of it over each link, not 1/2
    assert messages.reduce_seconds(link, 65536, 1) == 0.0


def test_all_reduces_of_a_group_are_those_of_its_size() -> None:
    """Over two of four ranks as timed over two, not as the ring's formula has it from four."""
    four = dataclasses.replace(LINKS, ranks=4, reduce_seconds=(4e-3, 5e-3, 12e-3), send_seconds=(1e-3, 2e-3, 3e-3))
    link = FOUR.links[0]
    for ranks, seconds in ((2, 50e-6), (3, 5e-3), (4, 5e-3)):
        links = links_of(four, [LINKS], ranks)
        size = 65536 * (3 / 4) / (2 / 3) if ranks == 3 else 65536
        messages = Messages(cluster=FOUR, links=links)
        assert messages.reduce_seconds(link, size, ranks) == pytest.approx(seconds)
        assert messages.send_seconds(link, 65536) == pytest.approx(2e-3)
    assert links_of(four, (), 2) == four


def test_a_group_of_some_ranks_is_predicted_by_its_own_all_reduces() -> None:
    case, times, text = a_case(), [some_times(a_case(), 2)], "tp=2 pp=2"
    four = dataclasses.replace(LINKS, ranks=4, reduce_seconds=tuple(1e-3 + each for each in LINKS.reduce_seconds))
    wide = the_timed(case, text, (0, 4, 8), times, four).stage_seconds
    own = the_timed(case, text, (0, 4, 8), times, links_of(four, [LINKS], 2)).stage_seconds
    hidden_bytes = 2 * 128 * 1024 * 2
    reducing = Messages(cluster=FOUR, links=LINKS).reduce_seconds(FOUR.links[0], hidden_bytes, 2)
    counts, layers = [1, *[2] * 5, 0, 0], times[0].seconds
    assert own == pytest.approx(of_stages([a + n * reducing for a, n in zip(layers, counts, strict=True)], (0, 4, 8)))
    assert all(more > less for more, less in zip(wide, own, strict=True))


def test_other_links_and_none_measured_are_the_clusters_own() -> None:
    nodes = Cluster.homogeneous("h200", 16)
    inside, between = nodes.links[0], nodes.links[7]
    measured, plain = Messages(cluster=nodes, links=LINKS), Messages(cluster=nodes)
    assert measured.measures(inside)
    assert not measured.measures(between)
    assert measured.send_seconds(between, 4096) == between.seconds(4096)
    assert measured.reduce_seconds(between, 4096, 16) == between.all_reduce_seconds(4096, 16)
    assert plain.send_seconds(inside, 4096) == inside.seconds(4096)


# where it cuts


def test_timed_layers_are_picked_by_execution() -> None:
    case = a_case()
    eager, graphs = some_times(case, execution="eager", scale=2e-4), some_times(case)
    wide = some_times(case, 2)
    both = [eager, graphs, wide]
    assert [pick_times(both, 1, each) for each in ("eager", "stock", "graphs", "auto")] == [
        eager,
        eager,
        graphs,
        graphs,
    ]
    assert pick_times(both, 1, "compiled") is graphs
    assert pick_times(both, 2, "auto") is wide
    assert pick_times(both, 4, "auto") is None
    assert pick_times(both, 1, "auto", "sublayer") is None


def test_deepspeeds_own_methods_give_its_boundaries() -> None:
    from deepspeed.runtime.utils import partition_balanced, partition_uniform

    case = a_case(blocks=7)
    for stages in (2, 3, 4):
        counted = [layer.parameters for layer in case.profile().layers]
        balanced = boundaries_of(case, Configuration.parse(f"pp={stages} parameters"), (), Links(), FOUR)
        assert balanced == tuple(partition_balanced(counted, stages))
        assert {type(bound) for bound in balanced} == {int}
        uniform = boundaries_of(case, Configuration.parse(f"pp={stages} uniform"), (), Links(), FOUR)
        assert uniform == tuple(partition_uniform(len(counted), stages))
    with pytest.raises(WorkloadError, match="leave a stage empty"):
        boundaries_of(case, Configuration.parse("pp=64 parameters"), (), Links(), FOUR)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("text", ["pp=2", "pp=3", "pp=4", "tp=2 pp=2"])
def test_cache_aware_has_the_fastest_slowest_stage(text: str, phase: str) -> None:
    case, configuration = a_case(phase, hidden=2048), Configuration.parse(text)
    ranks = configuration.strategy.tensor_parallel
    times = [some_times(case, 1), some_times(case, ranks)]
    found = boundaries_of(case, configuration, times, LINKS, FOUR)
    expected = [
        max(the_timed(case, text, cuts, times).stage_seconds)
        for cuts in all_cuts(case.profile().num_layers, configuration.strategy.pipeline_parallel)
    ]
    assert max(the_timed(case, text, found, times).stage_seconds) == pytest.approx(min(expected))


def test_a_stage_that_fits_the_cache_is_worth_a_cut_elsewhere() -> None:
    """A block of 25 MB stays in the L2 of 60 MB, two do not: three blocks in two stages are cut off the fast one."""
    case = a_case(blocks=3, batch=4, micro_batch=1, sequence=16)
    times = some_times(case)
    near = dataclasses.replace(times, resident_seconds=tuple(each / 8 for each in times.seconds))
    pipeline = Configuration.parse("pp=3")
    assert boundaries_of(case, pipeline, [near], LINKS, FOUR) == (0, 2, 3, 6)
    alone = the_timed(case, "pp=3", (0, 2, 3, 6), [near]).stage_seconds
    assert alone == pytest.approx([each / 8 for each in of_stages(times.seconds, (0, 2, 3, 6))])
    together = the_timed(case, "pp=2", (0, 3, 6), [near]).stage_seconds
    assert together == pytest.approx(
        [of_stages(times.seconds, (0, 3, 6))[0], of_stages(times.seconds, (0, 3, 6))[1] / 8]
    )


def test_only_blocking_hops_move_the_cut() -> None:
    """Of five equal layers in three stages the middle one, which waits for two hops, gets fewer."""
    case = a_case(blocks=16)
    slow = dataclasses.replace(LINKS, send_seconds=(1.0, 1.0, 1.0))
    far = dataclasses.replace(FOUR, links=(dataclasses.replace(FOUR.links[0], latency_seconds=2e-4),) * 3)
    ours = boundaries_of(case, Configuration.parse("pp=4"), [some_times(case)], slow, far)
    stock = boundaries_of(case, Configuration.parse("pp=4 stock"), [some_times(case)], slow, far)
    sizes = [stop - start for start, stop in itertools.pairwise(stock)]
    assert ours == boundaries_of(case, Configuration.parse("pp=4"), [some_times(case)], LINKS, FOUR)
    assert max(sizes[1:3]) < min(sizes[0], sizes[3])


def test_without_times_the_catalogue_decides() -> None:
    case = a_case(blocks=8)
    assert boundaries_of(case, Configuration.parse("pp=2"), (), Links(), FOUR)[1] in {5, 6}
    with pytest.raises(InfeasibleError):
        boundaries_of(a_case(hidden=65536, blocks=64), Configuration.parse("pp=2"), (), Links(), FOUR)


# what it takes


@pytest.mark.parametrize(("text", "micro_batches"), [("pp=3", 6), ("dp=2 pp=2", 3), ("tp=2 pp=2", 6), ("dp=4", 2)])
def test_prefill_is_as_simulated_from_timed_layers(text: str, micro_batches: int) -> None:
    case, configuration = a_case(), Configuration.parse(text)
    ranks = configuration.strategy.tensor_parallel
    times = some_times(case, ranks)
    boundaries = boundaries_of(case, configuration, [times], LINKS, FOUR)
    made = the_timed(case, text, boundaries, [times])
    hidden_bytes = 2 * 128 * 1024 * 2
    messages = Messages(cluster=FOUR, links=LINKS)
    reducing = messages.reduce_seconds(FOUR.links[0], hidden_bytes, ranks) if ranks > 1 else 0.0
    counts = [1, *[2] * 5, 0, 0]
    layers = [own + count * reducing for own, count in zip(times.seconds, counts, strict=True)]
    stages = of_stages(layers, boundaries)
    hops = [messages.send_seconds(FOUR.links[0], hidden_bytes)] * (len(stages) - 1)
    assert made.stage_seconds == pytest.approx(stages)
    assert made.hop_seconds == pytest.approx(hops)
    expected = max(passage.stop for passage in simulate_overlapped(stages, hops, micro_batches))
    assert made.seconds == pytest.approx(expected)


def test_long_messages_are_received_between_passes() -> None:
    case = a_case(batch=8, sequence=2048)
    times = some_times(case)
    found = the_timed(case, "pp=3", (0, 3, 5, 8), [times])
    hop = Messages(cluster=FOUR, links=LINKS).send_seconds(FOUR.links[0], 2 * 2048 * 1024 * 2)
    first, *others = of_stages(times.seconds, (0, 3, 5, 8))
    slower = [first, *(own + hop for own in others)]
    assert found.seconds == pytest.approx(max(visit.stop for visit in simulate(slower, 4)))
    assert found.stage_seconds == pytest.approx([first, *others])


@pytest.mark.parametrize(("text", "slots"), [("1", 6), ("pp=4", 6), ("dp=4 pp=1", 2), ("pp=3", 6), ("dp=2 pp=2", 3)])
def test_decode_is_the_pace_of_a_ring_that_never_drains(text: str, slots: int) -> None:
    case, configuration = a_case("decode", new_tokens=41), Configuration.parse(text)
    times = some_times(case)
    boundaries = boundaries_of(case, configuration, [times], LINKS, FOUR)
    made = the_timed(case, text, boundaries, [times])
    messages = Messages(cluster=FOUR, links=LINKS)
    hops = [messages.send_seconds(FOUR.links[0], 2 * 1024 * 2)] * (len(boundaries) - 2)
    back = [messages.send_seconds(FOUR.links[0], 16)] if hops else [0.0]
    stages = of_stages(times.seconds, boundaries)
    turns = [own + before for own, before in zip(stages, [*back, *hops], strict=True)]
    early, late = (max(visit.stop for visit in simulate(turns, slots, rounds)) for rounds in (40, 80))
    assert made.stage_seconds == pytest.approx(stages)
    assert made.seconds == pytest.approx(late - early)


def test_every_stage_has_its_own_pass_beside_its_layers() -> None:
    case = a_case()
    times = some_times(case)
    slow = dataclasses.replace(times, pass_seconds=7e-5)
    plain, longer = (the_timed(case, "pp=3", (0, 3, 5, 8), [each]).stage_seconds for each in (times, slow))
    assert longer == pytest.approx([each + 7e-5 for each in plain])


@pytest.mark.parametrize(("text", "cores"), [("pp=4", 1), ("dp=4", 2), ("tp=4", 1), ("pp=4", 8)])
def test_cores_that_processes_share_have_all_their_work(text: str, cores: int) -> None:
    """Six micro-batches; replicas have two each."""
    case, configuration, times = a_case(), Configuration.parse(text), [some_times(a_case()), some_times(a_case(), 4)]
    boundaries = boundaries_of(case, configuration, times, LINKS, FOUR)
    *_, alone = predictions(case, configuration, boundaries, times, LINKS, FOUR, None, "eager")
    *_, shared = predictions(case, configuration, boundaries, times, LINKS, FOUR, None, "eager", cores=cores)
    passes = {"pp=4": 6, "dp=4": 4 * 2, "tp=4": 4 * 6}[text]
    assert shared.seconds == pytest.approx(max(alone.seconds, passes * sum(alone.stage_seconds) / cores))
    assert (shared.seconds > alone.seconds) == (cores < 4)
    assert shared.stage_seconds == alone.stage_seconds


def test_the_catalogues_stock_schedule_is_the_plans_own() -> None:
    case, configuration = a_case(hidden=4096), Configuration.parse("pp=4 stock")
    boundaries = (0, 2, 4, 6, 8)
    catalogue, calibrated = predictions(case, configuration, boundaries, (), Links(), FOUR, FOUR, "stock")
    plan = evaluate(case.profile(), FOUR, Workload(batch=12, sequence=128, micro_batch=2), boundaries)
    assert catalogue.seconds == pytest.approx(plan.makespan_seconds)
    assert calibrated == dataclasses.replace(catalogue, source="calibrated")
    assert catalogue.hop_seconds == pytest.approx([FOUR.links[0].seconds(2 * 128 * 4096 * 2)] * 3)


def test_timed_layers_say_nothing_of_deepspeeds_own_passes() -> None:
    """They run transformers' kernels, more of them than layers are timed with."""
    case, times = a_case(), [some_times(a_case())]
    for execution, sources in (("stock", {"catalogue"}), ("eager", {"catalogue", "timed layers"})):
        found = predictions(
            case, Configuration.parse(f"pp=2 {execution}"), (0, 4, 8), times, LINKS, FOUR, None, execution
        )
        assert {each.source for each in found} == sources


def test_a_calibration_of_too_few_devices_is_left_out() -> None:
    case, two = a_case(), Cluster.homogeneous("h200", 2)
    found = predictions(case, Configuration.parse("pp=4"), (0, 2, 4, 6, 8), (), Links(), FOUR, two, "auto")
    assert [each.source for each in found] == ["catalogue"]


def test_replayed_launches_are_expected_where_they_are_replayed() -> None:
    """16 tokens of hidden size 1024: launching a block takes 290 us, replaying it 140, compiled 115."""
    case, configuration = a_case(batch=2, micro_batch=1, sequence=16), Configuration.parse("1")
    taken = {}
    for execution in ("eager", "stock", "graphs", "auto", "compiled"):
        [made] = predictions(case, configuration, (0, 8), (), Links(), FOUR, None, execution)
        taken[execution] = made.stage_seconds[0]
    assert taken["eager"] == taken["stock"] > taken["graphs"] == taken["auto"] > taken["compiled"]


# what it amounts to


def test_operations_are_the_models_whoever_does_them() -> None:
    case = a_case(batch=10)
    counted = {
        text: flops_and_traffic(case, Configuration.parse(text), boundaries, FOUR)
        for text, boundaries in {"1": (0, 8), "tp=2": (0, 8), "dp=4": (0, 8), "pp=2": (0, 4, 8)}.items()
    }
    weights = 12 * 1024**2 * 5 + 1024 * 264
    pairs = 128 * 129 // 2
    assert {flops for flops, _ in counted.values()} == {10 * (2 * weights * 128 + 4 * pairs * 1024 * 5)}
    assert counted["pp=2"][1] == pytest.approx(counted["1"][1], rel=0.05)
    one, four = counted["1"][1], counted["dp=4"][1]
    assert four > one  # shares of 3, 3, 2 and 2 sequences in micro-batches of 2: six, not five, read the weights


def test_what_stays_in_the_cache_is_not_fetched() -> None:
    """A block of 25 MB on a device of its own, and two that take turns on another."""
    case = a_case(blocks=3, batch=4, micro_batch=1, sequence=16)
    _, apart = flops_and_traffic(case, Configuration.parse("pp=3"), (0, 2, 3, 6), FOUR)
    _, pair = flops_and_traffic(case, Configuration.parse("pp=2"), (0, 3, 6), FOUR)
    assert apart == 0
    assert 2 * 12 * 1024**2 * 2 * 4 < pair < 2.1 * 12 * 1024**2 * 2 * 4


def test_decoding_counts_the_tokens_after_the_first() -> None:
    short, long = a_case("decode", sequence=120, new_tokens=9), a_case("decode", sequence=112, new_tokens=17)
    first, second = (flops_and_traffic(case, Configuration.parse("1"), (0, 8), FOUR) for case in (short, long))
    assert second[0] == pytest.approx(2 * first[0])
    assert second[1] == pytest.approx(2 * first[1])


def test_bytes_that_each_stage_sends() -> None:
    case = a_case()
    batch = 12 * 128 * 1024 * 2
    assert link_bytes(case, Configuration.parse("1"), (0, 8)) == (0,)
    assert link_bytes(case, Configuration.parse("pp=2"), (0, 4, 8)) == (batch, 0)
    # a ring over two moves as much as the tensor; an all-reduce for the embedding, two for each of 3 and 2 blocks
    assert link_bytes(case, Configuration.parse("tp=2 pp=2"), (0, 4, 8)) == (8 * batch, 4 * batch)
    assert link_bytes(case, Configuration.parse("dp=2 pp=2"), (0, 4, 8)) == (batch // 2, 0)
    decode = a_case("decode")
    tokens = 12 * (128 + 8) * 1024 * 2
    assert link_bytes(decode, Configuration.parse("pp=2"), (0, 4, 8)) == (tokens, 12 * 9 * 8)


def test_memory_is_listed_by_rank() -> None:
    case = a_case(batch=8)
    first, second = (
        (stage.weight_bytes, stage.memory_bytes + 64 * 2**20)  # cuBLAS keeps 32 MiB for each of two streams
        for stage in evaluate(
            case.profile(),
            FOUR.subset(2),
            case.workload(Configuration.parse("dp=2 pp=2")),
            (0, 5, 8),
        ).stages
    )
    assert memory(case, Configuration.parse("dp=2 pp=2"), (0, 5, 8), FOUR) == (first, first, second, second)
    shared = memory(case, Configuration.parse("tp=2 pp=2"), (0, 5, 8), FOUR)
    assert shared[0] == shared[1]
    assert shared[0][0] < first[0]


def test_every_slot_of_decoding_has_its_cache() -> None:
    """Keys and values of 1024 numbers of 2 bytes in each block, for every token of every sequence of the replica."""
    few, many = (memory(a_case("decode", batch=size), Configuration.parse("1"), (0, 8), FOUR) for size in (12, 24))
    kept = 2 * 5 * 2 * 1024 * (128 + 9)
    outputs = 2 * 128 * 1024 * 2 * 6  # of six more prefills, each on its way to the next stage
    assert many[0][0] == few[0][0]
    assert 12 * kept <= many[0][1] - few[0][1] <= 12 * kept + outputs


def test_a_share_of_a_model_that_heads_do_not_allow_is_refused() -> None:
    with pytest.raises(WorkloadError):
        counted_profile(a_case(), 3)
