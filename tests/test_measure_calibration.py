"""From what was measured to a cluster, and to a file and back."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lp_plugin.errors import HardwareError
from lp_plugin.hardware import Cluster, Device, Link, MemoryTier
from lp_plugin.hardware.catalogue import load_device, load_link
from lp_plugin.hardware.writing import cluster_text, write_cluster
from lp_plugin.measure.bandwidth import Cache, CopyRate, find_knee
from lp_plugin.measure.calibration import (
    Calibration,
    LayerRate,
    calibrated_cluster,
    calibrated_device,
    calibrated_link,
    notes_of,
)
from lp_plugin.measure.calibration_tables import calibration_picture, calibration_report
from lp_plugin.measure.launches import LaunchSeconds
from lp_plugin.measure.matmul import MatmulRate
from lp_plugin.measured import Links
from lp_plugin.report import as_text

MB = 10**6
SIZES = (4096, 2**20, 2**28)


def copies(*pairs: tuple[float, float]) -> tuple[CopyRate, ...]:
    """Of (MB, TB/s)."""
    return tuple(CopyRate(working_set_bytes=int(size * MB), bytes_per_second=rate * 1e12) for size, rate in pairs)


def timed(latency: float, bandwidth: float, factor: float) -> tuple[float, ...]:
    return tuple(latency + factor * size / bandwidth for size in SIZES)


H200 = Calibration(
    name="h200",
    hardware="NVIDIA H200",
    count=2,
    torch_version="2.11.0",
    memory_bytes=150_754_820_096,
    caches=(Cache(name="l2", capacity_bytes=60 * MB),),
    matmul=(
        MatmulRate(dtype="bfloat16", size=1024, flops_per_second=3e14),
        MatmulRate(dtype="bfloat16", size=8192, flops_per_second=7.1e14),
        MatmulRate(dtype="float32", size=8192, flops_per_second=5e13),
    ),
    copies=copies((7.5, 3.2), (15, 4.9), (30, 6.1234567), (37.5, 6.0), (45, 5.0), (60, 4.4), (120, 4.2), (2147, 4.3)),
    launches=LaunchSeconds(eager=4e-6, replayed=1.5e-6),
    layer=LayerRate(dtype="bfloat16", flops=6e12, seconds=0.01, shape="llama layer of hidden size 8192"),
    eager_layer_seconds=2.71828e-4,
    replayed_layer_seconds=6e-5,
    links=Links(
        send_bytes=SIZES,
        send_seconds=timed(2e-5, 3.5e11, 1),
        reduce_bytes=SIZES,
        reduce_seconds=timed(2e-5, 2.8e11, 1),
        ranks=2,
    ),
)


def test_the_knee_is_where_the_rate_falls_to_that_of_the_memory() -> None:
    knee = find_knee(H200.caches[0], H200.copies)
    assert knee is not None
    assert knee.bytes_per_second == 6.1234567e12
    assert knee.usable_fraction == 0.625  # 45 MB runs at 5.0, below sqrt(6.12 * 4.2) = 5.07


def test_a_cache_that_is_no_faster_than_the_memory_is_left_out() -> None:
    flat = copies((7.5, 4.3), (30, 4.4), (60, 4.3), (120, 4.2), (2147, 4.2))
    assert find_knee(H200.caches[0], flat) is None
    device = calibrated_device(dataclasses.replace(H200, copies=flat), load_device("h200"))
    assert [tier.name for tier in device.tiers] == ["hbm"]


def test_working_sets_of_the_cache_before_do_not_count() -> None:
    caches = (Cache(name="l2", capacity_bytes=MB), Cache(name="l3", capacity_bytes=32 * MB))
    rates = copies((0.5, 9.0), (1, 8.0), (2, 3.0), (16, 3.1), (24, 3.0), (32, 2.0), (64, 1.0), (256, 0.9))
    knee = find_knee(caches[1], rates, above_bytes=MB)
    assert knee is not None
    assert (knee.usable_fraction, knee.bytes_per_second) == (1.0, 3.1e12)
    device = calibrated_device(dataclasses.replace(H200, name="cpu", caches=caches, copies=rates), None)
    assert [tier.name for tier in device.tiers] == ["l2", "l3", "memory"]
    assert [tier.bandwidth_bytes_per_second for tier in device.tiers] == [9e12, 3.1e12, 0.9e12]


def test_nominal_figures_are_the_catalogues_and_what_is_achieved_was_measured() -> None:
    known, link = load_device("h200"), load_link("h200")
    cluster = calibrated_cluster(H200, known, link)
    device = cluster.devices[0]
    assert device.peak_flops == known.peak_flops
    assert device.flops("bfloat16") == pytest.approx(6e14, rel=1e-3)
    assert device.memory.bandwidth_bytes_per_second == known.memory.bandwidth_bytes_per_second
    assert device.memory.achieved_bytes_per_second == pytest.approx(4.3e12, rel=1e-3)
    assert device.memory.capacity_bytes == H200.memory_bytes
    assert device.tiers[0].usable_bytes == 37_500_000
    assert device.layer_overhead_seconds == 2.718e-4
    assert cluster.links == (calibrated_link(H200.links, link),)
    assert cluster.links[0].name == link.name
    for size, seconds in zip(SIZES, H200.links.send_seconds, strict=True):
        assert cluster.links[0].seconds(size) == pytest.approx(seconds, rel=2e-3)
    for size, seconds in zip(SIZES, H200.links.reduce_seconds, strict=True):
        assert cluster.links[0].all_reduce_seconds(size, 2) == pytest.approx(seconds, rel=2e-3)


def test_a_device_that_nobody_knows_has_its_best_rates_as_peaks() -> None:
    device = calibrated_device(dataclasses.replace(H200, name="Mystery 9000"), None)
    assert device.name == "Mystery 9000"
    assert dict(device.peak_flops) == {"bfloat16": 7.1e14, "float32": 5e13}
    assert device.compute_efficiency == pytest.approx(6 / 7.1, rel=1e-3)
    assert device.memory.bandwidth_efficiency == 1.0


def test_a_layer_or_link_beyond_nominal_is_not_over_one() -> None:
    fast = dataclasses.replace(H200.layer, seconds=0.0001)
    assert calibrated_device(dataclasses.replace(H200, layer=fast), None).compute_efficiency == 1.0
    quick = dataclasses.replace(H200.links, reduce_seconds=(1e-5, 1e-5, 1e-5))
    assert calibrated_link(quick, None).collective_efficiency == 1.0
    slow = dataclasses.replace(load_link("h200"), bandwidth_bytes_per_second=1e9)
    assert calibrated_link(H200.links, slow).bandwidth_efficiency == 1.0


def test_one_device_has_no_link() -> None:
    alone = dataclasses.replace(H200, count=1, links=Links())
    assert calibrated_cluster(alone, None).links == ()
    assert "message" not in as_text(calibration_report(alone, calibrated_cluster(alone, None)))


def test_the_file_reads_back_equal_and_every_figure_says_where_it_is_from(tmp_path: Path) -> None:
    known = load_device("h200")
    cluster = calibrated_cluster(H200, known, load_link("h200"))
    path = tmp_path / "cluster.toml"
    write_cluster(cluster, path, title="two of them", notes=notes_of(H200, cluster, known))
    assert Cluster.parse(str(path)) == cluster
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# two of them"
    plain = [line for line in lines if " = " in line and "#" not in line]
    assert [line.split(" = ")[0] for line in plain] == ["name", "count", "name", "name", "name"]
    assert "measured: NVIDIA H200, torch 2.11.0" in "\n".join(lines)


def test_the_report_and_the_picture_show_everything(tmp_path: Path) -> None:
    text = as_text(calibration_report(H200, calibrated_cluster(H200, load_device("h200"), load_link("h200"))))
    for part in ("2 x NVIDIA H200", "8192 x 8192", "710", "6.12 TB/s", "268 MB", "l2: 37.5 MB of 60.0 MB usable"):
        assert part in text
    calibration_picture(H200, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 10_000


def test_a_busy_machine_is_named() -> None:
    def shown(calibration: Calibration) -> str:
        return " ".join(as_text(calibration_report(calibration, calibrated_cluster(calibration, None))).split())

    assert "warning" not in shown(H200)
    slow = dataclasses.replace(H200.matmul[1], spread=0.45)
    unsteady = dataclasses.replace(H200, matmul=(H200.matmul[0], slow), layer_spread=0.3)
    warning = "warning: repeats differ by more than 20% for 2 of 14 figures, most for "
    assert f"{warning}matrix product 8192 x 8192, bfloat16: 45%" in shown(unsteady)
    assert "< noise a tiny layer" in shown(dataclasses.replace(H200, eager_layer_seconds=0.0))


# writing any cluster

numbers = st.floats(1e-9, 1e15, allow_nan=False)
fractions = st.floats(1e-3, 1.0)
names = st.text(min_size=1, max_size=8).filter(lambda text: text.isprintable())
links = st.builds(
    Link,
    name=names,
    bandwidth_bytes_per_second=numbers,
    latency_seconds=st.floats(0, 10),
    bandwidth_efficiency=fractions,
    collective_efficiency=fractions,
)


@st.composite
def devices(draw: st.DrawFn) -> Device:
    rates = sorted(draw(st.lists(numbers, min_size=2, max_size=2)), reverse=True)
    tiers = tuple(
        MemoryTier(name=name, capacity_bytes=size, bandwidth_bytes_per_second=rate)
        for name, size, rate in zip(("cache", "memory"), (1000, 2**40), rates, strict=True)
    )
    return Device(
        name=draw(names),
        tiers=tiers,
        peak_flops=(("bfloat16", draw(numbers)), ("float32", draw(numbers))),
        compute_efficiency=draw(fractions),
        layer_overhead_seconds=draw(st.floats(0, 10)),
    )


@settings(max_examples=30)
@given(st.data())
def test_any_cluster_of_devices_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    chain = tuple(data.draw(st.lists(devices(), min_size=1, max_size=2)) * data.draw(st.integers(1, 2)))
    joins = tuple(data.draw(links) for _ in chain[1:])
    cluster = Cluster(devices=chain, links=joins)
    path = tmp_path_factory.mktemp("written") / "cluster.toml"
    write_cluster(cluster, path, notes={"link.latency": "a note\nof two lines"})
    assert Cluster.from_toml(path) == cluster
    tomllib.loads(path.read_text(encoding="utf-8"))


def test_groups_and_impossible_places_are_refused(tmp_path: Path) -> None:
    cluster = Cluster.parse("h200:4")
    with pytest.raises(HardwareError, match="groups of 2 devices can't be written"):
        cluster_text(cluster.grouped(2))
    with pytest.raises(HardwareError, match="can't be written to"):
        write_cluster(cluster, tmp_path / "nowhere" / "cluster.toml")
