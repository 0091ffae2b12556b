"""A cluster as a file that ``--cluster`` takes; see docs/clusters.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

from lp_plugin.errors import HardwareError
from lp_plugin.files import write_atomically
from lp_plugin.hardware.cluster import Cluster
from lp_plugin.hardware.device import Device, Link

__all__ = ["cluster_text", "write_cluster"]

_MOST_DIGITS = 30
"""That a quantity with a unit may have; beyond, numbers have an exponent."""


def write_cluster(
    cluster: Cluster, path: str | Path, *, title: str = "", notes: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes a cluster file, whole or not at all; read back it gives an equal cluster.

    Args:
        cluster: Of single devices, all in one node.
        path: Replaced if it exists.
        title: First line, as a comment.
        notes: Comments by place, such as ``compute_efficiency``, ``tier.l2.bandwidth``, ``flops.float16``,
            ``link.latency``.

    Raises:
        HardwareError: If the cluster has groups, or the file can't be written.
    """
    text = cluster_text(cluster, title=title, notes=notes)
    try:
        write_atomically(Path(path), text)
    except OSError as error:
        raise HardwareError(f"the cluster file can't be written to {path}: {error}.") from None


def cluster_text(cluster: Cluster, *, title: str = "", notes: Mapping[str, str] = MappingProxyType({})) -> str:
    """The text of the file that `write_cluster` writes.

    Raises:
        HardwareError: If the cluster has groups.
    """
    if cluster.group_size > 1:
        raise HardwareError(
            f"a cluster of groups of {cluster.group_size} devices can't be written; write the cluster without groups."
        )
    lines = [f"# {title}"] if title else []
    for device, run in groupby(cluster.devices):
        lines += ["", "[[device]]", *_annotated(_device_keys(device, len([*run])), notes)]
        for tier in device.tiers:
            keys = {
                "name": _quoted(tier.name),
                "capacity": str(tier.capacity_bytes),
                "bandwidth": _number(tier.bandwidth_bytes_per_second, 9, "GB/s"),
                "usable_fraction": repr(tier.usable_fraction),
                "bandwidth_efficiency": repr(tier.bandwidth_efficiency),
            }
            lines += ["[[device.tier]]", *_annotated(keys, notes, f"tier.{tier.name}.")]
        peaks = {dtype: _number(peak, 12, "TFLOP/s") for dtype, peak in device.peak_flops}
        lines += ["[device.flops]", *_annotated(peaks, notes, "flops.")]
    if len(set(cluster.links)) == 1:
        lines += ["", "[link]", *_annotated(_link_keys(cluster.links[0]), notes, "link.")]
    else:
        for first, link in enumerate(cluster.links):
            keys = {"first": str(first), **_link_keys(link)}
            lines += ["", "[[link_between]]", *_annotated(keys, notes, "link.")]
    return "\n".join(lines).lstrip("\n") + "\n"


def _device_keys(device: Device, count: int) -> dict[str, str]:
    return {
        "name": _quoted(device.name),
        "count": str(count),
        "compute_efficiency": repr(device.compute_efficiency),
        "layer_overhead": _number(device.layer_overhead_seconds, -6, "us"),
    }


def _link_keys(link: Link) -> dict[str, str]:
    return {
        "name": _quoted(link.name),
        "bandwidth": _number(link.bandwidth_bytes_per_second, 9, "GB/s"),
        "latency": _number(link.latency_seconds, -6, "us"),
        "bandwidth_efficiency": repr(link.bandwidth_efficiency),
        "collective_efficiency": repr(link.collective_efficiency),
    }


def _annotated(keys: Mapping[str, str], notes: Mapping[str, str], prefix: str = "") -> Iterator[str]:
    for key, value in keys.items():
        note = notes.get(f"{prefix}{key}", "").replace("\n", " ")
        yield f"{key} = {value}" + (f"  # {note}" if note else "")


def _number(value: float, exponent: int, unit: str) -> str:
    """The shortest decimal that is this float again, in a unit of ``10 ** exponent``; without unit if it is long."""
    text = f"{Decimal(repr(float(value))).scaleb(-exponent).normalize():f}"
    return _quoted(f"{text} {unit}") if len(text) <= _MOST_DIGITS else repr(float(value))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a basic string of TOML has JSON's escapes
