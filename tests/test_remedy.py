"""What is said when no partition will do: the table, who is to blame, and changes that really work."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from small_cases import FREE, ONE, device
from strategies import STEADY, clusters, profiles, workloads
from test_feasible import ask, can_be_planned, drawn_bounds

from lp_plugin import Cluster, InfeasibleError, LayerCost, LpPluginError, ModelProfile, Workload, make_plan
from lp_plugin.objective import Constraints
from lp_plugin.quantity import parse_bytes, parse_seconds
from lp_plugin.why.feasible import Request

DENSE16 = Path(__file__).parent.parent / "examples" / "dense16"
SMALL = {"model_type": "starcoder2", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16,
         "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 264, "use_bias": False,
         "max_position_embeddings": 16384, "tie_word_embeddings": False, "dtype": "float16"}  # fmt: skip
NUMBER = re.compile(r"--(batch|sequence|micro-batch) (\d+) instead of (\d+)|(\d+) (devices) instead of (\d+)")
BOUNDS = {
    "max-latency": ("max_latency_seconds", parse_seconds),
    "min-tokens-per-second": ("min_tokens_per_second", float),
    "min-sequences": ("min_sequences", int),
    "max-memory": ("max_memory_bytes", parse_bytes),
    "tier": ("tier", str),
}


def refusal(request: Request) -> InfeasibleError:
    with pytest.raises(InfeasibleError) as caught:
        make_plan(request.profile, request.cluster, request.workload, constraints=request.constraints)
    return caught.value


def with_devices(request: Request, count: int) -> Request:
    cluster = request.cluster
    first, more = cluster.devices[0], count - len(cluster.devices)
    if first.name.startswith("h100") and cluster == Cluster.homogeneous(first, len(cluster.devices)):
        return dataclasses.replace(request, cluster=Cluster.homogeneous(first, count))
    last = cluster.links[-1] if cluster.links else FREE
    devices = (*cluster.devices, *[cluster.devices[-1]] * more)
    return dataclasses.replace(request, cluster=Cluster(devices=devices, links=(*cluster.links, *[last] * more)))


def with_number(request: Request, name: str, value: int) -> Request:
    if name == "devices":
        return with_devices(request, value)
    return dataclasses.replace(request, workload=dataclasses.replace(request.workload, **{name: value}))


def applied(request: Request, remedy: str, config: Any = None) -> Request:
    """The request with a remedy followed to the letter."""
    for part in remedy.split(" and "):
        if match := NUMBER.fullmatch(part):
            request = with_number(request, (match[1] or match[5]).replace("-", "_"), int(match[2] or match[4]))
        elif match := re.fullmatch(r"device (\d+) \(.*\) last instead of .*", part):
            devices = list(request.cluster.devices)
            devices.append(devices.pop(int(match[1])))
            cluster = dataclasses.replace(request.cluster, devices=tuple(devices))
            request = dataclasses.replace(request, cluster=cluster)
        elif part == "--checkpointing":
            request = dataclasses.replace(request, workload=dataclasses.replace(request.workload, checkpointing=True))
        elif part == "--zero-stage 1 instead of 0":
            request = dataclasses.replace(request, workload=dataclasses.replace(request.workload, zero_stage=1))
        elif match := re.fullmatch(r"--(weights|dtype|granularity) (\w+) instead of \w+", part):
            old = request.profile
            options = {"dtype": old.dtype, "weight_dtype": old.weight_dtype, "granularity": old.granularity}
            options["weight_dtype" if match[1] == "weights" else match[1]] = match[2]
            request = dataclasses.replace(request, profile=ModelProfile.from_config(config, **options))
        elif match := re.fullmatch(r"without --([\w-]+)", part):
            request = request.without(BOUNDS[match[1]][0])
        else:
            match = re.fullmatch(r'--([\w-]+) "?([^"]+?)"? instead of .+', part)
            assert match, remedy
            name, parse = BOUNDS[match[1]]
            request = request.bound_to(name, parse(match[2]))
    return request


def assert_remedies_hold(request: Request, config: Any = None) -> list[str]:
    """Each remedy works; of numbers, the next smaller change does not. Returns what is changed."""
    error, changed = refusal(request), []
    for remedy in error.remedies:
        assert remedy in str(error)
        assert can_be_planned(applied(request, remedy, config)), remedy
        match = NUMBER.fullmatch(remedy)
        changed.append(remedy.split(" instead")[0].strip("-"))
        if match is None:
            continue
        name, value, old = (match[1] or match[5]).replace("-", "_"), int(match[2] or match[4]), match[3] or match[6]
        now = len(request.cluster.devices) if name == "devices" else getattr(request.workload, name)
        assert int(old) == now
        nearer = value - 1 if name == "devices" else value + 1
        changed[-1] = name.replace("_", "-")
        assert nearer == now or not can_be_planned(with_number(request, name, nearer)), remedy
    return changed


TRAIN = {"phase": "train", "batch": 64, "sequence": 10_000}
CASES: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "decode, open": (16, {"phase": "decode", "batch": 1024, "sequence": 10_000}, ["batch", "sequence"]),
    "decode, two": (2, {"phase": "decode", "batch": 32, "sequence": 10_000}, ["devices", "batch", "sequence"]),
    "decode, weights": (2, {"phase": "decode", "batch": 26, "sequence": 9000},
                        ["devices", "weights float8", "batch", "sequence"]),
    "decode, cut": (16, {"phase": "decode", "batch": 1024, "sequence": 10_000, "micro_batch": 512}, ["sequence"]),
    "decode, small": (16, {"phase": "decode", "batch": 999, "sequence": 9999, "micro_batch": 8}, ["batch", "sequence"]),
    "prefill, cut": (16, {"batch": 64, "sequence": 10_000, "micro_batch": 64}, ["micro-batch", "sequence"]),
    "train, open": (2, TRAIN, ["devices"]),
    "train, tight": (4, TRAIN | {"data_parallel": 4}, ["checkpointing", "zero-stage 1", "devices", "sequence"]),
    "train, cut": (16, TRAIN | {"micro_batch": 32}, ["micro-batch", "sequence"]),
    "train, kept": (8, TRAIN | {"micro_batch": 4}, ["micro-batch", "checkpointing", "sequence"]),
}  # fmt: skip


@pytest.mark.parametrize(("count", "workload", "changes"), CASES.values(), ids=CASES)
def test_remedies_for_the_reference_hold(count: int, workload: dict[str, Any], changes: list[str]) -> None:
    profile, cluster = ModelProfile.from_config(DENSE16), Cluster.homogeneous("h100-sxm", count)
    assert assert_remedies_hold(ask(profile, cluster, Workload(**workload)), DENSE16) == changes


def test_half_precision_is_offered() -> None:
    profile = ModelProfile.from_config(DENSE16, dtype="float32")
    workload = Workload(phase="decode", batch=30, sequence=10_000)
    changes = assert_remedies_hold(ask(profile, Cluster.homogeneous("h100-sxm", 3), workload), DENSE16)
    assert "dtype bfloat16" in changes


def test_sub_layers_are_offered() -> None:
    """20 blocks of 1.61 GB on 16 devices: two on some, but three halves on the fullest."""
    config = {**SMALL, "hidden_size": 8192, "intermediate_size": 32768}
    profile, cluster = ModelProfile.from_config(config), Cluster.homogeneous("h100-sxm", 12)
    bounds = Constraints(max_memory_bytes=2_900_000_000)
    request = ask(profile, cluster, Workload(phase="decode", batch=1, sequence=16), bounds)
    assert "granularity sublayer" in assert_remedies_hold(request, config)


def test_the_head_is_moved_to_the_device_that_holds_it() -> None:
    small = dataclasses.replace(device(100), name="small")
    large = dataclasses.replace(device(1000), name="large")
    profile = ModelProfile.from_costs([1, 1, 1], weight_bytes=[50, 50, 500])
    cluster = Cluster(devices=(small, large, small), links=(FREE, FREE))
    assert refusal(ask(profile, cluster, ONE)).remedies == ("device 1 (large) last instead of small",)
    assert_remedies_hold(ask(profile, cluster, ONE))


@pytest.mark.parametrize("count", [1, 2, 16])
@pytest.mark.parametrize("workload", [case[1] for case in CASES.values()], ids=CASES)
def test_the_table_is_legible_and_marks_the_row(count: int, workload: dict[str, Any]) -> None:
    request = ask(ModelProfile.from_config(DENSE16), Cluster.homogeneous("h100-sxm", count), Workload(**workload))
    if can_be_planned(request):
        return
    error = refusal(request)
    assert "<- does not fit" in error.table
    assert error.table in str(error)
    assert "…" not in error.table  # no figure is cut off
    assert "embedding" in error.table


def test_the_reference_decode_is_refused_with_214_sequences() -> None:
    profile, cluster = ModelProfile.from_config(DENSE16), Cluster.homogeneous("h100-sxm", 16)
    error = refusal(ask(profile, cluster, Workload(phase="decode", batch=1024, sequence=10_000)))
    assert "--batch 214 instead of 1024" in error.remedies
    assert "dense16 does not fit 16 x h100-sxm in decode with batch 1024, sequence 10000" in str(error)
    assert "most of it for the KV cache" in str(error)


@settings(STEADY, phases=[Phase.generate], suppress_health_check=[HealthCheck.filter_too_much])  # most of them fit
@given(profiles(min_layers=2, max_layers=5), clusters(max_devices=3), workloads())
def test_remedies_hold_for_random_models(profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
    assume(1 < len(cluster.devices) <= profile.num_layers)
    request = ask(profile, cluster, workload)
    assume(not request.is_feasible)
    try:
        assert_remedies_hold(request)
    except LpPluginError as error:
        pytest.fail(f"a remedy can't be tried: {error}")


@settings(STEADY, phases=[Phase.generate], max_examples=80)
@given(profiles(min_layers=2, max_layers=5), clusters(max_devices=3), workloads() | workloads(cut=False), st.data())
def test_contradictions_are_resolved_by_what_is_said(
    profile: ModelProfile, cluster: Cluster, workload: Workload, data: st.DataObject
) -> None:
    assume(1 < len(cluster.devices) <= profile.num_layers)
    request = ask(profile, cluster, workload)
    request = dataclasses.replace(request, constraints=drawn_bounds(data, request))
    assume(not request.is_feasible)
    error = refusal(request)
    assert_remedies_hold(request)
    if ask(profile, cluster, workload).is_feasible:
        droppable = [name for name in request.constraints.given if request.without(name).is_feasible]
        named = [name for name in request.constraints.given if f"({name})" in str(error)]
        assert "can't keep every stage in tier" in str(error) or named == list(request.constraints.given)
        if "can't keep" not in str(error):
            assert len([remedy for remedy in error.remedies if BOUND.match(remedy)]) == len(droppable)


BOUND = re.compile(r"(without )?--(max|min|tier)")


def nearest(**bounds: Any) -> tuple[InfeasibleError, Request]:
    profile, cluster = ModelProfile.from_config(DENSE16), Cluster.homogeneous("h100-sxm", 16)
    workload = Workload(phase="decode", batch=64, sequence=10_000)
    request = ask(profile, cluster, workload, Constraints(**bounds))
    return refusal(request), request


@pytest.mark.parametrize(
    ("bound", "objective", "figure", "word"),
    [
        ({"max_latency_seconds": 0.001}, "latency", lambda plan: plan.latency_seconds, "max-latency"),
        ({"min_tokens_per_second": 1e6}, "throughput", lambda plan: plan.tokens_per_second, "min-tokens-per-second"),
        ({"min_sequences": 300}, "sequences", lambda plan: plan.max_sequences, "min-sequences"),
        ({"max_memory_bytes": 10**9}, "memory", lambda plan: plan.memory_share * 72e9, "max-memory"),
    ],
)
def test_the_best_that_can_be_had_is_that_of_its_objective(
    bound: dict[str, Any], objective: Any, figure: Any, word: str
) -> None:
    error, request = nearest(**bound)
    plan = make_plan(request.profile, request.cluster, request.workload, objective=objective)
    name, parse = BOUNDS[word]
    (remedy,) = [remedy for remedy in error.remedies if remedy.startswith(f"--{word} ")]
    offered = parse(re.sub(r'--\S+ "?([^"]+?)"? instead.*', r"\1", remedy))
    assert offered == pytest.approx(figure(plan), rel=0.01)
    assert can_be_planned(request.bound_to(name, offered))
    assert f"({name})" in str(error)
    assert not can_be_planned(request.bound_to(name, type(offered)(offered * (0.99 if "max" in word else 1.01))))


def test_of_several_constraints_the_one_in_the_way_is_named() -> None:
    error, _ = nearest(max_latency_seconds=1e-3, min_sequences=100, max_memory_bytes=30_000_000_000)
    assert "no partition meets: latency at most 1.00 ms (max_latency_seconds), room for 100 sequences" in str(error)
    assert "With the others kept, the latency is 16.7 ms at best (max_latency_seconds)." in str(error)
    assert error.remedies[0] == '--max-latency "16.7 ms" instead of "1.00 ms"'
    assert "--min-sequences" not in str(error)


def test_constraints_that_fail_each_alone_are_all_named() -> None:
    error, _ = nearest(min_sequences=300, max_memory_bytes=10**9)
    assert "Dropping any single one of them is not enough." in str(error)
    assert "There is room for 214 sequences at most (min_sequences)." in str(error)
    assert "A device needs 22.6 GB at least (max_memory_bytes)." in str(error)
    assert "<- over 1.00 GB, room for 214" in error.table


def test_stages_that_break_a_constraint_are_marked() -> None:
    error, _ = nearest(min_tokens_per_second=1e6)
    assert error.table.count("<- too slow for 1,000,000 tokens/s") == 3
    error, _ = nearest(min_sequences=300)
    assert "<- room for 214" in error.table


@pytest.mark.parametrize(
    ("bounds", "mark"),
    [
        ({"min_tokens_per_second": 4.0}, "too slow for 4 tokens/s"),
        ({"max_latency_seconds": 5.0}, "too slow for a latency of 5.00 s"),
        ({"min_tokens_per_second": 4.0, "max_latency_seconds": 5.0},
         "too slow for 4 tokens/s and a latency of 5.00 s"),
        ({"min_tokens_per_second": 4.0, "max_latency_seconds": 6.0}, "too slow for 4 tokens/s"),
    ],
)  # fmt: skip
def test_slow_stages_are_marked_with_what_was_asked(bounds: dict[str, float], mark: str) -> None:
    """6 sequences in turns of one, 1 s each on the slower stage: 6 s for a token of each, 1 token/s."""
    profile = ModelProfile.from_costs([1.0, 0.1])
    workload = Workload(phase="decode", batch=6, sequence=1, micro_batch=1)
    request = ask(profile, Cluster.homogeneous(device(1000), 2, FREE), workload, Constraints(**bounds))
    rows = refusal(request).table.splitlines()[-2:]
    assert rows[0].endswith(f"<- {mark}")
    assert "latency" not in rows[1]


def test_a_tier_that_no_layer_fits_is_refused_with_the_factor() -> None:
    profile, cluster = ModelProfile.from_config(DENSE16), Cluster.homogeneous("h100-sxm", 16)
    workload = Workload(phase="decode", batch=16, sequence=16)
    error = refusal(ask(profile, cluster, workload, Constraints(tier="l2")))
    assert "layer 'block 0' alone touches 1.61 GB per micro-batch (1.61 GB of weights), 48.8 x the 33.0 MB" in str(
        error
    )
    assert "Even with --granularity sublayer instead of layer and --weights int4 instead of float16" in str(error)
    assert "No precision, finer cut, number of devices, micro-batch or sequence tried fits." in str(error)
    assert error.remedies == ()
    assert "<- leaves l2" in error.table


def tier_request(count: int, sequence: int, hidden: int = 1024, **workload: Any) -> tuple[Request, dict[str, Any]]:
    config = {**SMALL, "hidden_size": hidden, "intermediate_size": 4 * hidden}
    asked = Workload(phase="decode", batch=16, sequence=sequence, **workload)
    cluster = Cluster.homogeneous("h100-sxm", count)
    return ask(ModelProfile.from_config(config), cluster, asked, Constraints(tier="l2")), config


@pytest.mark.parametrize(
    ("count", "sequence", "hidden", "changes"),
    [
        (8, 16, 1024, ["devices", "weights float8"]),
        (16, 4000, 1024, ["weights float8", "sequence"]),
        (16, 16, 1536, ["weights float8"]),
    ],
)
def test_what_would_fit_a_tier(count: int, sequence: int, hidden: int, changes: list[str]) -> None:
    request, config = tier_request(count, sequence, hidden)
    assert assert_remedies_hold(request, config) == changes


def test_a_smaller_micro_batch_may_fit_a_tier() -> None:
    request, config = tier_request(16, 500, micro_batch=16)
    assert "micro-batch" in assert_remedies_hold(request, config)


def test_changes_that_fit_a_tier_only_together() -> None:
    request, config = tier_request(8, 4000)
    error = refusal(request)
    assert error.remedies == ("--weights float8 instead of float16 and 16 devices instead of 8",)
    assert can_be_planned(applied(request, error.remedies[0], config))


def test_a_single_device_of_ones_own_is_refused_with_a_remedy() -> None:
    """No link is known, as there is only one device; memory doesn't depend on it."""
    profile = ModelProfile.from_costs([1, 1], weight_bytes=[60, 60])
    error = refusal(ask(profile, Cluster.homogeneous(device(100), 1), ONE))
    assert "2 devices instead of 1" in error.remedies


def test_nothing_helps_a_layer_that_is_too_heavy() -> None:
    profile = ModelProfile.from_costs([1, 1], weight_bytes=[600, 60])
    error = refusal(ask(profile, Cluster.homogeneous(device(100), 2, FREE), ONE))
    assert error.remedies == ()
    assert "most of it for weights" in str(error)
    assert error.table.count("<- does not fit") == 1


def test_more_devices_are_offered_even_if_one_layer_each_would_not_fit() -> None:
    """Training: the first stage also keeps 17 bytes for every later stage, so 3 devices of 200 fit and 4 don't."""
    heavy = {"weight_bytes": 55, "weight_traffic_bytes": 55}
    layers = (
        LayerCost(name="first", output_bytes_per_token=17, saved_bytes_per_token=17, **heavy),
        LayerCost(name="second", **heavy),
        LayerCost(name="third", **heavy),
        LayerCost(name="light"),
    )
    profile = ModelProfile(name="uneven", layers=layers, dtype="float16", input_bytes_per_token=0.0)
    workload = Workload(phase="train", batch=4, sequence=1, micro_batch=1)
    requests = [ask(profile, Cluster.homogeneous(device(200), count, FREE), workload) for count in (2, 3, 4)]
    assert [can_be_planned(request) for request in requests] == [False, True, False]
    assert "3 devices instead of 2" in refusal(requests[0]).remedies


@pytest.mark.parametrize("asked", [9, 11])
def test_the_largest_micro_batch_is_offered_though_smaller_ones_may_not_fit(asked: int) -> None:
    """Training 12 sequences over 3 stages: 2 micro-batches of 6 wait (12 sequences), but 3 of 5 (15)."""
    layers = (
        LayerCost(name="first", output_bytes_per_token=1, saved_bytes_per_token=1),
        LayerCost(name="second"),
        LayerCost(name="third"),
    )
    profile = ModelProfile(name="waiting", layers=layers, dtype="float16", input_bytes_per_token=0.0)
    cluster = Cluster.homogeneous(device(24), 3, FREE)
    workload = Workload(phase="train", batch=12, sequence=1, micro_batch=asked)
    sizes = [size for size in range(1, 12) if can_be_planned(ask(profile, cluster, workload.with_micro_batch(size)))]
    assert sizes == [1, 2, 3, 4, 6]
    assert f"--micro-batch 6 instead of {asked}" in refusal(ask(profile, cluster, workload)).remedies


def test_the_message_counts_devices_of_several_kinds() -> None:
    other = dataclasses.replace(device(100), name="other")
    cluster = Cluster(devices=(device(100), other, other), links=(FREE, FREE))
    profile = ModelProfile.from_costs([1] * 4, weight_bytes=[300] * 4)
    assert "does not fit 1 x own + 2 x other in prefill" in str(refusal(ask(profile, cluster, ONE)))
