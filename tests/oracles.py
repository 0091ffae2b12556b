"""Slow and obvious versions of what the planner computes: plain loops, every possibility tried."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lp_plugin import Cluster, Device, LayerCost, ModelProfile, Workload

INFINITE = float("inf")


def all_cuts(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    """All boundaries without an empty stage."""
    for inner in itertools.combinations(range(1, num_layers), num_stages - 1):
        yield (0, *inner, num_layers)


@dataclass(frozen=True)
class Best:
    """What trying every partition finds."""

    bottleneck: float
    squares: float
    """Least sum of squared stage costs among the partitions with the least bottleneck."""
    boundaries: tuple[tuple[int, ...], ...]
    """All partitions with the least bottleneck and the least sum of squares."""


def brute_force(
    num_layers: int,
    num_stages: int,
    cost: Callable[[int, int, int], float | None],
) -> Best | None:
    """Tries every partition; ``cost(stage, start, stop)`` is None where the stage can't hold the run."""
    known = {
        (stage, start, stop): cost(stage, start, stop)
        for stage in range(num_stages)
        for start in range(num_layers)
        for stop in range(start + 1, num_layers + 1)
    }
    found: list[tuple[float, float, tuple[int, ...]]] = []
    for bounds in all_cuts(num_layers, num_stages):
        costs = [known[stage, bounds[stage], bounds[stage + 1]] for stage in range(num_stages)]
        if None not in costs:
            found.append((max(costs), sum(value**2 for value in costs), bounds))
    if not found:
        return None
    bottleneck, squares, _ = min(found)
    return Best(bottleneck, squares, tuple(bounds for *key, bounds in found if key == [bottleneck, squares]))


def parametric_search(weights: Sequence[int], num_stages: int) -> int:
    """Least bottleneck of equal stages over whole numbers: bisection, each stage filled as far as it goes."""

    def stages_needed(bound: int) -> int:
        needed, room = 1, bound
        for weight in weights:
            if weight > room:
                needed, room = needed + 1, bound
            room -= weight
        return needed

    low, high = max(weights), sum(weights)
    while low < high:
        middle = (low + high) // 2
        if stages_needed(middle) <= num_stages:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(frozen=True)
class Visit:
    """One micro-batch on one stage, as simulated."""

    stage: int
    micro_batch: int
    start: float
    stop: float


def simulate(stage_seconds: Sequence[float], num_micro_batches: int, rounds: int = 1) -> list[Visit]:
    """Events of a forward pipeline, one after the other; with ``rounds`` a micro-batch re-enters at the end."""
    waiting: list[deque[tuple[int, int]]] = [deque() for _ in stage_seconds]
    waiting[0].extend((0, micro_batch) for micro_batch in range(num_micro_batches))
    busy = [False] * len(stage_seconds)
    ends: list[tuple[float, int, int, int, int]] = []
    visits = []
    order = itertools.count()

    def start_what_can(now: float) -> None:
        for stage, queue in enumerate(waiting):
            if queue and not busy[stage]:
                turn, micro_batch = queue.popleft()
                busy[stage] = True
                stop = now + stage_seconds[stage]
                visits.append(Visit(stage, micro_batch, now, stop))
                heapq.heappush(ends, (stop, next(order), stage, turn, micro_batch))

    start_what_can(0.0)
    while ends:
        now = ends[0][0]
        while ends and ends[0][0] == now:
            _, _, stage, turn, micro_batch = heapq.heappop(ends)
            busy[stage] = False
            if stage + 1 < len(waiting):
                waiting[stage + 1].append((turn, micro_batch))
            elif turn + 1 < rounds:
                waiting[0].append((turn + 1, micro_batch))
        start_what_can(now)
    return visits


def count_pairs(sequence: int, window: int | None, phase: str) -> int:
    """(query, key) pairs of one sequence, counted one by one."""
    queries = [sequence - 1] if phase == "decode" else range(sequence)
    count = 0
    for query in queries:
        for key in range(sequence):
            if key <= query and (window is None or query - key < window):
                count += 1
    return count


@dataclass(frozen=True)
class PlainStage:
    """One stage's cost, by kind."""

    compute_seconds: float
    transfer_seconds: float
    weight_bytes: float
    kv_bytes: float
    activation_bytes: float
    buffer_bytes: float
    training_bytes: float
    working_set_bytes: float
    tier: int

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.transfer_seconds

    @property
    def memory_bytes(self) -> float:
        kinds = (self.weight_bytes, self.kv_bytes, self.activation_bytes, self.buffer_bytes, self.training_bytes)
        return sum(kinds)


def plain_stage(
    profile: ModelProfile, cluster: Cluster, workload: Workload, position: int, start: int, stop: int
) -> PlainStage:
    """Seconds and bytes of layers ``start .. stop - 1`` on device ``position``, layer by layer."""
    device = cluster.devices[position]
    last = len(cluster.devices) - 1
    train, decode = workload.phase == "train", workload.phase == "decode"
    micro_batch, batch = workload.micro_batch, workload.batch
    tokens = micro_batch * (1 if decode else workload.sequence)
    layers = profile.layers[start:stop]

    in_and_out, largest_buffer = 0.0, 0.0
    for index in range(start, stop):
        arriving = profile.layers[index - 1].output_bytes_per_token if index else profile.input_bytes_per_token
        leaving = profile.layers[index].output_bytes_per_token
        in_and_out = max(in_and_out, (arriving + leaving) * tokens)
        largest_buffer = max(largest_buffer, profile.layers[index].buffer_bytes_per_token * tokens)

    weights, cache, touched, state, waiting = 0.0, 0.0, 0.0, 0.0, 0.0
    seen: set[str] = set()
    for layer in layers:
        weights += layer.weight_bytes
        again = layer.shared_bytes if layer.shared_key in seen else 0
        weights -= again
        if layer.shared_key is not None:
            seen.add(layer.shared_key)
        kept = _kept_per_sequence(layer, workload)
        cache += kept * batch
        touched += layer.weight_traffic_bytes + kept * micro_batch
        if train:
            adam = 8 if profile.dtype == "float32" else 12  # two moments, and master weights beside 16 bit
            element = 4 if profile.dtype == "float32" else 2
            state += layer.weight_bytes - again + adam * (layer.parameters - again / element)
            waiting += (layer.output_bytes_per_token + layer.buffer_bytes_per_token) * tokens
    micro_batches = len(range(0, batch, micro_batch))
    in_flight = min(last + 1 - position, micro_batches) if train else 0

    working_set = touched + in_and_out + largest_buffer
    tier = len(device.tiers) - 1
    while tier > 0 and working_set <= device.tiers[tier - 1].usable_bytes:
        tier -= 1

    transfers = 0.0
    if position > 0:
        arriving = profile.layers[start - 1].output_bytes_per_token if start else profile.input_bytes_per_token
        transfers += cluster.links[position - 1].seconds(arriving * tokens)
    if position < last:
        transfers += cluster.links[position].seconds(profile.layers[stop - 1].output_bytes_per_token * tokens)

    return PlainStage(
        compute_seconds=sum(_layer_seconds(profile, layer, device, tier, workload) for layer in layers),
        transfer_seconds=transfers * (2 if train else 1),
        weight_bytes=weights,
        kv_bytes=cache,
        activation_bytes=in_and_out + in_flight * waiting,
        buffer_bytes=in_and_out + largest_buffer,
        training_bytes=state,
        working_set_bytes=working_set,
        tier=tier,
    )


def _kept_per_sequence(layer: LayerCost, workload: Workload) -> int:
    if workload.phase != "decode":
        return 0
    kept = workload.sequence if layer.window is None else min(layer.window, workload.sequence)
    return layer.kv_bytes_per_token * kept


def _layer_seconds(profile: ModelProfile, layer: LayerCost, device: Device, tier: int, workload: Workload) -> float:
    train = workload.phase == "train"
    if layer.seconds is not None:
        backward = 2 * layer.seconds if layer.backward_seconds is None else layer.backward_seconds
        return layer.seconds + (backward if train else 0)
    micro_batch = workload.micro_batch
    tokens = micro_batch * (1 if workload.phase == "decode" else workload.sequence)
    passes = 3 if train else 1
    products = layer.flops_per_token * tokens
    products += layer.flops_per_pair * micro_batch * count_pairs(workload.sequence, layer.window, workload.phase)
    moved = layer.weight_traffic_bytes + layer.traffic_bytes_per_token * tokens
    moved += _kept_per_sequence(layer, workload) * micro_batch
    return max(
        passes * products / (dict(device.peak_flops)[profile.dtype] * device.compute_efficiency),
        passes * moved / (device.tiers[tier].bandwidth_bytes_per_second * device.tiers[tier].bandwidth_efficiency),
        device.layer_overhead_seconds if layer.kind == "block" else 0.0,
    )


def best_plan(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Best | None:
    """The least bottleneck in the fastest tier that has a partition, every partition tried."""
    cache: dict[tuple[int, int, int], PlainStage] = {}

    def stage(position: int, start: int, stop: int) -> PlainStage:
        key = (position, start, stop)
        if key not in cache:
            cache[key] = plain_stage(profile, cluster, workload, position, start, stop)
        return cache[key]

    for slowest in range(max(len(device.tiers) for device in cluster.devices)):

        def cost(position: int, start: int, stop: int, slowest: int = slowest) -> float | None:
            costs = stage(position, start, stop)
            fits = costs.memory_bytes <= cluster.devices[position].memory.usable_bytes and costs.tier <= slowest
            return costs.seconds if fits else None

        best = brute_force(profile.num_layers, len(cluster.devices), cost)
        if best is not None:
            return best
    return None


def emptiest_share(profile: ModelProfile, cluster: Cluster, workload: Workload) -> float:
    """Share of the memory that the fullest device uses at least, every partition tried."""

    def share(position: int, start: int, stop: int) -> float:
        costs = plain_stage(profile, cluster, workload, position, start, stop)
        return costs.memory_bytes / cluster.devices[position].memory.usable_bytes

    best = brute_force(profile.num_layers, len(cluster.devices), share)
    return INFINITE if best is None else best.bottleneck


def feasible(profile: ModelProfile, cluster: Cluster, workload: Workload) -> bool:
    """Whether any partition, with any micro-batch if it is left open, fits the memory."""
    sizes: Iterable[int] = range(1, workload.batch + 1) if workload.micro_batch is None else [workload.micro_batch]
    return any(emptiest_share(profile, cluster, workload.with_micro_batch(size)) <= 1 for size in sizes)
