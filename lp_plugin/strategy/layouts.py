"""Ways to lay a model over a cluster: replicas of pipelines of tensor-parallel groups, and which of them make sense.

Devices are taken in the cluster's order: the members of a tensor-parallel group are neighbours, then come the stages
of one pipeline, then its replicas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from lp_plugin.errors import HardwareError, WorkloadError
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile

__all__ = ["LeftOut", "Strategy", "layouts", "nodes_in_words"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """How many devices do what.

    Example:
        >>> Strategy(data_parallel=2, tensor_parallel=4, pipeline_parallel=2).label
        'DP=2 x TP=4 x PP=2'
    """

    data_parallel: int = 1
    """Replicas, each with its share of the batch."""
    tensor_parallel: int = 1
    """Neighbouring devices that share each layer of a stage."""
    pipeline_parallel: int = 1
    """Stages of each replica."""

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        return self.data_parallel * self.tensor_parallel * self.pipeline_parallel

    @property
    def label(self) -> str:
        """In the field's abbreviations: ``TP=8 x PP=2``; ``1 device`` if nothing is divided."""
        counts = {"DP": self.data_parallel, "TP": self.tensor_parallel, "PP": self.pipeline_parallel}
        return " x ".join(f"{name}={count}" for name, count in counts.items() if count > 1) or "1 device"

    @property
    def kind(self) -> str:
        """The label without its numbers: ``TP x PP``."""
        return " x ".join(part.partition("=")[0] for part in self.label.split(" x "))


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A way that is not tried."""

    label: str
    """As `Strategy.label`; ``TP=3`` stands for every layout with it."""
    reason: str
    """Why, in a few words."""


def layouts(profile: ModelProfile, cluster: Cluster) -> tuple[tuple[Strategy, ...], tuple[LeftOut, ...]]:
    """Every strategy that uses all devices, and one device alone; and those that can't be.

    Tensor-parallel groups stay inside a node, have equal devices, and a size that the model's heads allow.

    Args:
        profile: The layers, whole.
        cluster: The devices, not grouped.

    Returns:
        Strategies, and what is left out with the reason.
    """
    count = len(cluster.devices)
    kept, left_out = [Strategy()], []
    for size in _divisors(count):
        reason = _no_group(profile, cluster, size)
        if reason:
            left_out.append(LeftOut(label=f"TP={size}", reason=reason))
            continue
        for stages in _divisors(count // size):
            replicas = count // (size * stages)
            strategy = Strategy(data_parallel=replicas, tensor_parallel=size, pipeline_parallel=stages)
            if stages > profile.num_layers:
                reason = f"{stages} stages for {profile.num_layers} layers"
                left_out.append(LeftOut(label=strategy.label, reason=reason))
            elif strategy not in kept:
                kept.append(strategy)
    return tuple(kept), tuple(left_out)


def _no_group(profile: ModelProfile, cluster: Cluster, size: int) -> str:
    """Why devices can't be grouped so; empty if they can."""
    if size == 1:
        return ""
    sizes = cluster.node_sizes()
    if any(end % size for end in accumulate(sizes[:-1])):
        return f"a group would reach across {nodes_in_words(cluster)} devices"
    try:
        cluster.grouped(size)
        profile.sharded(size)
    except (HardwareError, WorkloadError) as error:
        return str(error).partition(";")[0].rstrip(".")
    return ""


def nodes_in_words(cluster: Cluster) -> str:
    """Sizes of the nodes: ``2 nodes of 8``, ``nodes of 8 + 4``."""
    sizes = cluster.node_sizes()
    if len(set(sizes)) == 1:
        return f"{len(sizes)} nodes of {sizes[0]}"
    return f"nodes of {' + '.join(map(str, sizes))}"


def _divisors(number: int) -> Iterator[int]:
    return (divisor for divisor in range(1, number + 1) if number % divisor == 0)
