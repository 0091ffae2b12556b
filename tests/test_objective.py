"""Constraints: what they refuse, and how they read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lp_plugin import Cluster, HardwareError, ModelProfile, Workload, WorkloadError, make_plan
from lp_plugin.objective import Constraints
from lp_plugin.quantity import shown
from lp_plugin.solver.solve import solve

NUMBERS = ("max_latency_seconds", "min_tokens_per_second")
WHOLE = ("min_sequences", "max_memory_bytes")
NO_NUMBERS = [
    0,
    -1,
    -0.5,
    0.0,
    math.nan,
    math.inf,
    -math.inf,
    True,
    False,
    "8",
    b"8",
    [1],
    10**400,
    -(10**400),
    10**5000,
    1j,
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=shown)
@pytest.mark.parametrize("name", NUMBERS)
def test_bounds_are_finite_numbers_over_zero(name: str, value: Any) -> None:
    with pytest.raises(WorkloadError, match=f"{name} is .*; it must be a number over 0 and finite, or left out"):
        Constraints(**{name: value})


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1.0, 2.5, 2**53 + 1], ids=shown)
@pytest.mark.parametrize("name", WHOLE)
def test_counts_are_whole_numbers_from_one(name: str, value: Any) -> None:
    with pytest.raises(WorkloadError, match=f"{name} is .*; it must be a whole number of 1 to 9,007,199,254,740,992"):
        Constraints(**{name: value})


@pytest.mark.parametrize("value", ["", 5, True, math.nan, [], ["l2"], b"l2", 10**5000], ids=shown)
def test_a_tier_is_named(value: Any) -> None:
    with pytest.raises(WorkloadError, match=r"tier is .*; it must be the name of a memory tier"):
        Constraints(tier=value)


@pytest.mark.parametrize("value", [5e-324, 1e-300, 1, 1.5, np.float64(2.0), 10**300, 1.7e308])
def test_any_size_of_number_can_be_planned_with(value: float) -> None:
    """Whether it can be kept or not, there is an answer."""
    profile, cluster = ModelProfile.from_costs([1e-9] * 4), Cluster.homogeneous("h200", 2)
    for phase in ("prefill", "decode", "train"):
        workload = Workload(phase=phase, batch=4, sequence=1, micro_batch=2)
        latency = Constraints(max_latency_seconds=value)
        assert type(latency.max_latency_seconds) is float
        assert (solve(profile, cluster, workload, "throughput", latency) is None) is bool(value < 1e-9)
        rate = Constraints(min_tokens_per_second=value)
        assert (solve(profile, cluster, workload, "throughput", rate) is None) is bool(value > 1e9)


def test_the_bounds_that_are_given_in_words() -> None:
    assert Constraints().given == ()
    assert Constraints().as_text() == ""
    every = Constraints(
        max_latency_seconds=0.25, min_tokens_per_second=12_345, min_sequences=64, max_memory_bytes=10**9, tier="l2"
    )
    assert every.given == (*NUMBERS, *WHOLE, "tier")
    assert every.as_text() == (
        "latency at most 250 ms, at least 12,345 tokens/s, room for 64 sequences, at most 1.00 GB per device, "
        "every stage in tier l2"
    )


def test_a_tier_that_no_device_has_is_refused() -> None:
    with pytest.raises(HardwareError, match="h200 has no memory tier 'l9'"):
        make_plan(
            ModelProfile.from_costs([1, 1]),
            Cluster.homogeneous("h200", 2),
            Workload(batch=1, sequence=1),
            constraints=Constraints(tier="l9"),
        )
