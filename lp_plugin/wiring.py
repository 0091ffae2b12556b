"""Kinds of devices in a cluster, and the link that would join any two of them in another order.

Devices are of one kind if they are equal and, where neighbours of that kind are joined by unequal links, in the same
node as well. A link must follow from the kinds that it joins, by the first of these rules that gives every link of
the cluster as it is:

1. one link throughout;
2. within a kind that kind's own link, between unequal kinds the slower one of their networks in the catalogue;
3. within a kind its own link, between unequal kinds the slower one of their own links;
4. within a kind its own link, one other link between all unequal kinds.

A kind's own link is the one between neighbours of that kind in the given order; without such neighbours the
catalogue's link of its type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lp_plugin.errors import HardwareError
from lp_plugin.hardware import Cluster, Device, Link, slower_link
from lp_plugin.hardware.catalogue import catalogue, load_device, load_link, load_network

__all__ = ["MOST_KINDS", "Kinds", "kinds_of"]

MOST_KINDS = 8
"""Of which the best order is sought."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinds:
    """A cluster's devices by kind; kinds are numbered by where they first appear."""

    devices: tuple[Device, ...]
    """The device (or one of each group) of each kind."""
    groups: tuple[tuple[Link, int] | None, ...]
    """Link and size of each kind's tensor-parallel groups; None without them."""
    counts: tuple[int, ...]
    """Devices (or groups) of each kind."""
    order: tuple[int, ...]
    """The kind at each place of the given cluster."""
    links: tuple[tuple[Link | None, ...], ...]
    """``links[left][right]`` joins neighbours of these kinds; None if a kind has no second device to be next to."""

    def arranged(self, cluster: Cluster, order: Sequence[int]) -> Cluster:
        """The cluster with another order of kinds.

        Args:
            cluster: The one that the kinds were taken from.
            order: The kind at each place; each kind as often as it is there.
        """
        pairs = [self.links[left][right] for left, right in pairwise(order)]
        chosen = [self.groups[kind] for kind in order]
        return dataclasses.replace(
            cluster,
            devices=tuple(self.devices[kind] for kind in order),
            links=tuple(link for link in pairs if link is not None),
            group_links=tuple(group[0] for group in chosen if group is not None),
        )


def kinds_of(cluster: Cluster) -> Kinds:
    """The kinds of a cluster's devices, and the links between them.

    Raises:
        HardwareError: If there are more than `MOST_KINDS`, or links don't follow from the kinds that they join.
    """
    group_links = cluster.group_links or (None,) * len(cluster.devices)
    keys: list[tuple[object, ...]] = list(zip(cluster.devices, group_links, strict=True))
    if len(set(keys)) > 1 and len(set(cluster.links)) > 1 and _contradiction(keys, cluster.links, equal=True):
        nodes = [node for node, size in enumerate(cluster.node_sizes()) for _ in range(size)]
        keys = [(*key, node) for key, node in zip(keys, nodes, strict=True)]
    names = list(dict.fromkeys(keys))
    if len(names) > MOST_KINDS:
        raise HardwareError(
            f"the cluster has {len(names)} kinds of devices (or nodes of them); the best order is sought for up to "
            f"{MOST_KINDS}. Give the devices in the order to be used, or join those of a node to groups."
        )
    order = tuple(names.index(key) for key in keys)
    first = [order.index(kind) for kind in range(len(names))]
    counts = tuple(order.count(kind) for kind in range(len(names)))
    return Kinds(
        devices=tuple(cluster.devices[place] for place in first),
        groups=tuple(
            (cluster.group_links[place], cluster.group_size) if cluster.group_links else None for place in first
        ),
        counts=counts,
        order=order,
        links=_wiring(cluster, order, counts, first) if len(names) > 1 else ((None,),),
    )


def _wiring(
    cluster: Cluster, order: Sequence[int], counts: Sequence[int], first: Sequence[int]
) -> tuple[tuple[Link | None, ...], ...]:
    """The link of each two kinds, by the first rule that gives the cluster's own links."""
    clash = _contradiction(order, cluster.links, equal=False)
    if clash:
        one, other = clash
        name = cluster.devices
        raise HardwareError(
            f"devices {one} and {one + 1} ({name[one].name}, {name[one + 1].name}) are joined by "
            f"{cluster.links[one].name!r}, devices {other} and {other + 1} of the same kinds by "
            f"{cluster.links[other].name!r}: what the links would be in another order is not known. Join equal pairs "
            "by equal links, or give the devices in the order to be used."
        )
    kinds = range(len(counts))
    for rule in _rules(cluster, order, [cluster.devices[place] for place in first]):
        links = tuple(
            tuple(None if left == right and counts[left] == 1 else rule(left, right) for right in kinds)
            for left in kinds
        )
        known = all(links[i][j] is not None for i in kinds for j in kinds if i != j or counts[i] > 1)
        if known and all(links[i][j] == link for (i, j), link in zip(pairwise(order), cluster.links, strict=True)):
            return links
    raise HardwareError(
        "what the links would be in another order is not known. Join all neighbours by one link; or equal neighbours "
        "by one link for each kind, and unequal ones by the slower of their kinds' links or by one network; "
        "or give the devices in the order to be used."
    )


def _rules(
    cluster: Cluster, order: Sequence[int], devices: Sequence[Device]
) -> Iterator[Callable[[int, int], Link | None]]:
    """What joins two kinds, if it is known, by each of the rules at the top."""
    outer = [_from_catalogue(load_network, device) for device in devices]
    own = [_from_catalogue(load_link, device) if cluster.group_size == 1 else None for device in devices]
    for (left, right), link in zip(pairwise(order), cluster.links, strict=True):
        if left == right:
            own[left] = link
    between = {link for (left, right), link in zip(pairwise(order), cluster.links, strict=True) if left != right}
    single = next(iter(between)) if len(between) == 1 else None

    def slower(links: Sequence[Link | None], left: int, right: int) -> Link | None:
        one, other = links[left], links[right]
        return None if one is None or other is None else slower_link(one, other)

    if len(set(cluster.links)) == 1:
        yield lambda _left, _right: cluster.links[0]
    yield lambda left, right: own[left] if left == right else slower(outer, left, right)
    yield lambda left, right: own[left] if left == right else slower(own, left, right)
    yield lambda left, right: own[left] if left == right else single


def _contradiction(keys: Sequence[object], links: Sequence[Link], *, equal: bool) -> tuple[int, int] | None:
    """Two places where neighbours of the same kinds are joined by unequal links; ``equal``: neighbours of one kind."""
    seen: dict[tuple[object, object], int] = {}
    for place, (pair, link) in enumerate(zip(pairwise(keys), links, strict=True)):
        if equal and pair[0] != pair[1]:
            continue
        earlier = seen.setdefault(pair, place)
        if links[earlier] != link:
            return earlier, place
    return None


def _from_catalogue(load: Callable[[str], Link], device: Device) -> Link | None:
    known = device.name in catalogue() and device == load_device(device.name)
    return load(device.name) if known else None
