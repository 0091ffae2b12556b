"""The catalogue, the cluster files and their errors."""

from __future__ import annotations

import dataclasses
import re
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lp_plugin.errors import HardwareError
from lp_plugin.hardware import Cluster, Device, Link, MemoryTier, catalogue, load_device, load_link

OWN_DEVICE = """
[[device]]
name = "mycard"
count = 2
compute_efficiency = 0.6
layer_overhead = "300 us"
[[device.tier]]
name = "l2"
capacity = "40 MB"
bandwidth = "5 TB/s"
usable_fraction = 0.66
[[device.tier]]
name = "hbm"
capacity = "32 GB"
bandwidth = "1 TB/s"
[device.flops]
float16 = "300 TFLOP/s"
"""
H100_AND_A100 = """
[[device]]
type = "h100-sxm"
count = 8
[[device]]
type = "a100-40g"
count = 2
"""
LINK = """
[link]
bandwidth = "450 GB/s"
latency = "35 us"
"""
LINK_BETWEEN = """
[[link_between]]
first = 7
bandwidth = "50 GB/s"
latency = "50 us"
"""


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


@pytest.fixture
def read(tmp_path):
    """Writes the text to a cluster file and reads it."""

    def read_text(text: str) -> Cluster:
        path = tmp_path / "cluster.toml"
        path.write_text(text, encoding="utf-8")
        return Cluster.parse(str(path))

    return read_text


# The catalogue


def test_the_catalogue_holds_the_devices_promised():
    promised = {"h100-sxm", "h100-pcie", "h200", "a100-80g", "a100-40g", "l40s", "b200", "mi300x", "cpu"}
    assert set(catalogue()) == promised
    assert list(catalogue()) == sorted(catalogue())


@pytest.mark.parametrize("name", catalogue())
def test_each_entry_is_sane(name):
    entry, neighbour = load_device(name), load_link(name)
    assert entry.name == name
    assert len(entry.tiers) >= 2
    speeds = [level.achieved_bytes_per_second for level in entry.tiers]
    assert speeds == sorted(speeds, reverse=True), "a smaller tier is faster"
    assert 1e9 < entry.memory.usable_bytes < entry.memory.capacity_bytes < 1e12
    assert {"float32", "float16", "bfloat16", "int8"} <= {dtype for dtype, _ in entry.peak_flops}
    assert 1e-5 < entry.layer_overhead_seconds < 1e-3
    assert 0 < neighbour.seconds(0) == neighbour.latency_seconds < 1e-3
    assert neighbour.seconds(10**9) > 1e9 / entry.memory.achieved_bytes_per_second
    if name != "cpu":
        assert entry.flops("float16") > 3 * entry.flops("float32")


@pytest.mark.parametrize("name", catalogue())
def test_each_figure_has_its_source(name):
    text = (resources.files("lp_plugin") / "hardware" / f"{name}.toml").read_text(encoding="utf-8")
    figures = [line for line in text.splitlines() if re.match(r"[a-z0-9_]+ = ", line) and "name =" not in line]
    assert len(figures) >= 15
    for line in figures:
        assert re.search(r"\S  # source: \S.{9,}", line), line


def test_measured_figures_of_the_h200():
    h200, nvlink = load_device("h200"), load_link("h200")
    assert [level.name for level in h200.tiers] == ["l2", "hbm"]
    assert h200.tiers[0].usable_bytes == 39_600_000
    assert h200.memory.usable_bytes == 126_900_000_000
    assert h200.flops("float16") == pytest.approx(609e12, rel=0.01)
    assert h200.memory.achieved_bytes_per_second == pytest.approx(4.3e12, rel=0.01)
    assert nvlink.seconds(351_000_000) == pytest.approx(35e-6 + 1e-3)


def test_an_unknown_device_gets_a_suggestion():
    with pytest.raises(HardwareError, match=r"'H100_SXM' is not in the catalogue; did you mean h100-sxm") as error:
        Cluster.parse("H100_SXM:4")
    assert all(name in str(error.value) for name in catalogue())
    with pytest.raises(HardwareError, match="not in the catalogue; known: "):
        load_link("../hardware/h200")


def test_an_unknown_dtype_lists_those_known():
    with pytest.raises(HardwareError, match="a100-80g has no peak for dtype 'float8'; known: bfloat16, float16"):
        load_device("a100-80g").flops("float8")


# Clusters


def test_parse_a_count():
    cluster = Cluster.parse("h100-sxm:16")
    assert cluster == Cluster.homogeneous("h100-sxm", 16)
    assert cluster == Cluster.homogeneous(load_device("h100-sxm"), 16, load_link("h100-sxm"))
    assert (len(cluster.devices), len(cluster.links)) == (16, 15)
    assert cluster.subset(4) == Cluster.parse("h100-sxm:4")
    assert cluster.subset(1).links == ()


def test_one_own_device_needs_no_link():
    assert Cluster.homogeneous(device(), 1).links == ()
    with pytest.raises(HardwareError, match="device 'card' is not in the catalogue"):
        Cluster.homogeneous(device(), 2)


@pytest.mark.parametrize("spec", ["h200", "h200:", "h200:x", "h200:-1", "h200:1.5", "h200:²", "", "h200:9999999999"])
def test_a_spec_of_another_form_is_refused(spec):
    with pytest.raises(HardwareError, match='is not understood; write a device and how many, as in "h100-sxm:16"'):
        Cluster.parse(spec)


@pytest.mark.parametrize("count", [0, -1, 65_537, True, 2.0])
def test_a_wrong_count_is_refused(count):
    with pytest.raises(HardwareError, match=r"count is .*; it must be a whole number, 1 to 65536"):
        Cluster.homogeneous("h200", count)


@pytest.mark.parametrize("num_devices", [0, 3])
def test_a_wrong_subset_is_refused(num_devices):
    with pytest.raises(HardwareError, match=f"{num_devices} devices were asked for; ask for 1 to 2"):
        Cluster.parse("h200:2").subset(num_devices)


@given(st.integers(min_value=1, max_value=40), st.data())
def test_a_subset_of_a_subset(count, data):
    cluster = Cluster.homogeneous(device(), count, link())
    middle = data.draw(st.integers(min_value=1, max_value=count))
    smallest = data.draw(st.integers(min_value=1, max_value=middle))
    assert cluster.subset(count) == cluster
    assert cluster.subset(middle).subset(smallest) == cluster.subset(smallest)


def test_the_digest_is_stable_and_sensitive():
    card = device()
    cluster = Cluster(devices=(card, card), links=(link(),))
    assert cluster.digest == "2294507deea35fe764ff96d64aad1eddf68014d1112c5ae57b05868558ff99ec"
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
    changed += [cluster.subset(1), Cluster(devices=(card, card), links=(link(latency_seconds=0.0),))]
    assert len({cluster.digest, *(other.digest for other in changed)}) == 9


# Bounds


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (tier, {"capacity_bytes": 0}, "MemoryTier 'hbm': capacity_bytes is 0; it must be over 0"),
        (tier, {"bandwidth_bytes_per_second": float("nan")}, "bandwidth_bytes_per_second is nan"),
        (tier, {"usable_fraction": 1.1}, "usable_fraction is 1.1; it must be over 0 and at most 1"),
        (tier, {"bandwidth_efficiency": 0.0}, "bandwidth_efficiency is 0.0"),
        (device, {"tiers": ()}, r"its tiers have \[\] bytes; give at least one"),
        (device, {"tiers": (tier(), tier())}, "from small to large"),
        (device, {"tiers": (tier(capacity_bytes=10**10), tier())}, "from small to large"),
        (device, {"peak_flops": ()}, "give at least one dtype"),
        (device, {"peak_flops": (("int8", 1e9), ("int8", 1e9))}, "each once"),
        (device, {"peak_flops": (("int8", -1.0),)}, "a peak over 0"),
        (device, {"peak_flops": (("int8", 1.0), ("float16", float("nan")))}, "a peak over 0"),
        (device, {"compute_efficiency": 2.0}, "Device 'card': compute_efficiency is 2.0"),
        (device, {"layer_overhead_seconds": -1.0}, "layer_overhead_seconds is -1.0; it must be at least 0"),
        (
            link,
            {"bandwidth_bytes_per_second": float("inf")},
            "Link 'link': bandwidth_bytes_per_second is inf",
        ),
        (link, {"latency_seconds": float("inf")}, "latency_seconds is inf"),
        (link, {"bandwidth_efficiency": 1.5}, "bandwidth_efficiency is 1.5"),
    ],
)
def test_bounds(make, change, message):
    with pytest.raises(HardwareError, match=message):
        make(**change)


def test_a_cluster_has_one_link_fewer_than_devices():
    for devices, links in (((), ()), ((device(),), (link(),)), ((device(), device()), ())):
        with pytest.raises(HardwareError, match=f"has {len(devices)} devices and {len(links)} links; give at least"):
            Cluster(devices=devices, links=links)


# Cluster files


def test_unequal_devices_take_the_slower_link(read):
    cluster = read(H100_AND_A100)
    assert [card.name for card in cluster.devices] == ["h100-sxm"] * 8 + ["a100-40g"] * 2
    assert cluster.links == (load_link("h100-sxm"),) * 7 + (load_link("a100-40g"),) * 2


def test_a_link_for_all_and_an_exception(read):
    cluster = read(H100_AND_A100 + OWN_DEVICE + LINK + LINK_BETWEEN)
    assert len(cluster.devices) == 12
    assert {entry.bandwidth_bytes_per_second for entry in cluster.links} == {450e9, 50e9}
    assert [i for i, entry in enumerate(cluster.links) if entry.latency_seconds == 50e-6] == [7]
    own = cluster.devices[-1]
    assert own.tiers[0].usable_bytes == 26_400_000
    assert own.memory.capacity_bytes == 32 * 10**9
    assert own.flops("float16") == pytest.approx(180e12)
    assert own.layer_overhead_seconds == 300e-6


def test_the_order_of_dtypes_does_not_change_the_digest(read):
    one = read(OWN_DEVICE + 'int8 = "1 TFLOP/s"' + LINK)
    other = read(OWN_DEVICE.replace("[device.flops]", '[device.flops]\nint8 = "1 TFLOP/s"') + LINK)
    assert one.digest == other.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "device is missing; add it"),
        ("device = []", "the cluster has 0 devices"),
        ("device = [5]", r"device\[0\] is 5: Input should be a valid dictionary"),
        ("[[device]", "can't be read: "),
        (f"x = {'9' * 5000}", "can't be read: "),
        (H100_AND_A100 + "[links]", "links is not a known key; allowed here: device, link, link_between"),
        (
            "[[device]]\ntype = 'h100'\ncount = 2",
            "device 'h100' is not in the catalogue; did you mean h200 or h100-",
        ),
        ("[[device]]\ntype = 'h200'", r"device\[0\]\.count is missing"),
        (
            "[[device]]\ntype = 'h200'\ncount = '2'",
            r"device\[0\]\.count is '2': Input should be a valid integer",
        ),
        ("[[device]]\ntype = 'h200'\ncount = 0", r"device\[0\]: count is 0; it must be a whole number, 1 to"),
        (
            "[[device]]\ntype = 'h200'\ncount = 1\nnum = 2",
            r"device\[0\]\.num is not a known key; .*: type, count",
        ),
        (OWN_DEVICE, r"no link is known between devices 0 and 1; add \[link\]"),
        (OWN_DEVICE.replace("40 MB", "40 Mb"), r"device\[0\]\.tier\[0\]\.capacity is '40 Mb': .*80 GB"),
        (OWN_DEVICE.replace("40 MB", "40 GB"), "from small to large"),
        (OWN_DEVICE.replace("300 us", "300 GB"), r"layer_overhead is '300 GB': .*units: ns, us, ms"),
        (OWN_DEVICE.replace("0.66", "1.66"), "usable_fraction is 1.66; it must be over 0 and at most 1"),
        (
            OWN_DEVICE.replace("usable_f", "f"),
            r"tier\[0\]\.fraction is not a known key; .*: name, capacity, band",
        ),
        (OWN_DEVICE.replace("float16", "fp16"), r"flops\.fp16 is 'fp16': Input should be 'float32'"),
        (OWN_DEVICE.replace("compute_efficiency = 0.6", ""), r"device\[0\]\.compute_efficiency is missing"),
        (H100_AND_A100 + LINK.replace('latency = "35 us"', ""), r"link\.latency is missing"),
        (
            H100_AND_A100 + LINK_BETWEEN.replace("7", "9"),
            r"link_between\[0\]\.first is 9; it must be 0 to 8",
        ),
        (H100_AND_A100 + LINK_BETWEEN.replace("7", "-1"), r"link_between\[0\]\.first is -1"),
        (H100_AND_A100 + LINK_BETWEEN * 2, r"link_between\[1\]\.first is 7; .* each at most once"),
    ],
)
def test_a_wrong_file_says_where_and_what_is_allowed(read, text, message):
    with pytest.raises(HardwareError, match=message) as error:
        read(text)
    assert re.match(r"cluster file \S*/cluster\.toml", str(error.value))
    assert "\n" not in str(error.value)
    assert "pydantic" not in str(error.value)


def test_every_problem_is_named_at_once(read):
    with pytest.raises(HardwareError, match=r"tier\[0\]\.capacity is '1 X'.*; device\[0\]\.flops is missing"):
        read(OWN_DEVICE.replace("40 MB", "1 X").replace("[device.flops]", "").replace("float16 =", "# "))


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    (tmp_path / "folder.toml").mkdir()
    for name in ("none.toml", "latin.toml", "folder.toml"):
        with pytest.raises(HardwareError, match=rf"cluster file \S*{name} can't be read: "):
            Cluster.from_toml(tmp_path / name)
