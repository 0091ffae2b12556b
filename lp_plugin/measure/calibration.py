"""What was measured of a machine, and the cluster that the planner makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lp_plugin.hardware import Cluster, Device, Link, MemoryTier
from lp_plugin.measure.bandwidth import Cache, CopyRate, find_knee
from lp_plugin.measure.launches import LaunchSeconds
from lp_plugin.measure.matmul import MatmulRate
from lp_plugin.measured import Links
from lp_plugin.quantity import format_bytes

__all__ = ["Calibration", "LayerRate", "calibrated_cluster", "calibrated_device", "calibrated_link", "notes_of"]

_DIGITS = 4
"""Significant ones, of what is written to a file."""
_MEMORY_USABLE = 0.9
"""As for every device of the catalogue: room left to context, libraries and fragmentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRate:
    """A large transformer layer, timed."""

    dtype: str
    """Precision."""
    flops: float
    """Counted, of one pass."""
    seconds: float
    """Measured."""
    shape: str
    """In words."""
    spread: float = 0.0
    """Of repeats, between the quartiles, over the median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """One device as it was measured, all devices of the host at work."""

    name: str
    """Of the device in a cluster file: the catalogue's where it is there."""
    hardware: str
    """As the driver or the system names it."""
    count: int
    """Devices, or processes of a CPU."""
    torch_version: str
    """That ran the kernels."""
    memory_bytes: int
    """Of the device; of a CPU each process's share."""
    caches: tuple[Cache, ...]
    """Smallest first."""
    matmul: tuple[MatmulRate, ...]
    """By precision and size."""
    copies: tuple[CopyRate, ...]
    """By working set."""
    launches: LaunchSeconds
    """Of tiny kernels."""
    layer: LayerRate
    """What arithmetic reaches in a layer."""
    eager_layer_seconds: float
    """A tiny transformer layer launched kernel by kernel."""
    replayed_layer_seconds: float | None
    """The same in a replayed CUDA graph; None without a GPU."""
    layer_spread: float = 0.0
    """Of repeats of the tiny layer, between the quartiles, over the median."""
    links: Links
    """Between processes; empty with one."""

    @property
    def spreads(self) -> dict[str, float]:
        """What was repeated -> by how much the repeats differ, between the quartiles, over the median."""
        return {
            **{f"matrix product {rate.size} x {rate.size}, {rate.dtype}": rate.spread for rate in self.matmul},
            **{f"working set of {format_bytes(rate.working_set_bytes)}": rate.spread for rate in self.copies},
            "launches": self.launches.spread,
            "tiny layer": self.layer_spread,
            "large layer": self.layer.spread,
            "messages": self.links.spread,
        }


def calibrated_cluster(calibration: Calibration, known: Device | None, link: Link | None = None) -> Cluster:
    """All devices of the host with the figures measured.

    Args:
        calibration: Of one of them; the others are of its kind.
        known: Its entry in the catalogue, for nominal figures; None if there is none.
        link: The catalogue's link, likewise.
    """
    device = calibrated_device(calibration, known)
    if calibration.count == 1:
        return Cluster(devices=(device,), links=())
    joined = calibrated_link(calibration.links, link)
    return Cluster(devices=(device,) * calibration.count, links=(joined,) * (calibration.count - 1))


def calibrated_device(calibration: Calibration, known: Device | None) -> Device:
    """A device of the figures measured.

    Nominal figures (peaks, memory bandwidth) are the catalogue's where it knows the device and what was measured does
    not exceed them; else the best rate measured stands for the nominal one.
    """
    rates: dict[str, float] = {}
    for rate in calibration.matmul:
        rates[rate.dtype] = max(rates.get(rate.dtype, 0.0), rate.flops_per_second)
    peaks = {} if known is None else dict(known.peak_flops)
    peaks |= {dtype: _rounded(best) for dtype, best in rates.items() if best > peaks.get(dtype, 0.0)}
    achieved = calibration.layer.flops / calibration.layer.seconds
    return Device(
        name=calibration.name,
        tiers=tuple(_tiers(calibration, known)),
        peak_flops=tuple(sorted(peaks.items())),
        compute_efficiency=_rounded(min(achieved / peaks[calibration.layer.dtype], 1.0)),
        layer_overhead_seconds=_rounded(calibration.eager_layer_seconds),
    )


def calibrated_link(links: Links, known: Link | None) -> Link:
    """A link of the figures measured: latency of the quickest message, bandwidth of the largest beyond that.

    Args:
        links: Of two processes or more.
        known: The catalogue's link, for name and nominal bandwidth.
    """
    latency = min(links.send_seconds)
    rate = links.send_bytes[-1] / max(links.send_seconds[-1] - latency, links.send_seconds[-1] / 2)
    sent = 2 * (links.ranks - 1) / links.ranks * links.reduce_bytes[-1]
    collective = sent / max(links.reduce_seconds[-1] - latency, links.reduce_seconds[-1] / 2) / rate
    nominal = rate if known is None else max(rate, known.bandwidth_bytes_per_second)
    return Link(
        name="link" if known is None else known.name,
        bandwidth_bytes_per_second=_rounded(nominal),
        latency_seconds=_rounded(latency),
        bandwidth_efficiency=min(_rounded(rate / nominal), 1.0),
        collective_efficiency=min(_rounded(collective), 1.0),
    )


def notes_of(calibration: Calibration, cluster: Cluster, known: Device | None) -> dict[str, str]:
    """Where each figure of a cluster file comes from, by its place.

    Args:
        calibration: What was measured.
        cluster: Of `calibrated_cluster`.
        known: As there.
    """
    measured = f"measured: {calibration.hardware}, torch {calibration.torch_version}"
    nominal, device, layer = "catalogue: nominal", cluster.devices[0], calibration.layer
    replayed = calibration.replayed_layer_seconds
    graphs = "" if replayed is None else f"; replayed as a CUDA graph {replayed * 1e6:.0f} us"
    notes = {
        "compute_efficiency": f"{measured}: {layer.shape}, {layer.flops / layer.seconds / 1e12:.4g} TFLOP/s",
        "layer_overhead": f"{measured}: a tiny layer launched kernel by kernel{graphs}",
        "link.bandwidth": f"{measured}: largest message",
        "link.latency": f"{measured}: quickest message",
        "link.bandwidth_efficiency": f"{measured}: largest message over the bandwidth above",
        "link.collective_efficiency": f"{measured}: largest all-reduce over {calibration.links.ranks} processes",
    }
    if cluster.links and cluster.links[0].bandwidth_efficiency < 1:
        notes["link.bandwidth"] = nominal
    peaks = {} if known is None else dict(known.peak_flops)
    for dtype, peak in device.peak_flops:
        notes[f"flops.{dtype}"] = nominal if peaks.get(dtype) == peak else f"{measured}: best matrix product"
    for tier in device.tiers:
        place, is_nominal = f"tier.{tier.name}", tier.bandwidth_efficiency < 1
        notes[f"{place}.capacity"] = f"{measured}: as the system reports it"
        notes[f"{place}.bandwidth"] = nominal if is_nominal else f"{measured}: best of the working sets that it holds"
        notes[f"{place}.usable_fraction"] = f"{measured}: working set at which the bandwidth falls"
        notes[f"{place}.bandwidth_efficiency"] = f"{measured}: achieved over the bandwidth above"
    notes[f"tier.{device.memory.name}.usable_fraction"] = "assumed: room left to context, libraries, fragmentation"
    return notes


def _tiers(calibration: Calibration, known: Device | None) -> Iterator[MemoryTier]:
    """Caches that can be told from what lies behind them, then the memory."""
    slowest = calibration.copies[-1].bytes_per_second
    above, fastest, least = 0, float("inf"), 0
    for cache in calibration.caches:
        knee = find_knee(cache, calibration.copies, above_bytes=above)
        if knee is None or not slowest < knee.bytes_per_second < fastest:
            continue
        tier = MemoryTier(
            name=cache.name,
            capacity_bytes=cache.capacity_bytes,
            bandwidth_bytes_per_second=_rounded(knee.bytes_per_second),
            usable_fraction=_rounded(knee.usable_fraction),
        )
        if tier.usable_bytes >= least:
            yield tier
            above, fastest, least = cache.capacity_bytes, knee.bytes_per_second, tier.usable_bytes
    memory = None if known is None else known.memory
    nominal = slowest if memory is None else max(slowest, memory.bandwidth_bytes_per_second)
    yield MemoryTier(
        name="memory" if memory is None else memory.name,
        capacity_bytes=calibration.memory_bytes,
        bandwidth_bytes_per_second=_rounded(nominal),
        usable_fraction=_MEMORY_USABLE if memory is None else memory.usable_fraction,
        bandwidth_efficiency=min(_rounded(slowest / nominal), 1.0),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
