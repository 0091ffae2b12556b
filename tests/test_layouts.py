"""Layouts: every way to lay a model over a cluster is tried, or left out with a reason."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from dense16 import dense
from small_cases import FREE, device

from lp_plugin import Cluster, ModelProfile
from lp_plugin.strategy.layouts import Strategy, layouts, nodes_in_words


@pytest.mark.parametrize("count", [1, 2, 6, 8, 12, 16, 24, 32])
def test_every_layout_is_tried_or_left_out_with_a_reason(count: int) -> None:
    """Eight devices to a node, 16 heads, 19 layers; a group may not reach across nodes."""
    kept, left_out = layouts(dense(), Cluster.parse(f"h100-sxm:{count}"))
    expected = {Strategy()}
    refused = set()
    for replicas, size, stages in itertools.product(range(1, count + 1), repeat=3):
        if replicas * size * stages != count:
            continue
        strategy = Strategy(data_parallel=replicas, tensor_parallel=size, pipeline_parallel=stages)
        inside = all(first // 8 == (first + size - 1) // 8 for first in range(0, count, size))
        if not inside or 16 % size:
            refused.add(f"TP={size}")
        elif stages > 19:
            refused.add(strategy.label)
        else:
            expected.add(strategy)
    assert set(kept) == expected
    assert len(kept) == len(expected)
    assert {layout.label for layout in left_out} == refused
    assert all(layout.reason and len(layout.reason) < 120 for layout in left_out)


def test_reasons_for_leaving_out_name_the_cause() -> None:
    def reasons(profile: ModelProfile, cluster: Cluster) -> dict[str, str]:
        return {layout.label: layout.reason for layout in layouts(profile, cluster)[1]}

    assert "2 nodes of 8" in reasons(dense(), Cluster.parse("h100-sxm:16"))["TP=16"]
    assert "24 stages for 19 layers" in reasons(dense(), Cluster.parse("h100-sxm:24"))["PP=24"]
    assert "3" in reasons(dense(), Cluster.parse("h100-sxm:3"))["TP=3"]
    other = dataclasses.replace(device(1000), name="other")
    mixed = Cluster(devices=(device(1000), other), links=(FREE,))
    assert "other" in reasons(ModelProfile.from_costs([1.0, 1.0]), mixed)["TP=2"]
    plain = Cluster.homogeneous(device(1000), 2, FREE)
    assert "costs" in reasons(ModelProfile.from_costs([1.0, 1.0]), plain)["TP=2"]


def test_nodes_in_words() -> None:
    assert nodes_in_words(Cluster.parse("h100-sxm:16")) == "2 nodes of 8"
    assert nodes_in_words(Cluster.parse("h100-sxm:12")) == "nodes of 8 + 4"


@pytest.mark.parametrize(
    ("strategy", "label", "kind"),
    [
        (Strategy(), "1 device", "1 device"),
        (Strategy(data_parallel=16), "DP=16", "DP"),
        (Strategy(tensor_parallel=8, pipeline_parallel=2), "TP=8 x PP=2", "TP x PP"),
        (Strategy(data_parallel=2, tensor_parallel=4, pipeline_parallel=2), "DP=2 x TP=4 x PP=2", "DP x TP x PP"),
    ],
)
def test_labels(strategy: Strategy, label: str, kind: str) -> None:
    assert (strategy.label, strategy.kind) == (label, kind)
