"""Small planning problems of every kind, made fast; whole numbers and powers of two, so that every sum is exact."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from oracles import all_cuts, latency_of
from plain_stages import PlainStages

from lp_plugin import Cluster, Device, LayerCost, Link, MemoryTier, ModelProfile, Workload
from lp_plugin.objective import Constraints

OBJECTIVES = ("throughput", "latency", "sequences", "memory")
PHASES = ("prefill", "decode", "train")
ROUTING = ((0, 0), (0, 0), (2, 1), (4, 2), (4, 3), (4, 4))  # experts, and those that a token passes


def random_profile(rng: random.Random, sizes: Sequence[int] = (1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8)) -> ModelProfile:
    """A chain of whole blocks, of attention and MLP in turn, or of anything; some with measured seconds."""
    count, shape = rng.choice(sizes), rng.randrange(3)
    kinds = ["layer"] * count
    if shape == 1:
        kinds = ["embedding", *["block"] * count, "head"][: max(count, 1)]
    elif shape == 2:
        kinds = ["embedding", *["attention", "mlp"] * count][:count]
    size, shared = rng.choice([2, 4]), rng.randrange(9)
    chosen = rng.randrange(2)  # measured seconds for all layers, or costs of every kind
    layers = []
    for index, kind in enumerate(kinds):
        own, tied = rng.randrange(20), shared and rng.random() < 0.3
        experts, picked = rng.choice(ROUTING) if kind in {"mlp", "block"} else (0, 0)
        expert = rng.randrange(1, 9) * experts
        parameters = own + expert + (shared if tied else 0)
        attends = kind in {"attention", "block", "layer"}
        layers.append(
            LayerCost(
                name=f"{kind} {index}",
                kind=kind,
                block=index,
                parameters=parameters,
                weight_bytes=parameters * size,
                shared_key="tied" if tied else None,
                shared_bytes=shared * size if tied else 0,
                weight_traffic_bytes=rng.choice([0, (parameters - expert) * size]),
                traffic_bytes_per_token=rng.randrange(20),
                flops_per_token=rng.randrange(20),
                flops_per_pair=rng.randrange(6) if attends else 0,
                flops_per_cross_pair=rng.choice([0, 0, 3]) if attends else 0,
                window=rng.choice([None, None, 1, 2, 3]),
                causal=rng.random() < 0.7,
                runs_once=rng.random() < 0.1,
                output_bytes_per_token=rng.choice([4.0, 4.0, 0.0, 0.25, 9.0]),
                buffer_bytes_per_token=rng.choice([0, 0.5, 3, 12]),
                kv_bytes_per_token=rng.choice([0, 3, 8]) if attends else 0,
                kv_window=rng.choice([None, None, 2]),
                expert_bytes=expert * size,
                num_experts=experts,
                experts_per_token=picked,
                saved_bytes_per_token=rng.choice([0, 2.5, 10]),
                num_all_reduces=rng.choice([0, 1, 2]),
                all_reduce_bytes_per_token=float(rng.randrange(8)),
                seconds=float(rng.randrange(40)) if chosen and rng.random() < 0.9 else None,
                backward_seconds=rng.choice([None, 5.0]) if chosen else None,
            )
        )
    dtype = "float16" if size == 2 else "float32"
    return ModelProfile(name="random", layers=tuple(layers), dtype=dtype, input_bytes_per_token=8.0)


def random_device(rng: random.Random, name: str, memory: int) -> Device:
    """A device of one to three tiers, whose larger tiers are slower."""
    capacities = sorted(memory * size for size in rng.sample(range(40, 1200), rng.randint(1, 3)))
    capacities[-1] += rng.choice([0, 400, 1500, 10_000, 10_000])
    rates = sorted((rng.choice([2.0, 4.0, 8.0]) for _ in capacities), reverse=True)
    names = ["l2", "hbm", "host"][: len(capacities) - 1]
    tiers = tuple(
        MemoryTier(name=tier, capacity_bytes=capacity, bandwidth_bytes_per_second=rate, usable_fraction=0.5)
        for tier, capacity, rate in zip([*names, "last"], capacities, rates, strict=True)
    )
    return Device(
        name=name,
        tiers=tiers,
        peak_flops=(("float16", rng.choice([1.0, 2.0, 4.0])), ("float32", rng.choice([1.0, 2.0]))),
        compute_efficiency=0.5,
        layer_overhead_seconds=rng.choice([0.0, 8.0]),
    )


def random_link(rng: random.Random) -> Link:
    return Link(
        name="wire",
        latency_seconds=float(rng.choice([0, 0, 1, 6])),
        bandwidth_bytes_per_second=rng.choice([0.5, 1.0, 4.0, 16.0]),
        collective_efficiency=0.5,
    )


def random_cluster(rng: random.Random, num_layers: int, memory: int = 1) -> Cluster:
    """Equal or unequal devices and links, each stage one device or a group of them; ``memory`` times as large."""
    count = min(rng.choice([1, 2, 2, 3, 3, 4, 4, 5, 5]), num_layers)
    devices = [random_device(rng, f"device {index}", memory) for index in range(count)]
    wires = [random_link(rng) for _ in range(count - 1)]
    group_size = rng.choice([1, 1, 1, 2, 4])
    if rng.random() < 0.5:
        devices = devices[:1] * count
    elif rng.random() < 0.5:
        devices = [rng.choice(devices[:2]) for _ in devices]
    if rng.random() < 0.5:
        wires = wires[:1] * (count - 1)
    return Cluster(
        devices=tuple(devices),
        links=tuple(wires),
        group_size=group_size,
        group_links=tuple(random_link(rng) for _ in devices) if group_size > 1 else (),
    )


def random_workload(rng: random.Random) -> Workload:
    phase, batch = rng.choice(PHASES), rng.randint(1, 4)
    training = {}
    if phase == "train":
        training = {
            "checkpointing": rng.random() < 0.5,
            "zero_stage": rng.randrange(2),
            "float32_gradients": rng.random() < 0.5,
            "data_parallel": rng.choice([1, 2, 4]),
        }
    return Workload(phase=phase, batch=batch, sequence=rng.randint(1, 4), micro_batch=rng.randint(1, batch), **training)


def random_constraints(rng: random.Random, stage: PlainStages) -> Constraints:
    """None, or some that a partition taken at random just keeps to, or just doesn't."""
    names = ("max_latency_seconds", "min_tokens_per_second", "min_sequences", "max_memory_bytes", "tier")
    wanted = rng.sample(names, rng.choice([0, 1, 1, 2, 3]))
    cuts = list(all_cuts(stage.profile.num_layers, len(stage.cluster.devices)))
    given: dict[str, object] = {}
    for name in wanted:
        bounds = rng.choice(cuts)
        stages = [stage(position, *run) for position, run in enumerate(pairwise(bounds))]
        slowest = max(plain.seconds for plain in stages)
        if name == "max_latency_seconds":
            through = latency_of([plain.seconds for plain in stages], stage.workload)
            given[name] = through * rng.choice([1, 1, 0.75, 1.5])
        elif name == "min_tokens_per_second" and slowest:
            micro_batches = -(-stage.workload.batch // stage.workload.micro_batch)
            given[name] = stage.workload.total_tokens / (slowest * micro_batches) * rng.choice([1, 1, 0.5, 1.5])
        elif name == "min_sequences" and stage.workload.phase != "train":
            room = min(plain.room for plain in stages)
            given[name] = int(min(room, 1000)) + rng.choice([0, 0, 1])
        elif name == "max_memory_bytes":
            given[name] = max(plain.memory_bytes for plain in stages) - rng.choice([0, 0, 1])
        elif name == "tier":
            given[name] = _common_tier(rng, stage.cluster)
    return Constraints(**{name: value for name, value in given.items() if value is not None and _over_zero(value)})


def _over_zero(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, int | float) and value > 0)


def _common_tier(rng: random.Random, cluster: Cluster) -> str | None:
    names = [{tier.name for tier in device.tiers} for device in cluster.devices]
    common = sorted(set.intersection(*names))
    return rng.choice(common) if common else None
