"""The best order of unequal devices: no other order has a faster slowest stage."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import STEADY, cost_profiles, devices, links, profiles, workloads

from lp_plugin import (
    Cluster,
    Device,
    HardwareError,
    LayerCost,
    Link,
    MemoryTier,
    ModelProfile,
    Workload,
    WorkloadError,
    make_plan,
)
from lp_plugin.hardware import slower_link
from lp_plugin.hardware.catalogue import load_device, load_link, load_network
from lp_plugin.objective import Constraints
from lp_plugin.order import best_order
from lp_plugin.planner import best_plan
from lp_plugin.solver.solve import solve
from lp_plugin.wiring import MOST_KINDS, kinds_of

DENSE16 = Path(__file__).parent.parent / "examples" / "dense16"
ONE = Workload(batch=1, sequence=1, micro_batch=1)
KINDS = ("a100-40g", "a100-80g", "b200", "h100-pcie", "h100-sxm", "h200", "l40s", "mi300x")
Arrange = Callable[[Sequence[int]], Cluster]


def bottleneck(profile: ModelProfile, cluster: Cluster, workload: Workload) -> float:
    plan = solve(profile, cluster, workload)
    return math.inf if plan is None else plan.bottleneck_seconds


def check_best(profile: ModelProfile, arrange: Arrange, given: Sequence[int], workload: Workload) -> None:
    """Every distinct order tried; ``given`` is the kind at each place, kinds numbered by where they first appear."""
    orders = sorted(set(itertools.permutations(given)))
    found = [bottleneck(profile, arrange(order), workload) for order in orders]
    best = best_order(profile, arrange(given), workload)
    assert bottleneck(profile, best, workload) == min(found)
    if bottleneck(profile, arrange(given), workload) == min(found):
        assert best == arrange(given)
    else:
        assert best == arrange(orders[found.index(min(found))])


def named(kinds: Sequence[int]) -> tuple[int, ...]:
    """Kinds renamed to the order in which they first appear."""
    return tuple(list(dict.fromkeys(kinds)).index(kind) for kind in kinds)


@st.composite
def one_link(draw: st.DrawFn, *, phase: str) -> tuple[ModelProfile, Arrange, tuple[int, ...], Workload]:
    """Two to four kinds, one link throughout."""
    counts = draw(st.sampled_from([(1, 1), (2, 1), (1, 1, 1), (2, 2), (2, 1, 1), (3, 2), (1, 1, 1, 1)]))
    roomy = draw(st.booleans())
    kinds = draw(st.lists(devices(roomy=roomy), min_size=len(counts), max_size=len(counts), unique=True))
    link = draw(links())
    order = named(draw(st.permutations([kind for kind, count in enumerate(counts) for _ in range(count)])))

    def arrange(order: Sequence[int]) -> Cluster:
        return Cluster(devices=tuple(kinds[kind] for kind in order), links=(link,) * (len(order) - 1))

    return draw(model(len(order))), arrange, order, draw(workloads(phase=phase))


@st.composite
def own_links(draw: st.DrawFn, *, phase: str) -> tuple[ModelProfile, Arrange, tuple[int, ...], Workload]:
    """Kinds with links of their own, of which two devices are neighbours in the given order; the slower one between."""
    counts = draw(st.sampled_from([(2, 2), (2, 3), (2, 2, 2)]))
    kinds = draw(st.lists(devices(roomy=True), min_size=len(counts), max_size=len(counts), unique=True))
    own = draw(st.lists(links(), min_size=len(counts), max_size=len(counts)))
    order = tuple(kind for kind, count in enumerate(counts) for _ in range(count))

    def arrange(order: Sequence[int]) -> Cluster:
        pairs = itertools.pairwise(order)
        wires = tuple(own[left] if left == right else slower_link(own[left], own[right]) for left, right in pairs)
        return Cluster(devices=tuple(kinds[kind] for kind in order), links=wires)

    return draw(model(len(order))), arrange, order, draw(workloads(phase=phase))


@st.composite
def model(draw: st.DrawFn, count: int) -> ModelProfile:
    """A few more layers than devices."""
    layers = profiles(min_layers=count, max_layers=count + 2) | cost_profiles(max_layers=count + 2)
    return draw(layers.filter(lambda profile: profile.num_layers >= count))


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
@settings(STEADY, max_examples=40)
@given(data=st.data())
def test_no_order_is_faster(phase: str, data: st.DataObject) -> None:
    check_best(*data.draw(one_link(phase=phase)))


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
@settings(STEADY, max_examples=12)
@given(data=st.data())
def test_no_order_is_faster_with_links_of_their_own(phase: str, data: st.DataObject) -> None:
    profile, arrange, order, workload = data.draw(own_links(phase=phase))
    assume(len(set(arrange(order).links)) > 1)
    check_best(profile, arrange, order, workload)


@st.composite
def waiting(draw: st.DrawFn) -> tuple[ModelProfile, Arrange, tuple[int, ...], Workload]:
    """Training on devices whose memory just holds, or not, what waits for its backward pass."""
    count = draw(st.integers(2, 4))
    capacities = draw(st.lists(st.integers(5, 50), min_size=count, max_size=count, unique=True))
    kinds = [
        device(f"kind {kind}", capacity, draw(st.sampled_from([1.0, 2.0]))) for kind, capacity in enumerate(capacities)
    ]
    layers = tuple(
        LayerCost(
            name=f"layer {index}",
            flops_per_token=draw(st.integers(1, 9)),
            saved_bytes_per_token=draw(st.integers(0, 9)),
        )
        for index in range(count + draw(st.integers(0, 2)))
    )
    profile = ModelProfile(name="random", layers=layers, dtype="float32", input_bytes_per_token=0.0)
    batch = draw(st.integers(1, 5))

    def arrange(order: Sequence[int]) -> Cluster:
        return Cluster(devices=tuple(kinds[kind] for kind in order), links=(wire(0),) * (count - 1))

    return profile, arrange, tuple(range(count)), Workload(phase="train", batch=batch, sequence=1, micro_batch=1)


@settings(STEADY, max_examples=100)
@given(waiting())
def test_no_order_is_faster_where_activations_wait(
    case: tuple[ModelProfile, Arrange, tuple[int, ...], Workload],
) -> None:
    check_best(*case)


def mixed(names: Sequence[str]) -> Cluster:
    """Devices of the catalogue, unequal ones in different nodes."""
    wires = (
        load_link(left) if left == right else slower_link(load_network(left), load_network(right))
        for left, right in itertools.pairwise(names)
    )
    return Cluster(devices=tuple(load_device(name) for name in names), links=tuple(wires))


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_real_devices(phase: str) -> None:
    profile = ModelProfile.from_config(DENSE16)
    workload = Workload(phase=phase, batch=16, sequence=512, micro_batch=4)
    names = ["l40s", "l40s", "h200", "b200", "a100-40g"]
    least = min(bottleneck(profile, mixed(order), workload) for order in set(itertools.permutations(names)))
    best = best_order(profile, mixed(names), workload)
    assert bottleneck(profile, best, workload) == pytest.approx(least, rel=1e-12)
    assert best == mixed([device.name for device in best.devices])
    assert bottleneck(profile, mixed(names), workload) > least * (1 + 1e-9)


def test_eight_kinds_and_three_times_four() -> None:
    """As large as it gets; compared with orders drawn at random."""
    profile = ModelProfile.from_config(DENSE16)
    workload = Workload(phase="decode", batch=64, sequence=2048, micro_batch=8)
    draw = random.Random(0)  # noqa: S311 - no secrets
    for names in (list(KINDS), sorted(["h100-sxm", "l40s", "a100-80g"] * 4)):
        found = bottleneck(profile, best_order(profile, mixed(names), workload), workload)
        others = [bottleneck(profile, mixed(draw.sample(names, len(names))), workload) for _ in range(100)]
        assert found <= min(others) * (1 + 1e-12)
        assert found <= bottleneck(profile, mixed(names), workload)


def device(name: str, capacity: int, flops: float = 1.0) -> Device:
    tier = MemoryTier(name="memory", capacity_bytes=capacity, bandwidth_bytes_per_second=1e9)
    return Device(
        name=name,
        tiers=(tier,),
        peak_flops=(("float32", flops),),
        compute_efficiency=1.0,
        layer_overhead_seconds=0.0,
    )


def wire(seconds: float) -> Link:
    return Link(name=f"{seconds} s", bandwidth_bytes_per_second=1e9, latency_seconds=seconds)


LARGE, SMALL, OTHER = device("large", 100), device("small", 10), device("other", 1000)
HEAVY_AT_THE_END = ModelProfile.from_costs([1, 1, 1], weight_bytes=[1, 1, 50])


def test_what_fits_in_another_order_only() -> None:
    given = Cluster(devices=(LARGE, SMALL), links=(wire(0),))
    assert solve(HEAVY_AT_THE_END, given, ONE) is None
    assert best_order(HEAVY_AT_THE_END, given, ONE).devices == (SMALL, LARGE)


def test_what_fits_in_no_order_is_left_as_it_is() -> None:
    given = Cluster(devices=(SMALL, device("tiny", 5)), links=(wire(0),))
    assert best_order(HEAVY_AT_THE_END, given, ONE) == given
    assert best_order(HEAVY_AT_THE_END, given, Workload(batch=8, sequence=1)) == given


def test_equal_devices_have_one_order() -> None:
    given = Cluster(devices=(LARGE, LARGE, LARGE), links=(wire(1), wire(2)))
    assert best_order(HEAVY_AT_THE_END, given, ONE) == given


def test_groups_are_kept_together() -> None:
    """With tensor parallelism whole groups change places, each with the link inside it."""
    devices = (LARGE, LARGE, SMALL, SMALL)
    given = Cluster(devices=devices, links=(wire(1), wire(3), wire(2))).grouped(2)
    best = best_order(HEAVY_AT_THE_END, given, ONE)
    assert best.devices == (SMALL, LARGE)
    assert best.group_links == (wire(2), wire(1))
    assert (best.group_size, best.links) == (2, given.links)


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_an_open_micro_batch_is_chosen_with_the_order(phase: str) -> None:
    profile = ModelProfile.from_config(DENSE16)
    given, workload = mixed(KINDS), Workload(phase=phase, batch=6, sequence=512)

    def rate(cluster: Cluster) -> float:
        plan = best_plan(profile, cluster, workload, "throughput", Constraints())
        return 0.0 if plan is None else plan.tokens_per_second

    chosen = rate(best_order(profile, given, workload))
    assert chosen > rate(given)
    for micro_batch in (1, 2, 4, 6):
        assert chosen >= rate(best_order(profile, given, workload.with_micro_batch(micro_batch)))


# Which link joins whom


def joined(cluster: Cluster, order: Sequence[int]) -> tuple[Link, ...]:
    return kinds_of(cluster).arranged(cluster, order).links


def test_one_link_throughout() -> None:
    cluster = Cluster(devices=(LARGE, SMALL, LARGE, OTHER), links=(wire(1),) * 3)
    assert joined(cluster, (0, 0, 2, 1)) == (wire(1),) * 3


def test_networks_of_the_catalogue() -> None:
    cluster = mixed(["h100-sxm", "h100-sxm", "l40s", "a100-80g"])
    assert joined(cluster, (2, 0, 1, 0)) == mixed(["a100-80g", "h100-sxm", "l40s", "h100-sxm"]).links


def test_the_slower_one_of_two_links() -> None:
    devices = (LARGE, LARGE, SMALL, SMALL, OTHER, OTHER)
    cluster = Cluster(devices=devices, links=(wire(1), wire(3), wire(3), wire(3), wire(2)))
    assert joined(cluster, (0, 0, 2, 2, 1, 1)) == (wire(1), wire(2), wire(2), wire(3), wire(3))


def test_one_network_between_kinds() -> None:
    devices = (LARGE, LARGE, SMALL, SMALL, OTHER, OTHER)
    cluster = Cluster(devices=devices, links=(wire(1), wire(9), wire(2), wire(9), wire(3)))
    assert joined(cluster, (0, 2, 2, 0, 1, 1)) == (wire(9), wire(3), wire(9), wire(9), wire(2))


def test_nodes_of_one_kind_stay_apart(tmp_path: Path) -> None:
    """Two nodes of equal devices are joined by the network wherever they are."""
    file = tmp_path / "cluster.toml"
    file.write_text('[[device]]\ntype = "h100-sxm"\ncount = 16\n[[device]]\ntype = "l40s"\ncount = 1\n')
    cluster = Cluster.from_toml(file)
    inside, network = load_link("h100-sxm"), load_network("h100-sxm")
    between = slower_link(network, load_network("l40s"))
    assert kinds_of(cluster).counts == (8, 8, 1)
    found = joined(cluster, (0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 1, 1, 1, 1, 1, 1, 1))
    assert found == (inside,) * 7 + (between, between) + (inside,) * 7
    assert joined(cluster, (*kinds_of(cluster).order,)) == cluster.links
    assert joined(cluster, (0,) * 7 + (1,) * 8 + (0, 2))[6] == network


@pytest.mark.parametrize(
    ("devices", "seconds", "message"),
    [
        (
            (LARGE, SMALL, LARGE, SMALL),
            (1, 5, 2),
            "devices 0 and 1 .large, small. are joined by '1 s', devices 2 and 3",
        ),
        ((LARGE, SMALL, OTHER), (1, 2), "not known"),
        ((LARGE, SMALL, LARGE, OTHER, OTHER), (4, 4, 4, 1), "not known"),
        ((LARGE, LARGE, SMALL, SMALL, OTHER), (1, 2, 2, 7), "not known"),
    ],
)
def test_links_that_follow_no_rule(devices: tuple[Device, ...], seconds: tuple[int, ...], message: str) -> None:
    cluster = Cluster(devices=devices, links=tuple(wire(each) for each in seconds))
    with pytest.raises(HardwareError, match=message):
        best_order(ModelProfile.from_costs([1] * 6), cluster, ONE)


def test_every_order_of_a_rule_gives_the_cluster_itself() -> None:
    """The given order is arranged to itself, whichever rule it follows."""
    for cluster in (
        mixed(KINDS),
        Cluster(devices=(LARGE, LARGE, SMALL, SMALL), links=(wire(1), wire(9), wire(2))),
        Cluster(devices=(LARGE, SMALL), links=(wire(1),)),
    ):
        kinds = kinds_of(cluster)
        assert kinds.arranged(cluster, kinds.order) == cluster


# What is refused


def test_more_than_eight_kinds() -> None:
    unequal = tuple(device(f"device {index}", 100 + index) for index in range(MOST_KINDS + 1))
    with pytest.raises(HardwareError, match="9 kinds"):
        best_order(ModelProfile.from_costs([1] * 20), Cluster(devices=unequal, links=(wire(1),) * 8), ONE)


def test_more_devices_than_layers() -> None:
    with pytest.raises(WorkloadError, match="3 layers"):
        best_order(HEAVY_AT_THE_END, mixed(KINDS[:4]), ONE)


@pytest.mark.parametrize(("count", "layers"), [(300, 1000), (5000, 20_000), (1, 20_000)])
def test_what_would_take_too_much_memory(count: int, layers: int) -> None:
    cluster = Cluster(devices=(LARGE,) * count + (SMALL,) * count, links=(wire(0),) * (2 * count - 1))
    with pytest.raises(WorkloadError, match=r"keeps [0-9,]+ numbers; at most 16,000,000"):
        best_order(ModelProfile.from_costs([1] * layers), cluster, ONE)


def test_what_would_take_too_long() -> None:
    unequal = [device(f"device {index}", 1000 + index) for index in range(5)]
    own = [wire(index) for index in range(5)]
    order = [index for index in range(5) for _ in range(3)]
    wires = (slower_link(own[left], own[right]) for left, right in itertools.pairwise(order))
    cluster = Cluster(devices=tuple(unequal[index] for index in order), links=tuple(wires))
    profile = ModelProfile.from_costs([1] * 400)
    with pytest.raises(WorkloadError, match=r"steps; at most 4,000,000,000 are taken\. Give the micro-batch"):
        best_order(profile, cluster, Workload(batch=2**20, sequence=1))


def test_the_result_can_be_planned() -> None:
    profile = ModelProfile.from_config(DENSE16)
    workload = Workload(phase="decode", batch=64, sequence=2048, micro_batch=8)
    names = ["a100-40g", "h200", "l40s"]
    best = best_order(profile, mixed(names), workload)
    plan = make_plan(profile, best, workload)
    assert sorted(stage.device for stage in plan.stages) == sorted(names)
    assert plan.bottleneck_seconds <= make_plan(profile, mixed(names), workload).bottleneck_seconds
    assert dataclasses.replace(best, devices=mixed(names).devices, links=mixed(names).links) == mixed(names)
