"""Devices, links and clusters: bounds, wiring in nodes, groups and parts."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import STEADY

from lp_plugin.errors import HardwareError
from lp_plugin.hardware import Cluster
from lp_plugin.hardware.catalogue import load_device, load_link, load_network
from lp_plugin.hardware.device import Device, Link, MemoryTier, slower_link
from lp_plugin.quantity import shown

NAN, INF = float("nan"), float("inf")


def tier(**changes) -> MemoryTier:
    fields = {"name": "hbm", "capacity_bytes": 10**9, "bandwidth_bytes_per_second": 1e12}
    return MemoryTier(**(fields | changes))


def device(**changes) -> Device:
    fields = {
        "name": "card",
        "tiers": (tier(),),
        "peak_flops": (("float16", 1e14),),
        "compute_efficiency": 0.5,
        "layer_overhead_seconds": 1e-4,
    }
    return Device(**(fields | changes))


def link(**changes) -> Link:
    return Link(**({"name": "link", "bandwidth_bytes_per_second": 1e9, "latency_seconds": 1e-5} | changes))


SPEEDS = {name: link(name=name, bandwidth_bytes_per_second=speed) for name, speed in
          {"fast": 4e11, "middle": 1e11, "slow": 1e10}.items()}  # fmt: skip


def chain(names: list[str], devices: tuple[Device, ...] | None = None) -> Cluster:
    links = tuple(SPEEDS[name] for name in names)
    return Cluster(devices=devices or (device(),) * (len(links) + 1), links=links)


chains = st.lists(st.sampled_from(sorted(SPEEDS)), max_size=30).map(chain)


# Single figures


def test_what_no_stage_can_count_on_is_reserved():
    assert load_device("h200").reserved_bytes == 14_100_000_000
    card = device(tiers=(tier(capacity_bytes=1001, usable_fraction=0.9),))
    assert (card.memory.usable_bytes, card.reserved_bytes) == (900, 101)


def test_an_unknown_dtype_lists_those_known():
    with pytest.raises(HardwareError, match="a100-80g has no peak for dtype 'float8'; known: bfloat16, float16"):
        load_device("a100-80g").flops("float8")


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (tier, {"capacity_bytes": 0}, r"MemoryTier 'hbm': capacity_bytes is 0; it must be over 0 \(at least 1e-30\)"),
        (tier, {"capacity_bytes": 10**400}, "capacity_bytes is 10{59}... .401 characters.; it must .* at most 1e.30"),
        (tier, {"capacity_bytes": 10**5000}, "capacity_bytes is a number of more digits than can be shown; it must be"),
        (tier, {"capacity_bytes": "9"}, "capacity_bytes is '9'; it must be"),
        (tier, {"bandwidth_bytes_per_second": NAN}, "bandwidth_bytes_per_second is nan"),
        (tier, {"bandwidth_bytes_per_second": 5e-324}, "bandwidth_bytes_per_second is 5e-324"),
        (tier, {"usable_fraction": 1.1}, r"usable_fraction is 1\.1; it must be over 0 .* and at most 1"),
        (tier, {"usable_fraction": True}, "usable_fraction is True"),
        (tier, {"bandwidth_efficiency": 0.0}, r"bandwidth_efficiency is 0\.0"),
        (device, {"tiers": ()}, r"its tiers have \[\] bytes; give at least one"),
        (device, {"tiers": (tier(), tier())}, "from small to large"),
        (device, {"tiers": (tier(capacity_bytes=10**10), tier())}, "from small to large"),
        (device, {"peak_flops": ()}, "give at least one dtype"),
        (device, {"peak_flops": (("int8", 1e9), ("int8", 1e9))}, "each once"),
        (device, {"peak_flops": (("int8", -1.0),)}, "a peak over 0"),
        (device, {"peak_flops": (("int8", 1.0), ("float16", NAN))}, "a peak over 0"),
        (device, {"peak_flops": (("int8", 10**5000),)}, "a peak over 0"),
        (device, {"peak_flops": 5}, "Device 'card': peak_flops is 5; give at least one dtype"),
        (device, {"peak_flops": "x"}, "peak_flops is 'x'; give"),
        (device, {"peak_flops": ("x",)}, "a peak over 0"),
        (device, {"peak_flops": ((5, 1.0),)}, "a peak over 0"),
        (device, {"tiers": None}, "Device 'card': tiers is None; it must be a tuple of MemoryTier"),
        (device, {"tiers": ("hbm",)}, r"tiers is \('hbm',\); it must be a tuple of MemoryTier"),
        (device, {"tiers": (tier(), tier(capacity_bytes=10**10))}, r"its tiers are called \['hbm', 'hbm'\]; give each"),
        (device, {"name": ""}, "Device: name is ''; it must be text, and not empty"),
        (tier, {"name": None}, "MemoryTier: name is None"),
        (link, {"name": 5}, "Link: name is 5; it must be text"),
        (device, {"compute_efficiency": 2.0}, r"Device 'card': compute_efficiency is 2\.0"),
        (device, {"compute_efficiency": None}, "compute_efficiency is None"),
        (device, {"layer_overhead_seconds": -1.0}, r"layer_overhead_seconds is -1\.0; it must be at least 0"),
        (link, {"bandwidth_bytes_per_second": INF}, "Link 'link': bandwidth_bytes_per_second is inf"),
        (link, {"latency_seconds": INF}, "latency_seconds is inf"),
        (link, {"bandwidth_efficiency": 1.5}, r"bandwidth_efficiency is 1\.5"),
        (link, {"collective_efficiency": 0}, "collective_efficiency is 0; it must be over 0"),
    ],
)
def test_bounds(make, change, message):
    with pytest.raises(HardwareError, match=message):
        make(**change)


# Links


def test_all_reduces_measured_on_two_h200():
    nvlink = load_link("h200")
    for num_bytes, achieved in ((164e6, 289e9), (34e6, 237e9)):
        assert nvlink.all_reduce_seconds(num_bytes, 2) == pytest.approx(num_bytes / achieved, rel=0.03)


def ring_bytes(group_size: int, num_bytes: float) -> float:
    """Bytes that the busiest device sends when a ring of devices adds up a tensor, step by step, chunk by chunk."""
    has = [[{rank} for _ in range(group_size)] for rank in range(group_size)]  # [rank][chunk]: whose parts are added
    sent = [0.0] * group_size
    for step in range(2 * (group_size - 1)):
        before = [[set(parts) for parts in row] for row in has]
        for rank in range(group_size):
            chunk = (rank - step) % group_size
            has[(rank + 1) % group_size][chunk] |= before[rank][chunk]
            sent[rank] += num_bytes / group_size
    assert all(parts == set(range(group_size)) for row in has for parts in row)
    return max(sent)


@pytest.mark.parametrize("group_size", [1, 2, 3, 8, 16])
def test_an_all_reduce_is_a_ring(group_size):
    wire = link(bandwidth_bytes_per_second=1e9, latency_seconds=2e-5, bandwidth_efficiency=0.5, collective_efficiency=1)
    expected = 2e-5 + ring_bytes(group_size, 1e6) / 5e8 if group_size > 1 else 0
    assert wire.all_reduce_seconds(1e6, group_size) == pytest.approx(expected)
    if group_size > 1:
        assert wire.all_reduce_seconds(0, group_size) == 2e-5


@pytest.mark.parametrize("group_size", [0, -1, 2.0, True, NAN, 10**5000], ids=shown)
def test_a_wrong_group_for_an_all_reduce_is_refused(group_size):
    with pytest.raises(HardwareError, match=r"group_size is .*; it must be a whole number"):
        link().all_reduce_seconds(1.0, group_size)


def test_the_slower_link_is_that_of_a_mebibyte():
    wide_but_late = link(name="late", bandwidth_bytes_per_second=1e12, latency_seconds=1e-2)
    assert slower_link(link(), wide_but_late) == slower_link(wide_but_late, link()) == wide_but_late
    near = link(name="near", bandwidth_bytes_per_second=1e6, latency_seconds=0)
    assert slower_link(near, wide_but_late) == near
    assert slower_link(link(name="left"), link(name="right")).name == "left"


# Nodes


@STEADY
@given(st.integers(1, 40), st.integers(1, 40))
def test_a_node_is_filled_before_the_next(count, size):
    cluster = Cluster.homogeneous("h200", count, devices_per_node=size)
    nodes = [number // size for number in range(count)]
    assert [entry.name for entry in cluster.links] == [
        "NVLink 4" if left == right else "InfiniBand NDR" for left, right in pairwise(nodes)
    ]
    if size > 1:
        assert cluster.node_sizes() == tuple(nodes.count(node) for node in range(nodes[-1] + 1))


def test_a_link_given_joins_all_neighbours():
    cluster = Cluster.homogeneous("h200", 20, link())
    assert set(cluster.links) == {link()}
    assert cluster.node_sizes() == (20,)
    with pytest.raises(HardwareError, match="devices_per_node is 8 beside a link; give a link, which joins all"):
        Cluster.homogeneous("h200", 20, link(), 8)


def test_nodes_of_unequal_devices_are_seen_in_their_own_links():
    old, new = device(name="old"), device(name="new")
    names = ["fast"] * 3 + ["slow"] + ["middle"] * 3
    assert chain(names, (new,) * 4 + (old,) * 4).node_sizes() == (4, 4)
    assert chain(names).node_sizes() == (4, 1, 1, 1, 1)


@STEADY
@given(chains)
def test_a_node_of_equal_devices_ends_at_each_slower_link(cluster):
    fastest = max((entry.bandwidth_bytes_per_second for entry in cluster.links), default=0)
    sizes = [1]
    for entry in cluster.links:
        if entry.bandwidth_bytes_per_second < fastest:
            sizes.append(1)
        else:
            sizes[-1] += 1
    assert cluster.node_sizes() == tuple(sizes)


def test_one_own_device_needs_no_link():
    assert Cluster.homogeneous(device(), 1).links == ()
    with pytest.raises(HardwareError, match="device 'card' is not in the catalogue"):
        Cluster.homogeneous(device(), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": None}, "devices is None; it must be a tuple of Device"),
        ({"devices": ("h200", "h200")}, "devices is .*; it must be a tuple of Device"),
        ({"links": (None,)}, r"links is \(None,\); it must be a tuple of Link"),
        ({"links": [link()]}, "links is .*; it must be a tuple of Link"),
        ({"group_size": 2, "group_links": (link(), 5)}, "group_links is .*; it must be a tuple of Link"),
    ],
)
def test_chains_of_other_things_are_refused(changes, message):
    with pytest.raises(HardwareError, match=f"the cluster: {message}"):
        Cluster(**({"devices": (device(), device()), "links": (link(),)} | changes))


# Clusters


def test_a_cluster_has_one_link_fewer_than_devices():
    for devices, links in (((), ()), ((device(),), (link(),)), ((device(), device()), ())):
        with pytest.raises(HardwareError, match=f"has {len(devices)} devices and {len(links)} links; give at least"):
            Cluster(devices=devices, links=links)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 0}, "group_size is 0; it must be a whole number, 1 to 65536"),
        ({"group_size": 2.0}, r"group_size is 2\.0"),
        ({"group_size": 2}, "has 0 group_links with a group_size of 2; give 2: one for each stage"),
        ({"group_size": 2, "group_links": (link(),)}, "has 1 group_links with a group_size of 2; give 2"),
        ({"group_links": (link(), link())}, "has 2 group_links with a group_size of 1; give 0"),
    ],
)
def test_groups_have_a_link_each(changes, message):
    with pytest.raises(HardwareError, match=message):
        Cluster(devices=(device(),) * 2, links=(link(),), **changes)


@pytest.mark.parametrize("num_devices", [0, 3, -1, 1.0, True, "1", NAN])
def test_a_wrong_subset_is_refused(num_devices):
    with pytest.raises(HardwareError, match=f"{num_devices!r} devices were asked for; ask for 1 to 2"):
        Cluster.parse("h200:2").subset(num_devices)


@STEADY
@given(chains, st.data())
def test_a_subset_of_a_subset(cluster, data):
    count = len(cluster.devices)
    middle = data.draw(st.integers(min_value=1, max_value=count))
    smallest = data.draw(st.integers(min_value=1, max_value=middle))
    assert cluster.subset(count) == cluster
    assert cluster.subset(middle).subset(smallest) == cluster.subset(smallest)


@STEADY
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_groups(size, count, data):
    total = size * count
    names = data.draw(st.lists(st.sampled_from(sorted(SPEEDS)), min_size=total - 1, max_size=total - 1))
    cards = tuple(device(name=str(data.draw(st.integers(0, 1)))) for _ in range(count))
    cluster = chain(names, tuple(card for card in cards for _ in range(size)))
    grouped = cluster.grouped(size)
    assert grouped.devices == cards
    assert grouped.group_size == size
    if size == 1:
        assert grouped == cluster
        return

    def slowest(first: int, last: int) -> float:
        return min(entry.bandwidth_bytes_per_second for entry in cluster.links[first:last])

    for group, inner in enumerate(grouped.group_links):
        assert inner.bandwidth_bytes_per_second == slowest(group * size, (group + 1) * size - 1)
    for group, outer in enumerate(grouped.links):
        ways = [slowest(rank, rank + size) for rank in range(group * size, (group + 1) * size)]
        assert outer.bandwidth_bytes_per_second == min(ways)
    stages = data.draw(st.integers(1, count))
    assert grouped.subset(stages) == cluster.subset(stages * size).grouped(size)


def test_groups_of_nodes():
    cluster = Cluster.parse("h100-sxm:4x8")
    nvlink, network = load_link("h100-sxm"), load_network("h100-sxm")
    by_node, by_half, by_two = cluster.grouped(8), cluster.grouped(4), cluster.grouped(16)
    assert (by_node.links, by_node.group_links) == ((network,) * 3, (nvlink,) * 4)
    assert by_half.links == (nvlink, network) * 3 + (nvlink,)
    assert (by_two.links, by_two.group_links) == ((network,), (network,) * 2)
    assert by_half.node_sizes() == (2, 2, 2, 2)
    assert [part.grouped(8).links for part in cluster.replicas(2)] == [(network,)] * 2


def test_groups_that_cannot_be():
    cluster = Cluster.parse("h200:12")
    with pytest.raises(HardwareError, match="12 devices can't be cut into groups of 8; take a divisor of 12"):
        cluster.grouped(8)
    with pytest.raises(HardwareError, match="has groups of 4 already; group the cluster without them"):
        cluster.grouped(4).grouped(3)
    assert cluster.grouped(4).grouped(1) == cluster.grouped(4)
    mixed = chain(["fast"] * 5, (device(),) * 3 + (device(name="other"),) * 3)
    with pytest.raises(HardwareError, match=r"devices 2 \(card\) and 3 \(other\) differ but share a group of 2"):
        mixed.grouped(2)
    assert [card.name for card in mixed.grouped(3).devices] == ["card", "other"]
    for size in (0, -1, 2.0, True, NAN):
        with pytest.raises(HardwareError, match=r"group_size is .*; it must be a whole number, 1 to 65536"):
            cluster.grouped(size)


@STEADY
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 2]), st.data())
def test_replicas_are_the_chain_without_the_links_between(count, size, group_size, data):
    total = count * size * group_size
    names = data.draw(st.lists(st.sampled_from(sorted(SPEEDS)), min_size=total - 1, max_size=total - 1))
    cluster = chain(names).grouped(group_size)
    parts = cluster.replicas(count)
    assert [len(part.devices) for part in parts] == [size] * count
    assert sum((part.devices for part in parts), ()) == cluster.devices
    assert sum((part.group_links for part in parts), ()) == cluster.group_links
    kept = [entry for number, entry in enumerate(cluster.links, 1) if number % size]
    assert [entry for part in parts for entry in part.links] == kept
    assert parts[0] == cluster.subset(size)


@pytest.mark.parametrize("count", [5, 13, 24])
def test_replicas_of_unequal_size_are_refused(count):
    with pytest.raises(HardwareError, match=f"12 devices can't be cut into {count} equal parts; take a divisor"):
        Cluster.parse("h200:12").replicas(count)


@pytest.mark.parametrize("count", [0, -1, 2.0, True, 65_537])
def test_a_wrong_number_of_replicas_is_refused(count):
    with pytest.raises(HardwareError, match=r"replicas is .*; it must be a whole number"):
        Cluster.parse("h200:12").replicas(count)


def test_the_digest_is_stable_and_sensitive():
    card = device()
    cluster = Cluster(devices=(card, card), links=(link(),))
    assert cluster.digest == "330a6717ee28a9b36bec2f8af2d6e7dbdc6a7ac82f5f69e88311bd84a7689150"
    assert Cluster(devices=(card, card), links=(link(bandwidth_bytes_per_second=10**9),)).digest == cluster.digest
    changed = [
        Cluster(devices=(card, dataclasses.replace(card, **change)), links=cluster.links)
        for change in (
            {"name": "other"},
            {"tiers": (tier(capacity_bytes=10**9 + 1),)},
            {"tiers": (tier(usable_fraction=0.9),)},
            {"peak_flops": (("bfloat16", 1e14),)},
            {"compute_efficiency": 0.6},
            {"layer_overhead_seconds": 0.0},
        )
    ]
    for change in ({"latency_seconds": 0.0}, {"collective_efficiency": 0.5}, {"name": "other"}):
        changed.append(Cluster(devices=(card, card), links=(link(**change),)))
    four = chain(["fast"] * 3)
    changed += [cluster.subset(1), four, four.grouped(2), four.grouped(4), chain(["fast", "slow", "fast"])]
    changed += [chain(["fast", "fast", "slow"]), chain(["fast", "slow", "fast"]).grouped(2)]
    assert len({cluster.digest, *(other.digest for other in changed)}) == 1 + len(changed) == 17


def test_the_order_of_unequal_devices_changes_the_digest():
    one, other = device(), device(name="other")
    orders = [(one, one, other), (one, other, one), (other, one, one), (one, other, other)]
    assert len({chain(["fast"] * 2, order).digest for order in orders}) == 4
