"""Seconds of messages between ranks: from measured curves where these apply, else from the cluster's description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lp_plugin.hardware import Cluster, Link
from lp_plugin.measured import Links

__all__ = ["Messages"]

_SHORTEST = 1e-12  # seconds; a logarithm needs more than nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """What messages take on a cluster.

    Measured curves stand for all links equal to the one between the cluster's first two devices; other links, such as
    networks between nodes, are as the cluster describes them.

    Example:
        >>> cluster = Cluster.homogeneous("h200", 16)
        >>> links = Links(send_bytes=(1024, 4096), send_seconds=(1e-5, 2e-5))
        >>> messages = Messages(cluster=cluster, links=links)
        >>> messages.send_seconds(cluster.links[0], 8192), messages.measures(cluster.links[7])
        (4e-05, False)
    """

    cluster: Cluster
    """All devices, not grouped."""
    links: Links = field(default_factory=Links)
    """Measured; empty takes all from the cluster."""

    def measures(self, link: Link) -> bool:
        """Whether the measured curves stand for a link."""
        return bool(self.links.send_bytes) and bool(self.cluster.links) and link == self.cluster.links[0]

    def send_seconds(self, link: Link, num_bytes: float) -> float:
        """Seconds of a message over a link.

        Between measured sizes on a straight line in logarithms; below the smallest as that one, above the largest in
        proportion.
        """
        if not self.measures(link):
            return link.seconds(num_bytes)
        return _on_curve(self.links.send_bytes, self.links.send_seconds, num_bytes)

    def reduce_seconds(self, link: Link, num_bytes: float, ranks: int) -> float:
        """Seconds of an all-reduce over ``ranks`` that a link joins.

        A ring moves ``2 (n - 1) / n`` times the tensor over each link, so over more ranks than were measured it takes
        as long as that of a tensor larger by the ratio of these factors. The measured latency stays as it is.

        Args:
            link: The slowest between the ranks.
            num_bytes: Of the tensor, which each rank holds.
            ranks: That take part.

        Source:
            P. Patarasuk, X. Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.
        """
        links = self.links
        if ranks == 1 or not links.reduce_bytes or not self.measures(link):
            return link.all_reduce_seconds(num_bytes, ranks)
        factor = ((ranks - 1) / ranks) / ((links.ranks - 1) / links.ranks)
        return _on_curve(links.reduce_bytes, links.reduce_seconds, num_bytes * factor)


def _on_curve(sizes: Sequence[int], seconds: Sequence[float], num_bytes: float) -> float:
    if num_bytes >= sizes[-1]:
        return seconds[-1] * num_bytes / sizes[-1]
    wanted = max(num_bytes, sizes[0])
    return float(np.exp(np.interp(np.log(wanted), np.log(sizes), np.log(np.maximum(seconds, _SHORTEST)))))
