"""Clusters: chains of devices, of equal ones or as a file describes them, cut into groups and parts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from lp_plugin.errors import HardwareError
from lp_plugin.hardware.catalogue import load_device, load_link, load_network, load_node_size, read_chain
from lp_plugin.hardware.device import COMPARED_BYTES, Device, Link, check_count, check_items, is_whole, slower_link
from lp_plugin.quantity import shown

__all__ = ["Cluster"]

_SPEC = re.compile(r"([^:]*):(?:([0-9]{1,9})x)?([0-9]{1,9})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A chain of devices, or of equal groups of them, in the order of the pipeline.

    Example:
        >>> cluster = Cluster.parse("h100-sxm:16")
        >>> cluster.node_sizes()
        (8, 8)
        >>> cluster.links[6].name, cluster.links[7].name
        ('NVLink 4', 'InfiniBand NDR')
        >>> len(cluster.grouped(8).devices)
        2
    """

    devices: tuple[Device, ...]
    """One device per stage, in pipeline order; in a grouped cluster, one of the equal devices of each group."""

    links: tuple[Link, ...]
    """``links[i]`` joins ``devices[i]`` and ``devices[i + 1]``, or their groups."""

    group_size: int = 1
    """Devices that share each stage (tensor parallelism)."""

    group_links: tuple[Link, ...] = ()
    """The slowest link inside each group; none if ``group_size`` is 1."""

    def __post_init__(self) -> None:
        for field, kind in (("devices", Device), ("links", Link), ("group_links", Link)):
            check_items(f"the cluster: {field}", getattr(self, field), kind)
        if len(self.links) != len(self.devices) - 1:
            raise HardwareError(
                f"the cluster has {len(self.devices)} devices and {len(self.links)} links; "
                "give at least one device, and one link between each two neighbours."
            )
        check_count("the cluster: group_size", self.group_size)
        expected = len(self.devices) if self.group_size > 1 else 0
        if len(self.group_links) != expected:
            raise HardwareError(
                f"the cluster has {len(self.group_links)} group_links with a group_size of {self.group_size}; "
                f"give {expected}: one for each stage if a group has more than one device, else none."
            )

    @classmethod
    def homogeneous(
        cls, device: str | Device, count: int, link: Link | None = None, devices_per_node: int | None = None
    ) -> Cluster:
        """``count`` equal devices in nodes of equal size, of which the last may be smaller.

        Args:
            device: A device, or a name from the catalogue.
            count: How many.
            link: Joins all neighbours. None takes the catalogue's entry of the device's name: its link inside a
                node, its network between nodes.
            devices_per_node: Size of a node; None takes the catalogue's. Not together with ``link``.

        Raises:
            HardwareError: If the name is unknown, or a number is not 1 to 65,536.
        """
        check_count("the cluster: count", count)
        if devices_per_node is not None:
            check_count("the cluster: devices_per_node", devices_per_node)
            if link is not None:
                remedy = "give a link, which joins all neighbours, or devices_per_node"
                raise HardwareError(f"the cluster: devices_per_node is {devices_per_node} beside a link; {remedy}.")
        chosen = load_device(device) if isinstance(device, str) else device
        if not isinstance(chosen, Device):
            raise HardwareError(f"the cluster: device is {shown(device)}; give a Device, or a name from the catalogue.")
        if count == 1 or link is not None:
            return cls(devices=(chosen,) * count, links=() if link is None else (link,) * (count - 1))
        size = devices_per_node or load_node_size(chosen.name) or count
        inside, between = load_link(chosen.name), load_network(chosen.name)
        links = tuple(inside if position % size else between for position in range(1, count))
        return cls(devices=(chosen,) * count, links=links)

    @classmethod
    def parse(cls, spec: str) -> Cluster:
        """The cluster written on the command line.

        Args:
            spec: "h100-sxm:16", in nodes of the catalogue's size; "h100-sxm:2x8", nodes x devices of each; or a
                path ending in .toml.

        Raises:
            HardwareError: If the text has none of these forms, the name is unknown, or the file is wrong.
        """
        if isinstance(spec, str) and spec.endswith(".toml"):
            return cls.from_toml(spec)
        match = _SPEC.fullmatch(spec) if isinstance(spec, str) else None
        if match is None:
            forms = 'a device and how many, as in "h100-sxm:16" or "h100-sxm:2x8", or the path of a .toml file'
            raise HardwareError(f"cluster {shown(spec)} is not understood; write {forms}.")
        name, nodes, devices = match.groups()
        if nodes is None:
            return cls.homogeneous(name, int(devices))
        return cls.homogeneous(name, int(nodes) * int(devices), devices_per_node=int(devices))

    @classmethod
    def from_toml(cls, path: str | Path) -> Cluster:
        """The cluster that a TOML file describes; its keys and rules are in docs/clusters.md.

        Raises:
            HardwareError: If the file can't be read, or a value is missing, unknown or out of bounds.
        """
        devices, links = read_chain(path)
        return cls(devices=devices, links=links)

    @property
    def digest(self) -> str:
        """SHA-256 of all fields, in hexadecimal; 1 and 1.0 count as equal."""
        chains = {"devices": _runs(self.devices), "links": _runs(self.links), "group_links": _runs(self.group_links)}
        fields = json.loads(json.dumps(chains | {"group_size": self.group_size}), parse_int=float)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def subset(self, num_devices: int) -> Cluster:
        """The first ``num_devices`` devices (or groups), and the links between; too many raise HardwareError."""
        most = len(self.devices)
        if not is_whole(num_devices, most):
            raise HardwareError(f"{shown(num_devices)} devices were asked for; ask for 1 to {most}.")
        return self._part(0, num_devices)

    def replicas(self, count: int) -> tuple[Cluster, ...]:
        """The chain cut into ``count`` equal parts; the links between parts are dropped.

        Raises:
            HardwareError: If the devices (or groups) can't be divided so.
        """
        check_count("replicas", count)
        size, rest = divmod(len(self.devices), count)
        if rest or not size:
            raise HardwareError(f"{len(self.devices)} devices can't be cut into {count} equal parts; take a divisor.")
        return tuple(self._part(first, first + size) for first in range(0, len(self.devices), size))

    def grouped(self, size: int) -> Cluster:
        """Runs of ``size`` neighbouring devices as one stage each, as in tensor parallelism.

        Each device sends to the one with its place in the next group, over all links between the two. So
        groups are joined by the slowest link from the first device of one to the last device of the other.

        Raises:
            HardwareError: If the devices can't be divided so, a group has unequal devices, or they are groups already.
        """
        check_count("group_size", size)
        total = len(self.devices)
        if size == 1:
            return self
        if self.group_size > 1:
            raise HardwareError(f"the cluster has groups of {self.group_size} already; group the cluster without them.")
        if total % size:
            raise HardwareError(f"{total} devices can't be cut into groups of {size}; take a divisor of {total}.")
        starts = range(0, total, size)
        for first in starts:
            others = [i for i in range(first, first + size) if self.devices[i] != self.devices[first]]
            if others:
                pair = f"devices {first} ({self.devices[first].name}) and {others[0]} ({self.devices[others[0]].name})"
                raise HardwareError(f"{pair} differ but share a group of {size}; take smaller groups or another order.")
        return Cluster(
            devices=self.devices[::size],
            links=tuple(reduce(slower_link, self.links[first : first + 2 * size - 1]) for first in starts[:-1]),
            group_size=size,
            group_links=tuple(reduce(slower_link, self.links[first : first + size - 1]) for first in starts),
        )

    def node_sizes(self) -> tuple[int, ...]:
        """Devices (or groups) of each node, in order, as the links show them.

        A node ends at a link that is slower, for a message of 1 MiB, than the fastest link at any device equal to
        one of the two that it joins. In a chain of equal devices that is: slower than the fastest link.
        """
        seconds = [link.seconds(COMPARED_BYTES) for link in self.links]
        least: dict[Device, float] = {}
        for pair, taken in zip(pairwise(self.devices), seconds, strict=True):
            for device in pair:
                least[device] = min(taken, least.get(device, taken))
        pairs = zip(pairwise(self.devices), seconds, strict=True)
        ends = [i for i, (pair, taken) in enumerate(pairs, 1) if taken > min(least[device] for device in pair)]
        return tuple(end - start for start, end in pairwise([0, *ends, len(self.devices)]))

    def _part(self, first: int, last: int) -> Cluster:
        return Cluster(
            devices=self.devices[first:last],
            links=self.links[first : last - 1],
            group_size=self.group_size,
            group_links=self.group_links[first:last],
        )


def _runs(chain: Iterable[Device | Link]) -> list[tuple[int, dict[str, Any]]]:
    """How often each item follows itself, and its fields."""
    return [(len([*run]), asdict(item)) for item, run in groupby(chain)]
