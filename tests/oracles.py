"""Slow and obvious versions of what the planner computes: plain loops, every possibility tried."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from plain_stages import PlainStage, PlainStages

from lp_plugin import Cluster, Device, ModelProfile, Workload
from lp_plugin.objective import Constraints

INFINITE = float("inf")
NO_CONSTRAINTS = Constraints()


def all_cuts(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    """All boundaries without an empty stage."""
    for inner in itertools.combinations(range(1, num_layers), num_stages - 1):
        yield (0, *inner, num_layers)


@dataclass(frozen=True, order=True)
class Best:
    """A partition, as partitions are compared: the smallest is the best."""

    bottleneck: float
    """Cost of the most expensive stage."""
    spread: float
    """What that is above the cheapest."""
    boundaries: tuple[int, ...]


def brute_force(
    num_layers: int,
    num_stages: int,
    cost: Callable[[int, int, int], float | None],
    total_limit: float = INFINITE,
) -> Best | None:
    """Tries every partition; ``cost(stage, start, stop)`` is None where the stage can't hold the run."""
    known = {
        (stage, start, stop): cost(stage, start, stop)
        for stage in range(num_stages)
        for start in range(num_layers)
        for stop in range(start + 1, num_layers + 1)
    }
    found: list[Best] = []
    for bounds in all_cuts(num_layers, num_stages):
        costs = [known[stage, bounds[stage], bounds[stage + 1]] for stage in range(num_stages)]
        if None not in costs and sum(costs) <= total_limit:
            found.append(Best(max(costs), max(costs) - min(costs), bounds))
    return min(found, default=None)


def by_layer(
    num_layers: int, num_stages: int, cost: Callable[[int, int, int], float | None]
) -> tuple[float, float] | None:
    """Least bottleneck, and the most that the cheapest stage can cost with it: a program over all runs.

    Takes layers and stages one by one, so that it needs no trick and no array.
    """

    def best(choose: Callable[..., float], combine: Callable[..., float], none: float, bound: float) -> float:
        reached = [none if stop else combine() for stop in range(num_layers + 1)]
        for stage in range(num_stages):
            following = [none] * (num_layers + 1)
            for start in range(stage, num_layers):
                if reached[start] == none:
                    continue
                for stop in range(start + 1, num_layers + 1):
                    value = cost(stage, start, stop)
                    if value is not None and value <= bound:
                        following[stop] = choose(following[stop], combine(reached[start], value))
            reached = following
        return reached[num_layers]

    bottleneck = best(min, lambda *costs: max(costs, default=0.0), INFINITE, INFINITE)
    if bottleneck == INFINITE:
        return None
    return bottleneck, best(max, lambda *costs: min(costs, default=INFINITE), -INFINITE, bottleneck)


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


@dataclass(frozen=True, order=True)
class Passage:
    """One micro-batch on one stage, or on the link behind it, as simulated."""

    stage: int
    kind: str
    micro_batch: int
    start: float
    stop: float


def simulate_overlapped(
    stage_seconds: Sequence[float], hop_seconds: Sequence[float], num_micro_batches: int, buffers: float = INFINITE
) -> list[Passage]:
    """Events of a forward pipeline whose links work beside its stages, sorted.

    A stage needs a free buffer for its output, which is free again when it has been sent; a link needs one for what
    it brings, which is free again when the next stage has computed with it.
    """
    stages = len(stage_seconds)
    ready: dict[tuple[int, str], deque[int]] = {
        (s, kind): deque() for s in range(stages) for kind in ("forward", "send")
    }
    ready[0, "forward"].extend(range(num_micro_batches))
    outputs, inputs = [0] * stages, [0] * (stages + 1)
    busy: set[tuple[int, str]] = set()
    ends: list[tuple[float, int, Passage]] = []
    passages = []
    order = itertools.count()

    def may_start(stage: int, kind: str) -> bool:
        if not ready[stage, kind] or (stage, kind) in busy:
            return False
        if kind == "forward":
            return stage == stages - 1 or outputs[stage] < buffers
        return inputs[stage + 1] < buffers

    def start_what_can(now: float) -> None:
        for stage, kind in itertools.product(range(stages), ("forward", "send")):
            if may_start(stage, kind):
                busy.add((stage, kind))
                seconds = stage_seconds[stage] if kind == "forward" else hop_seconds[stage]
                passage = Passage(stage, kind, ready[stage, kind].popleft(), now, now + seconds)
                passages.append(passage)
                heapq.heappush(ends, (passage.stop, next(order), passage))
                if kind == "forward":
                    outputs[stage] += 1
                else:
                    inputs[stage + 1] += 1

    start_what_can(0.0)
    while ends:
        now, _, done = heapq.heappop(ends)
        busy.remove((done.stage, done.kind))
        if done.kind == "send":
            outputs[done.stage] -= 1
            ready[done.stage + 1, "forward"].append(done.micro_batch)
        else:
            inputs[done.stage] -= 1
            if done.stage < stages - 1:
                ready[done.stage, "send"].append(done.micro_batch)
        start_what_can(now)
        start_what_can(now)
    return sorted(passages)


@dataclass(frozen=True, order=True)
class BestPlan:
    """The best partition for an objective; the smallest is the best."""

    value: float
    """What the objective makes smallest."""
    bottleneck: float
    spread: float
    boundaries: tuple[int, ...]


def best_plan(
    stage: PlainStages, objective: str = "throughput", constraints: Constraints = NO_CONSTRAINTS
) -> BestPlan | None:
    """Every partition tried; None if none is within the memory and the constraints."""
    ranked = []
    for bounds in all_cuts(stage.profile.num_layers, len(stage.cluster.devices)):
        stages = [stage(position, *run) for position, run in enumerate(itertools.pairwise(bounds))]
        if within(stage, stages, constraints) and can_be_trained(stage, bounds):
            ranked.append(_ranked(stage, stages, bounds, objective))
    return min(ranked, default=None)


def _ranked(stage: PlainStages, stages: list[PlainStage], bounds: tuple[int, ...], objective: str) -> BestPlan:
    seconds = [plain.seconds for plain in stages]
    values = {
        "throughput": max(seconds),
        "latency": latency_of(seconds, stage.workload),
        "sequences": -min(plain.room for plain in stages),
        "memory": max(
            plain.memory_bytes / device.memory.usable_bytes
            for plain, device in zip(stages, stage.cluster.devices, strict=True)
        ),
    }
    return BestPlan(values[objective], max(seconds), max(seconds) - min(seconds), bounds)


def can_be_trained(stage: PlainStages, bounds: tuple[int, ...]) -> bool:
    """Whether each stage has something to train, where training is asked for and there are layers enough for that."""
    trained = [layer.parameters > 0 for layer in stage.profile.layers]
    if stage.workload.phase != "train" or sum(trained) < len(bounds) - 1:
        return True
    return all(any(trained[start:stop]) for start, stop in itertools.pairwise(bounds))


def within(stage: PlainStages, stages: list[PlainStage], constraints: Constraints) -> bool:
    """Whether a partition fits the memory and keeps to the constraints."""
    latency = constraints.max_latency_seconds
    return (
        all(_holds(plain, device, constraints) for plain, device in zip(stages, stage.cluster.devices, strict=True))
        and (latency is None or latency_of([plain.seconds for plain in stages], stage.workload) <= latency)
        and _is_fast([plain.seconds for plain in stages], stage.workload, constraints.min_tokens_per_second)
    )


def latency_of(seconds: list[float], workload: Workload) -> float:
    """A way through all stages; decoding, a turn: no stage can begin the next one before it has seen all."""
    if workload.phase != "decode":
        return sum(seconds)
    return max(sum(seconds), len(range(0, workload.batch, workload.micro_batch)) * max(seconds))


def _holds(plain: PlainStage, device: Device, constraints: Constraints) -> bool:
    most, room, tier = constraints.max_memory_bytes, constraints.min_sequences, constraints.tier
    return (
        plain.memory_bytes <= device.memory.usable_bytes
        and (most is None or plain.memory_bytes <= most)
        and (room is None or plain.room >= room)
        and (tier is None or plain.tier <= [level.name for level in device.tiers].index(tier))
    )


def _is_fast(seconds: list[float], workload: Workload, tokens_per_second: float | None) -> bool:
    slowest = len(range(0, workload.batch, workload.micro_batch)) * max(seconds)
    if workload.phase == "decode":  # a micro-batch's next token waits for its own way through all stages
        slowest = max(slowest, sum(seconds))
    tokens = workload.batch * (1 if workload.phase == "decode" else workload.sequence)
    return tokens_per_second is None or not slowest or tokens / slowest >= tokens_per_second


def emptiest_share(profile: ModelProfile, cluster: Cluster, workload: Workload) -> float:
    """Share of the memory that the fullest device uses at least, every partition tried."""
    stage = PlainStages(profile, cluster, workload)

    def share(position: int, start: int, stop: int) -> float:
        return stage(position, start, stop).memory_bytes / cluster.devices[position].memory.usable_bytes

    best = brute_force(profile.num_layers, len(cluster.devices), share)
    return INFINITE if best is None else best.bottleneck


def feasible(profile: ModelProfile, cluster: Cluster, workload: Workload) -> bool:
    """Whether any partition, with any micro-batch if it is left open, fits the memory."""
    sizes: Iterable[int] = range(1, workload.batch + 1) if workload.micro_batch is None else [workload.micro_batch]
    return any(emptiest_share(profile, cluster, workload.with_micro_batch(size)) <= 1 for size in sizes)
