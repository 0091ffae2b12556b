"""The catalogue, the cluster files and their errors."""

from __future__ import annotations

import os
import re
import tracemalloc
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import STEADY

from lp_plugin.errors import HardwareError
from lp_plugin.hardware import Cluster
from lp_plugin.hardware.catalogue import catalogue, load_device, load_link, load_network, load_node_size

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
NETWORK = """
[network]
bandwidth = "50 GB/s"
latency = "40 us"
"""
LINK_BETWEEN = """
[[link_between]]
first = 7
bandwidth = "50 GB/s"
latency = "50 us"
"""


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
    entry, neighbour, network = load_device(name), load_link(name), load_network(name)
    assert entry.name == name
    assert len(entry.tiers) >= 2
    speeds = [level.achieved_bytes_per_second for level in entry.tiers]
    assert speeds == sorted(speeds, reverse=True), "a smaller tier is faster"
    assert 1e9 < entry.memory.usable_bytes < entry.memory.capacity_bytes < 1e12
    assert {"float32", "float16", "bfloat16", "int8"} <= {dtype for dtype, _ in entry.peak_flops}
    assert 1e-5 < entry.layer_overhead_seconds < 1e-3
    assert 0 < neighbour.seconds(0) == neighbour.latency_seconds < 1e-3
    assert neighbour.seconds(10**9) > 1e9 / entry.memory.achieved_bytes_per_second
    assert neighbour.seconds(2**20) < network.seconds(2**20), "a node is where links are faster"
    assert load_node_size(name) == (None if name == "cpu" else 8)
    if name != "cpu":
        assert entry.flops("float16") > 3 * entry.flops("float32")


@pytest.mark.parametrize("name", catalogue())
def test_each_figure_has_its_source(name):
    text = (resources.files("lp_plugin") / "hardware" / f"{name}.toml").read_text(encoding="utf-8")
    figures = [line for line in text.splitlines() if re.match(r"[a-z0-9_]+ = ", line) and "name =" not in line]
    assert len(figures) >= 20
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


# Cluster files


def names_of(cluster: Cluster) -> list[str]:
    return [entry.name for entry in cluster.links]


def test_nodes_of_the_catalogue(read):
    cluster = read(H100_AND_A100)
    assert [card.name for card in cluster.devices] == ["h100-sxm"] * 8 + ["a100-40g"] * 2
    assert cluster.links == (load_link("h100-sxm"),) * 7 + (load_network("a100-40g"), load_link("a100-40g"))
    assert cluster.node_sizes() == (8, 2)


def test_devices_of_one_type_fill_a_node_whatever_the_tables(read):
    table = "[[device]]\ntype = 'h200'\ncount = {}\n"
    one, several = read(table.format(20)), read("".join(table.format(count) for count in (3, 7, 1, 9)))
    assert one == several == Cluster.parse("h200:20")


def test_nodes_of_a_size_given_hold_unequal_devices(read):
    cluster = read("devices_per_node = 5" + H100_AND_A100)
    assert names_of(cluster) == ["NVLink 4"] * 4 + ["InfiniBand NDR"] + ["NVLink 4"] * 2 + ["NVLink 3"] * 2
    cluster = read("devices_per_node = 4" + H100_AND_A100)
    crossings = [i for i, name in enumerate(names_of(cluster)) if name.startswith("InfiniBand")]
    assert crossings == [3, 7]
    assert cluster.links[7] == load_network("a100-40g"), "the slower one of both networks"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 10, 65_536])
def test_a_network_joins_the_nodes(read, size):
    cluster = read(f"devices_per_node = {size}" + H100_AND_A100 + LINK + NETWORK)
    nodes = [number // size for number in range(10)]
    assert names_of(cluster) == ["link" if left == right else "network" for left, right in pairwise(nodes)]


def test_the_rules_of_link_and_network(read):
    assert names_of(read(H100_AND_A100 + LINK)) == ["link"] * 9
    assert names_of(read(H100_AND_A100 + LINK + NETWORK)) == ["link"] * 7 + ["network", "link"]
    assert names_of(read(H100_AND_A100 + NETWORK)) == ["NVLink 4"] * 7 + ["network", "NVLink 3"]
    with_own = read(H100_AND_A100 + OWN_DEVICE + LINK + NETWORK + LINK_BETWEEN)
    assert [entry.latency_seconds for entry in with_own.links[7:]] == [50e-6, 35e-6, 40e-6, 35e-6]
    sized = read("devices_per_node = 5" + H100_AND_A100 + LINK)
    assert names_of(sized) == ["link"] * 4 + ["InfiniBand NDR"] + ["link"] * 4


def test_own_devices_with_nothing_but_a_network(read):
    cluster = read("devices_per_node = 1" + OWN_DEVICE + NETWORK)
    assert names_of(cluster) == ["network"]
    assert read(OWN_DEVICE + LINK_BETWEEN.replace("7", "0")).links[0].latency_seconds == 50e-6


def test_every_key_of_a_link(read):
    keys = 'name = "wire"\nbandwidth_efficiency = 0.5\ncollective_efficiency = 0.25\n'
    wire = read(OWN_DEVICE + LINK + keys).links[0]
    assert wire.seconds(450e9) == pytest.approx(2 + 35e-6)
    assert wire.all_reduce_seconds(450e9, 2) == pytest.approx(8 + 35e-6)
    assert (wire.name, load_link("h200").collective_efficiency) == ("wire", 0.87)


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
        ("device = []", "device is an empty list; give at least one"),
        ("device = [5]", r"device\[0\] is 5: Input should be a valid dictionary"),
        ("[[device]", "can't be read: "),
        (f"x = {'9' * 5000}", "can't be read: "),
        (
            H100_AND_A100 + "[links]",
            "links is not a known key; did you mean .*link.*allowed here: device, devices_per_node, link, net",
        ),
        ("device_per_node = 8" + H100_AND_A100, "device_per_node is not a known key; did you mean devices_per_node"),
        ("devices_per_node = 0" + H100_AND_A100, "devices_per_node is 0; it must be a whole number, 1 to 65536"),
        ("devices_per_node = 2.0" + H100_AND_A100, r"devices_per_node is 2\.0: Input should be a valid integer"),
        (H100_AND_A100 + NETWORK.replace("network]", "link_between]"), r"link_between is \{.*should be a valid list"),
        (H100_AND_A100.replace("8", "65536"), "the number of devices is 65538; it must be a whole number, 1 to 65536"),
        (H100_AND_A100.replace("8", "0x" + "f" * 9999), r"count is a number of more digits than can be shown; it must"),
        (H100_AND_A100 + OWN_DEVICE, r"no network is known between devices 9 and 10; add \[network\], or .* first = 9"),
        (H100_AND_A100 + NETWORK.replace("50 GB", "0 GB"), "network: Link 'network': bandwidth_bytes_per_second is 0"),
        (
            H100_AND_A100 + LINK_BETWEEN.replace("50 GB", "0 GB"),
            r"link_between\[0\]: Link 'link': bandwidth_bytes_per_",
        ),
        (OWN_DEVICE.replace('name = "mycard"', "nam = 1"), r"device\[0\]\.nam is not .*; did you mean name\? allowed"),
        ("[[device]]\ntyp = 'h200'\ncount = 2", r"device\[0\]\.typ is not a known key; did you mean type\? allowed"),
        (H100_AND_A100 + "[network]\n'a\\nb' = 1\n'\\u001b' = 2", r"network\.'a\\\\nb' is not"),
        (H100_AND_A100 + '"' + "a" * 999 + '" = 1', r"'a{59}\.\.\. \(1001 characters\) is not a known key"),
        ("x = " + "[" * 9999, "can't be read: its values are nested too deeply"),
        ("x = " + "{a=" * 9999, "can't be read: its values are nested too deeply"),
        ("device = " + "[" * 150 + "]" * 150, r"device\[0\] is \[\[\[.*: Input should be a valid dictionary"),
        ("[device]\nx = 1", r"device is \{'x': 1\}: Input should be a valid list"),
        ("[a" + ".a" * 33 + "]", "line 1 has 33 dots; write at most 32 in a line"),
        ("\ufeff" + H100_AND_A100, "can't be read: Invalid statement"),
        (
            "[[device]]\ntype = 'h100'\ncount = 2",
            r"device\[0\]\.type: device 'h100' is not in the catalogue; did you mean h200 or h100-",
        ),
        ("[[device]]\ntype = 'h200'", r"device\[0\]\.count is missing"),
        (
            "[[device]]\ntype = 'h200'\ncount = '2'",
            r"device\[0\]\.count is '2': Input should be a valid integer",
        ),
        ("[[device]]\ntype = 'h200'\ncount = 0", r"device\[0\]\.count is 0; it must be a whole number, 1 to"),
        (
            "[[device]]\ntype = 'h200'\ncount = 1\nnum = 2",
            r"device\[0\]\.num is not a known key; .*: type, count",
        ),
        (OWN_DEVICE, r"no link is known between devices 0 and 1; add \[link\]"),
        (OWN_DEVICE.replace("40 MB", "40 Mb"), r"device\[0\]\.tier\[0\]\.capacity is '40 Mb': .*80 GB"),
        (OWN_DEVICE.replace("40 MB", "40 GB"), "from small to large"),
        (OWN_DEVICE.replace("300 us", "300 GB"), r"layer_overhead is '300 GB': .*units: ns, us, ms"),
        (
            OWN_DEVICE.replace("0.66", "1.66"),
            r"device\[0\]: .* usable_fraction is 1\.66; it must be over 0 .* and at most 1",
        ),
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


def test_many_problems_are_counted(read):
    with pytest.raises(HardwareError, match=r"; k6 is not a known key; [^;]*; and 93 more\.$"):
        read("\n".join(f"k{number} = 1" for number in range(100)))


def test_a_comment_may_have_dots(read):
    assert read("# " + "." * 100 + H100_AND_A100) == read(H100_AND_A100)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    for name in ("none.toml", "latin.toml", "folder.toml", "pipe.toml", f"{'x' * 5000}.toml", "none.toml/a.toml"):
        with pytest.raises(HardwareError, match=rf"cluster file \S*{name} can't be read: "):
            Cluster.from_toml(tmp_path / name)
    with pytest.raises(HardwareError, match="can't be read: embedded null byte"):
        Cluster.parse("\0.toml")


def test_a_long_file_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "cluster.toml"
    with path.open("wb") as file:
        file.truncate(10**12)
    tracemalloc.start()
    with pytest.raises(HardwareError, match="but at most 131,072 are read; join equal neighbours by their count"):
        Cluster.from_toml(path)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


@settings(STEADY, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_junk_is_refused(tmp_path, junk):
    path = tmp_path / "cluster.toml"
    path.write_bytes(junk)
    with pytest.raises(HardwareError, match="cluster file "):
        Cluster.from_toml(path)


def test_the_files_of_the_documentation(read):
    page = (Path(__file__).parent.parent / "docs" / "clusters.md").read_text(encoding="utf-8")
    files = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert [read(text).node_sizes() for text in files] == [(8, 2, 2), (2, 2)]


def test_a_catalogue_device_launched_as_cuda_graphs(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('[[device]]\ntype = "h200"\ncount = 2\nlayer_overhead = "10 us"\n', encoding="utf-8")
    graphs, eager = Cluster.from_toml(file), Cluster.parse("h200:2")
    assert [device.layer_overhead_seconds for device in graphs.devices] == [1e-5, 1e-5]
    assert graphs.links == eager.links
    file.write_text('[[device]]\ntype = "h200"\ncount = 2\nlayer_overhead = "-1 us"\n', encoding="utf-8")
    with pytest.raises(HardwareError, match="layer_overhead"):
        Cluster.from_toml(file)
