"""Hypothesis strategies. Costs are whole numbers and rates powers of two, so that every float sum is exact."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

from lp_plugin import Cluster, Device, LayerCost, Link, MemoryTier, ModelProfile, Workload

STEADY = settings(deadline=None, derandomize=True, database=None, max_examples=100)
"""The same examples in every run, so that a failure is a change of the code."""

COUNTS = st.integers(0, 20)
RATES = st.sampled_from([1.0, 2.0, 4.0, 8.0])
FRACTIONS = st.sampled_from([0.25, 0.5, 1.0])
PHASES = st.sampled_from(["prefill", "decode", "train"])


@st.composite
def cost_profiles(draw: st.DrawFn, *, max_layers: int = 8, max_weight: int = 20) -> ModelProfile:
    """Profiles from plain numbers: measured seconds, weights, outputs."""
    count = draw(st.integers(1, max_layers))

    def column(largest: int) -> list[int]:
        return draw(st.lists(st.integers(0, largest), min_size=count, max_size=count))

    return ModelProfile.from_costs(column(20), weight_bytes=column(max_weight), output_bytes=column(10))


@st.composite
def layers(draw: st.DrawFn, index: int, shared: int) -> LayerCost:
    """A layer of any kind, with or without measured seconds, some of them sharing weights."""
    key = draw(st.sampled_from([None, None, "tied"])) if shared else None
    size = 2  # of an element, as in `profiles`
    num_experts, experts_per_token = draw(st.sampled_from([(0, 0), (0, 0), (2, 1), (4, 2), (4, 4)]))
    expert = draw(st.integers(1, 9)) * num_experts
    parameters = draw(COUNTS) + expert + (shared if key else 0)
    seconds = draw(st.sampled_from([None, None, None, 3.0, 8.0]))
    return LayerCost(
        name=f"layer {index}",
        kind=draw(st.sampled_from(["embedding", "block", "attention", "mlp", "norm", "head", "layer"])),
        block=draw(st.none() | st.just(index)),
        parameters=parameters,
        weight_bytes=parameters * size,
        shared_key=key,
        shared_bytes=shared * size if key else 0,
        weight_traffic_bytes=draw(st.sampled_from([0, (parameters - expert) * size])),
        traffic_bytes_per_token=draw(COUNTS),
        flops_per_token=draw(COUNTS),
        flops_per_pair=draw(COUNTS),
        flops_per_cross_pair=draw(st.sampled_from([0, 0, 3])),
        window=draw(st.none() | st.integers(1, 6)),
        causal=draw(st.sampled_from([True, True, False])),
        runs_once=draw(st.sampled_from([False, False, False, True])),
        output_bytes_per_token=draw(COUNTS | st.just(0.25)),
        buffer_bytes_per_token=draw(COUNTS | st.just(0.5)),
        kv_bytes_per_token=draw(COUNTS),
        kv_window=draw(st.none() | st.integers(1, 6)),
        expert_bytes=expert * size,
        expert_parameters=expert,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        saved_bytes_per_token=draw(COUNTS | st.just(2.5)),
        num_all_reduces=draw(st.integers(0, 2)),
        all_reduce_bytes_per_token=float(draw(COUNTS)),
        seconds=seconds,
        backward_seconds=draw(st.sampled_from([None, 5.0])) if seconds else None,
        resident_seconds=draw(st.sampled_from([None, 2.0, 4.0])) if seconds else None,
    )


@st.composite
def profiles(draw: st.DrawFn, *, min_layers: int = 1, max_layers: int = 6, tied: bool = True) -> ModelProfile:
    """Uneven profiles in float16 with every kind of cost."""
    shared = draw(st.integers(1, 20)) if tied else 0
    count = draw(st.integers(min_layers, max_layers))
    return ModelProfile(
        name="random",
        layers=tuple(draw(layers(index, shared)) for index in range(count)),
        dtype="float16",
        input_bytes_per_token=8.0,
    )


@st.composite
def links(draw: st.DrawFn) -> Link:
    """Links, some without latency."""
    latency = float(draw(st.integers(0, 8)))
    bandwidth = draw(RATES)
    return Link(
        name="wire",
        latency_seconds=latency,
        bandwidth_bytes_per_second=bandwidth,
        bandwidth_efficiency=draw(FRACTIONS),
        collective_efficiency=draw(FRACTIONS),
    )


@st.composite
def devices(draw: st.DrawFn, *, max_tiers: int = 3, roomy: bool = False) -> Device:
    """Devices whose larger tiers are slower."""
    count = draw(st.integers(1, max_tiers))
    capacity, usable = 0, draw(FRACTIONS)
    speeds = sorted(draw(st.lists(RATES, min_size=count, max_size=count)), reverse=True)
    tiers = []
    for index in range(count):
        capacity += draw(st.integers(1, 1000)) + (100_000 if roomy and index == count - 1 else 0)
        tiers.append(
            MemoryTier(
                name=f"tier{index}",
                capacity_bytes=4 * capacity,
                bandwidth_bytes_per_second=speeds[index],
                usable_fraction=usable,
            )
        )
    return Device(
        name=draw(st.sampled_from(["small", "large"])),
        tiers=tuple(tiers),
        peak_flops=(("float16", draw(RATES)), ("float32", draw(RATES))),
        compute_efficiency=draw(FRACTIONS),
        layer_overhead_seconds=float(draw(st.integers(0, 50))),
    )


@st.composite
def clusters(
    draw: st.DrawFn,
    *,
    max_devices: int = 4,
    max_tiers: int = 3,
    equal: bool = False,
    roomy: bool = False,
    groups: bool = False,
) -> Cluster:
    """Clusters of equal or unequal devices and links; with ``groups`` a stage may be a group of devices."""
    count = draw(st.integers(1, max_devices))
    device = devices(max_tiers=max_tiers, roomy=roomy)
    if equal:
        return Cluster.homogeneous(draw(device), count, draw(links()))
    chosen = draw(st.lists(device, min_size=count, max_size=count))
    wires = draw(st.lists(links(), min_size=count - 1, max_size=count - 1))
    size = draw(st.sampled_from([1, 2, 4])) if groups else 1
    inner = draw(st.lists(links(), min_size=count, max_size=count)) if size > 1 else []
    return Cluster(devices=tuple(chosen), links=tuple(wires), group_size=size, group_links=tuple(inner))


@st.composite
def workloads(draw: st.DrawFn, *, phase: str | None = None, cut: bool = True, max_batch: int = 8) -> Workload:
    """Small workloads; the micro-batch chosen if ``cut``, else left open."""
    batch = draw(st.integers(1, max_batch))
    chosen = phase or draw(PHASES)
    training = {}
    if chosen == "train":
        training = {
            "checkpointing": draw(st.booleans()),
            "zero_stage": draw(st.integers(0, 1)),
            "float32_gradients": draw(st.booleans()),
            "data_parallel": draw(st.sampled_from([1, 3, 4])),
        }
    return Workload(
        phase=chosen,
        batch=batch,
        sequence=draw(st.integers(1, 8)),
        micro_batch=draw(st.integers(1, batch)) if cut else None,
        **training,
    )
