"""Simulated clusters of experiments, against plain loops, simulated events, and the predictions of clusters we have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from oracles import simulate_overlapped
from timed_cases import FOUR, LINKS, a_case, of_stages, some_times, the_timed

from lp_plugin.bench.experiment.costs import pick_times
from lp_plugin.bench.experiment.message_costs import Messages
from lp_plugin.bench.experiment.results import CaseResult, Environment
from lp_plugin.bench.experiment.scale_out import needed_times, simulate_scale_out
from lp_plugin.bench.experiment.settings import Case, Configuration, Experiment, ScaleOut
from lp_plugin.errors import HardwareError
from lp_plugin.measured import LayerTimes


def an_experiment(measured: Case, **fields: object) -> Experiment:
    scale = {
        "case": "case",
        "devices": (8, 12, 16),
        "cluster": "h200",
        "batch": 64,
        "micro_batch": 2,
        "widest_tensor_parallel": 8,
    }
    return Experiment(
        name="e",
        title="e",
        trials=2,
        calibration=None,
        cases=(measured,),
        scale_out=(ScaleOut(**(scale | fields)),),
    )


def on(name: str, backend: str = "nccl") -> Environment:
    return Environment(devices=(name,), backend=backend, host="", cores=1, versions={}, variables={})


def a_result(case: Case, layers: Sequence[LayerTimes], **fields: object) -> CaseResult:
    copied = {"name", "dtype", "phase", "processes", "batch", "micro_batch", "sequence", "new_tokens", "tokens"}
    return CaseResult(
        model=dict(case.config),
        baseline=case.baseline,
        layers=tuple(layers),
        links=LINKS,
        environment=fields.pop("environment", on("NVIDIA H200")),
        **{name: getattr(case, name) for name in copied},
        **fields,
    )


def all_times(experiment: Experiment, scale: float = 1e-4) -> list[LayerTimes]:
    [case] = experiment.cases
    return [
        some_times(case, wanted.tensor_parallel, "graphs", wanted.granularity, scale)
        for wanted in needed_times(experiment, case)
    ]


def wanted_of(experiment: Experiment) -> list[tuple[object, ...]]:
    return [dataclasses.astuple(wanted) for wanted in needed_times(experiment, experiment.cases[0])]


def test_a_slot_per_stage_decides_the_rows_that_layers_are_timed_with() -> None:
    texts = ("pp=2", "tp=2 compiled", "dp=2", "1")
    case = a_case("decode", micro_batch=None, configurations=tuple(Configuration.parse(text) for text in texts))
    assert [row[2:] for row in wanted_of(an_experiment(case, case="another"))] == [
        (6, "auto"),
        (12, "compiled"),
        (12, "auto"),
    ]


def test_layers_are_timed_as_configurations_and_larger_clusters_need_them() -> None:
    case = a_case(blocks=16, configurations=(Configuration.parse("pp=2"), Configuration.parse("tp=2")))
    assert wanted_of(an_experiment(case)) == [
        (1, "layer", 2, "auto"),
        (2, "layer", 2, "auto"),
        (8, "layer", 2, "auto"),
        (4, "layer", 2, "auto"),
        (1, "sublayer", 2, "auto"),
    ]
    assert wanted_of(an_experiment(case, case="another")) == [(1, "layer", 2, "auto"), (2, "layer", 2, "auto")]
    with pytest.raises(HardwareError, match="h2000"):
        needed_times(an_experiment(case, cluster="h2000"), case)


def test_what_is_compared_on_larger_clusters() -> None:
    case = a_case(blocks=16)
    experiment = an_experiment(case)
    rows = simulate_scale_out(experiment, [a_result(case, all_times(experiment))])
    assert [(row.devices, row.strategy, row.granularity) for row in rows] == [
        (8, "TP=8", "layer"),
        (8, "PP=8", "layer"),
        (8, "DP=8", "layer"),
        (12, "TP=4 x PP=3", "layer"),
        (12, "PP=12", "layer"),
        (12, "PP=12", "sublayer"),
        (12, "DP=12", "layer"),
        (16, "TP=8 x PP=2", "layer"),
        (16, "PP=16", "layer"),
        (16, "DP=16", "layer"),
    ]
    assert not any(row.reason for row in rows)
    rates = {(row.devices, row.strategy, row.granularity): row.tokens_per_second for row in rows}
    assert rates[12, "PP=12", "sublayer"] > 1.1 * rates[12, "PP=12", "layer"]  # 3 halves against 2 blocks
    for row in rows:
        assert row.tokens_per_second == pytest.approx(64 * 128 / row.seconds)
        assert row.bubble_fraction >= -1e-9
        assert row.communication_fraction >= 0
        assert row.bubble_fraction + row.communication_fraction < 1
    assumed = {row.strategy: row.assumed for row in rows}
    ring = "all-reduces over 8 ranks by the ring's formula from those measured over 2"
    assert assumed["TP=8 x PP=2"] == (ring, "InfiniBand NDR as the catalogue has it")
    assert assumed["PP=8"] == ()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_cluster_that_we_do_have_is_simulated_as_it_is_predicted(phase: str) -> None:
    case = a_case(phase, blocks=8)
    experiment = an_experiment(case, devices=(4,), batch=case.batch, widest_tensor_parallel=2)
    times = all_times(experiment)
    rows = simulate_scale_out(experiment, [a_result(case, times)])
    assert [row.strategy for row in rows] == ["TP=2 x PP=2", "PP=4", "DP=4"]
    for row, text in zip(rows, ("tp=2 pp=2", "pp=4", "dp=4"), strict=True):
        assert row.seconds == pytest.approx(the_timed(case, text, row.boundaries, times).seconds)
        assert row.tokens_per_second == pytest.approx(case.tokens / row.seconds)


def test_idle_time_is_that_of_the_simulated_events() -> None:
    case = a_case(blocks=8)
    experiment = an_experiment(case, devices=(4,), batch=10, widest_tensor_parallel=1)
    times = all_times(experiment)
    [row, _] = simulate_scale_out(experiment, [a_result(case, times)])
    stages = of_stages(times[0].seconds, row.boundaries)
    hops = [Messages(cluster=FOUR, links=LINKS).send_seconds(FOUR.links[0], 2 * 128 * 1024 * 2)] * 3
    passages = simulate_overlapped(stages, hops, 5)
    whole = max(passage.stop for passage in passages)
    busy = sum(passage.stop - passage.start for passage in passages if passage.kind == "forward")
    assert row.bubble_fraction + row.communication_fraction == pytest.approx(1 - busy / (4 * whole))
    assert row.communication_fraction == pytest.approx(sum(hops) / whole)  # hops are shorter than stages


def test_all_reduces_are_communication() -> None:
    case = a_case(blocks=8)
    experiment = an_experiment(case, devices=(4,), widest_tensor_parallel=2)
    times = all_times(experiment)
    row, *_ = simulate_scale_out(experiment, [a_result(case, times)])
    assert row.strategy == "TP=2 x PP=2"
    computing = 32 * sum(pick_times(times, 2, "auto").seconds) / (2 * row.seconds)
    assert row.bubble_fraction + row.communication_fraction + computing == pytest.approx(1)
    reducing = Messages(cluster=FOUR, links=LINKS).reduce_seconds(FOUR.links[0], 2 * 128 * 1024 * 2, 2)
    assert row.communication_fraction >= 32 * (1 + 2 * 8) * reducing / (2 * row.seconds)


def test_other_devices_and_micro_batches_are_scaled_and_say_so() -> None:
    case = a_case(blocks=16, hidden=8192, sequence=2048)
    experiment = an_experiment(case, devices=(8,), cluster="a100-80g", micro_batch=4)
    times = all_times(experiment, 1e-2)
    rows = simulate_scale_out(experiment, [a_result(case, times)])
    same = an_experiment(case, devices=(8,), micro_batch=4)
    reference = simulate_scale_out(same, [a_result(case, times)])
    assert rows[1].assumed == (
        "layers timed on h200, scaled to a100-80g by the roofline",
        "layers timed with 2 sequences, scaled to 4 by the roofline",
        "NVLink 3 as the catalogue has it",
    )
    assert reference[1].assumed == ("layers timed with 2 sequences, scaled to 4 by the roofline",)
    cousins = an_experiment(case, devices=(8,), cluster="h100-sxm")  # the same NVLink, so its figures are measured
    [_, cousin, _] = simulate_scale_out(cousins, [a_result(case, times)])
    assert cousin.assumed == ("layers timed on h200, scaled to h100-sxm by the roofline",)
    assert rows[1].seconds > 3 * reference[1].seconds  # 312 against 989 TFLOP/s


def test_devices_that_the_catalogue_lacks_are_taken_for_the_simulated_ones() -> None:
    case = a_case(blocks=16)
    experiment = an_experiment(case, devices=(8,))
    results = [a_result(case, all_times(experiment), environment=on(name)) for name in ("NVIDIA H200", "Z9")]
    known, unknown = (simulate_scale_out(experiment, [result])[1] for result in results)
    assert known.assumed == ()
    assert unknown.assumed == ("the devices that layers were timed on, which the catalogue lacks, for h200",)
    assert unknown.seconds == known.seconds
    processes = a_result(case, all_times(experiment), environment=on("AMD EPYC", "gloo"))
    assert simulate_scale_out(experiment, [processes])[1].assumed[0].startswith("layers timed on cpu, scaled to h200")


def test_what_was_not_timed_or_does_not_fit_says_so() -> None:
    case = a_case(blocks=16)
    experiment = an_experiment(case, devices=(8,))
    failed = simulate_scale_out(experiment, [a_result(case, (), reason="the processes died")])
    assert {row.reason for row in failed} == {"the processes died"}
    partly = simulate_scale_out(experiment, [a_result(case, [some_times(case)])])
    assert [row.reason for row in partly] == ["no layers were timed with tensor parallelism 8", "", ""]
    large = a_case(blocks=64, hidden=16384)
    crowded = simulate_scale_out(an_experiment(large, devices=(8,)), [a_result(large, [some_times(large)])])
    assert "needs" in crowded[2].reason
    assert crowded[2].tokens_per_second == 0
