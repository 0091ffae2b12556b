"""Clusters as the command line names them: what a spec stands for, and what is none."""

from __future__ import annotations

import pytest

from lp_plugin.errors import HardwareError
from lp_plugin.hardware import Cluster
from lp_plugin.hardware.catalogue import load_device, load_link, load_network
from lp_plugin.quantity import shown

NAN, INF = float("nan"), float("inf")


def test_parse_a_count():
    cluster = Cluster.parse("h100-sxm:16")
    assert cluster == Cluster.homogeneous("h100-sxm", 16) == Cluster.homogeneous(load_device("h100-sxm"), 16)
    nvlink, network = load_link("h100-sxm"), load_network("h100-sxm")
    assert cluster.links == (nvlink,) * 7 + (network,) + (nvlink,) * 7
    assert cluster.node_sizes() == (8, 8)
    assert cluster.subset(4) == Cluster.parse("h100-sxm:4")
    assert cluster.subset(12).node_sizes() == (8, 4)
    assert cluster.subset(1).links == ()
    assert cluster.subset(1).node_sizes() == (1,)


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("h100-sxm:2x8", (8, 8)),
        ("h200:1x16", (16,)),
        ("h200:3x4", (4, 4, 4)),
        ("l40s:9", (8, 1)),
        ("mi300x:16", (8, 8)),
        ("cpu:20", (20,)),
    ],
)
def test_nodes_of_a_spec(spec, sizes):
    cluster = Cluster.parse(spec)
    assert cluster.node_sizes() == sizes
    assert len(cluster.devices) == sum(sizes)


def test_nodes_of_one_device_have_only_the_network():
    assert set(Cluster.parse("h200:4x1").links) == {load_network("h200")}


@pytest.mark.parametrize(
    "spec",
    ["h200", "h200:", "h200:x", "h200:-1", "h200:1.5", "h200:²", "", "h200:9999999999", "h200:2x", "h200:x2",
     "h200:2X8", "h200:2x2x2", "h200:1e3", "h200:nan", "h200:2 x 8", "h200:8\n"],
)  # fmt: skip
def test_a_spec_of_another_form_is_refused(spec):
    with pytest.raises(HardwareError, match='is not understood; write a device and how many, as in "h100-sxm:16" or'):
        Cluster.parse(spec)


@pytest.mark.parametrize("spec", [5, None, b"h200:2", ["h200:2"]], ids=shown)
def test_a_spec_that_is_no_text_is_refused(spec):
    with pytest.raises(HardwareError) as caught:
        Cluster.parse(spec)
    assert str(caught.value).startswith(f"cluster {shown(spec)} is not understood; write a device and how many")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("given", [None, 5, ["h200"]], ids=shown)
def test_what_is_no_device_is_refused(given, count):
    with pytest.raises(HardwareError, match=r"device is .*; give a Device, or a name from the catalogue"):
        Cluster.homogeneous(given, count)


def test_a_long_spec_is_not_repeated():
    with pytest.raises(HardwareError, match=r"9\.\.\. \(1000002 characters\) is not understood") as error:
        Cluster.parse("9" * 10**6)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("spec", ["h200:0", "h200:65537", "h200:0x8", "h200:2x0", "h200:999999999x999999999"])
def test_a_spec_of_too_few_or_too_many_is_refused(spec):
    with pytest.raises(HardwareError, match=r"count is \d+; it must be a whole number, 1 to 65536"):
        Cluster.parse(spec)


@pytest.mark.parametrize("count", [0, -1, 65_537, True, 2.0, "2", None, NAN, INF, 10**5000], ids=shown)
def test_a_wrong_count_is_refused(count):
    with pytest.raises(HardwareError, match=r"count is .*; it must be a whole number, 1 to 65536"):
        Cluster.homogeneous("h200", count)
    if count is not None:
        with pytest.raises(HardwareError, match=r"devices_per_node is .*; it must be a whole number, 1 to 65536"):
            Cluster.homogeneous("h200", 2, devices_per_node=count)
