"""What is said when nothing fits: the table, and remedies that do fit, the next smaller change not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import Phase, assume, given, settings
from oracles import feasible
from strategies import STEADY, clusters, profiles, workloads
from test_solve import FREE, device

from lp_plugin import Cluster, InfeasibleError, LayerCost, LpPluginError, ModelProfile, Workload, make_plan
from lp_plugin.solve import solve
from lp_plugin.strategy import micro_batch_candidates

DENSE16 = Path(__file__).parent.parent / "examples" / "dense16"
REMEDY = re.compile(r"--(batch|sequence|micro-batch) (\d+) instead of (\d+)|(\d+) (devices) instead of (\d+)")


def refusal(profile: ModelProfile, cluster: Cluster, workload: Workload) -> InfeasibleError:
    with pytest.raises(InfeasibleError) as caught:
        make_plan(profile, cluster, workload)
    return caught.value


def parsed(remedy: str) -> tuple[str, int, int]:
    """What is to be changed, to what, from what."""
    match = REMEDY.fullmatch(remedy)
    assert match, remedy
    name, value, old = (match[1], match[2], match[3]) if match[1] else (match[5], match[4], match[6])
    return name.replace("-", "_"), int(value), int(old)


def works(profile: ModelProfile, cluster: Cluster, workload: Workload, name: str, value: int) -> bool:
    """Whether the one change alone, everything else as the user gave it, makes a plan possible."""
    if name == "devices":
        last = cluster.links[-1] if cluster.links else FREE
        more = value - len(cluster.devices)
        devices = (*cluster.devices, *[cluster.devices[-1]] * more)
        cluster = Cluster(devices=devices, links=(*cluster.links, *[last] * more))
    else:
        workload = dataclasses.replace(workload, **{name: value})
    sizes = micro_batch_candidates(workload)
    return any(solve(profile, cluster, workload.with_micro_batch(size), "throughput") for size in sizes)


def current(workload: Workload, cluster: Cluster, name: str) -> int:
    return len(cluster.devices) if name == "devices" else getattr(workload, name)


def assert_remedies_hold(profile: ModelProfile, cluster: Cluster, workload: Workload) -> list[str]:
    error = refusal(profile, cluster, workload)
    changed = []
    for remedy in error.remedies:
        assert remedy in str(error)
        name, value, old = parsed(remedy)
        assert old == current(workload, cluster, name)
        assert works(profile, cluster, workload, name, value), remedy
        smaller_change = value - 1 if name == "devices" else value + 1
        if smaller_change != old:
            assert not works(profile, cluster, workload, name, smaller_change), remedy
        changed.append(name)
    return changed


CASES = {
    "decode, open": (16, Workload(phase="decode", batch=1024, sequence=10_000), ["batch", "sequence"]),
    "decode, two": (2, Workload(phase="decode", batch=32, sequence=10_000), ["devices", "batch", "sequence"]),
    "decode, cut": (16, Workload(phase="decode", batch=1024, sequence=10_000, micro_batch=512), ["sequence"]),
    "decode, cut small": (16, Workload(phase="decode", batch=999, sequence=9999, micro_batch=8), ["batch", "sequence"]),
    "prefill, cut": (16, Workload(batch=64, sequence=10_000, micro_batch=64), ["micro_batch", "sequence"]),
    "train, open": (2, Workload(phase="train", batch=64, sequence=10_000), ["devices"]),
    "train, cut": (16, Workload(phase="train", batch=64, sequence=10_000, micro_batch=32), ["micro_batch", "sequence"]),
}  # fmt: skip


@pytest.mark.parametrize(("count", "workload", "changes"), CASES.values(), ids=CASES)
def test_remedies_for_the_reference_hold(count: int, workload: Workload, changes: list[str]) -> None:
    profile = ModelProfile.from_config(DENSE16)
    assert assert_remedies_hold(profile, Cluster.homogeneous("h100-sxm", count), workload) == changes


@pytest.mark.parametrize("count", [1, 2, 16])
@pytest.mark.parametrize("workload", [case[1] for case in CASES.values()], ids=CASES)
def test_the_table_is_legible_and_marks_the_row(count: int, workload: Workload) -> None:
    profile, cluster = ModelProfile.from_config(DENSE16), Cluster.homogeneous("h100-sxm", count)
    if works(profile, cluster, workload, "batch", workload.batch):
        return
    error = refusal(profile, cluster, workload)
    assert "<- does not fit" in error.table
    assert error.table in str(error)
    assert "…" not in error.table  # no figure is cut off
    assert "embedding" in error.table


def test_the_reference_decode_is_refused_with_214_sequences() -> None:
    profile, cluster = ModelProfile.from_config(DENSE16), Cluster.homogeneous("h100-sxm", 16)
    error = refusal(profile, cluster, Workload(phase="decode", batch=1024, sequence=10_000))
    assert "--batch 214 instead of 1024" in error.remedies
    assert "dense16 does not fit 16 x h100-sxm in decode with batch 1024, sequence 10000" in str(error)
    assert "most of it for the KV cache" in str(error)


@settings(STEADY, phases=[Phase.generate])
@given(profiles(min_layers=2, max_layers=5), clusters(max_devices=3), workloads())
def test_remedies_hold_for_random_models(profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
    assume(len(cluster.devices) <= profile.num_layers)
    assume(len(cluster.devices) > 1)
    assume(not feasible(profile, cluster, workload))
    try:
        assert_remedies_hold(profile, cluster, workload)
    except LpPluginError as error:
        pytest.fail(f"a remedy can't be tried: {error}")


@STEADY
@given(profiles(min_layers=2, max_layers=5), clusters(max_devices=3), workloads(cut=False))
def test_infeasible_exactly_when_no_partition_and_no_micro_batch_fits(
    profile: ModelProfile, cluster: Cluster, workload: Workload
) -> None:
    assume(1 < len(cluster.devices) <= profile.num_layers)
    try:
        make_plan(profile, cluster, workload)
    except InfeasibleError:
        assert not feasible(profile, cluster, workload)
    else:
        assert feasible(profile, cluster, workload)


def test_a_single_device_of_ones_own_is_refused_with_a_remedy() -> None:
    """No link is known, as there is only one device; memory doesn't depend on it."""
    profile = ModelProfile.from_costs([1, 1], weight_bytes=[60, 60])
    error = refusal(profile, Cluster.homogeneous(device(100), 1), Workload(batch=1, sequence=1, micro_batch=1))
    assert "2 devices instead of 1" in error.remedies


def test_nothing_helps_a_layer_that_is_too_heavy() -> None:
    profile = ModelProfile.from_costs([1, 1], weight_bytes=[600, 60])
    cluster = Cluster.homogeneous(device(100), 2, FREE)
    error = refusal(profile, cluster, Workload(batch=1, sequence=1, micro_batch=1))
    assert error.remedies == ()
    assert "most of it for weights" in str(error)
    assert error.table.count("<- does not fit") == 1


def test_more_devices_are_offered_even_if_one_layer_each_would_not_fit() -> None:
    """Training: a first stage of 110 bytes also keeps 17 for every later stage, so 3 devices of 200 fit and 4 don't."""
    heavy = {"weight_bytes": 55, "weight_traffic_bytes": 55}
    layers = (
        LayerCost(name="first", output_bytes_per_token=17, **heavy),
        LayerCost(name="second", **heavy),
        LayerCost(name="third", **heavy),
        LayerCost(name="light"),
    )
    profile = ModelProfile(name="uneven", layers=layers, dtype="float16", input_bytes_per_token=0.0)
    workload = Workload(phase="train", batch=4, sequence=1, micro_batch=1)
    fit = [feasible(profile, Cluster.homogeneous(device(200), count, FREE), workload) for count in (2, 3, 4)]
    assert fit == [False, True, False]
    error = refusal(profile, Cluster.homogeneous(device(200), 2, FREE), workload)
    assert "3 devices instead of 2" in error.remedies


def test_the_largest_micro_batch_is_offered_though_smaller_ones_may_not_fit() -> None:
    """Training 12 sequences over 3 stages: 2 micro-batches of 6 wait (12 sequences), but 3 of 5 (15)."""
    layers = (LayerCost(name="first", output_bytes_per_token=1), LayerCost(name="second"), LayerCost(name="third"))
    profile = ModelProfile(name="waiting", layers=layers, dtype="float16", input_bytes_per_token=0.0)
    cluster = Cluster.homogeneous(device(24), 3, FREE)
    workload = Workload(phase="train", batch=12, sequence=1, micro_batch=11)
    sizes = [size for size in range(1, 12) if feasible(profile, cluster, workload.with_micro_batch(size))]
    assert sizes == [1, 2, 3, 4, 6]
    assert "--micro-batch 6 instead of 11" in refusal(profile, cluster, workload).remedies


def test_the_message_counts_devices_of_several_kinds() -> None:
    other = dataclasses.replace(device(100), name="other")
    cluster = Cluster(devices=(device(100), other, other), links=(FREE, FREE))
    profile = ModelProfile.from_costs([1] * 4, weight_bytes=[300] * 4)
    message = str(refusal(profile, cluster, Workload(batch=1, sequence=1, micro_batch=1)))
    assert "3 x own" not in message
    assert "3 x other" not in message
