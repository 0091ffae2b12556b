"""What one strategy gives for a workload: tokens per second, latency, room, and what bounds them.

Replicas share the batch equally; the slowest one counts. A decode batch that does not fit is cut down to the most
sequences that do. Training adds one all-reduce of the gradients between the replicas per step, after the backward
passes: its overlap with them is not modelled.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import reduce

import numpy as np

from lp_plugin.hardware import Cluster, slower_link
from lp_plugin.model import ModelProfile
from lp_plugin.objective import Constraints
from lp_plugin.plan import Plan
from lp_plugin.quantity import format_bytes
from lp_plugin.schedule import bubble_bound
from lp_plugin.solver.layer_table import LayerTable
from lp_plugin.solver.solve import emptiest, fits, solve
from lp_plugin.strategy.layouts import Strategy
from lp_plugin.workload import Workload

__all__ = ["Outcome", "Outcomes", "roofline_tokens_per_second"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One strategy with one number of micro-batches."""

    strategy: Strategy
    """What the devices do."""
    plan: Plan | None = None
    """Of the slowest replica, for its share of the batch; None if nothing fits."""
    reason: str = ""
    """Why nothing fits."""
    sequences: int = 0
    """In flight in all replicas together; less than the batch where its KV cache does not fit."""
    tokens_per_second: float = 0.0
    """Of all replicas together."""
    latency_seconds: float = math.inf
    """Prefill: one micro-batch through an idle machine; decode: one token of a sequence; training: a step."""
    max_sequences: int | None = None
    """Sequences of the workload's length whose KV cache fits in all replicas; None if none is kept."""
    memory_share: float = 0.0
    """Share of its usable memory that the fullest device needs; over 1 if that is why nothing fits."""
    communication_share: float = 0.0
    """Share of the devices' time in transfers and all-reduces."""
    bubble: float = 0.0
    """Share of the devices' time in which stages wait."""
    gradient_seconds: float = 0.0
    """Seconds per step of the gradients' all-reduce between replicas."""
    schedule_bound: float = 1.0
    """Share of its slowest stage's rate that the pipeline can reach: m / (m + p - 1), decoding min(1, m / p)."""
    roofline_tokens_per_second: float = math.inf
    """What the whole cluster could do with this many sequences at its peak; see `roofline_tokens_per_second`."""
    dram_bytes_per_token: float = 0.0
    """Bytes that all devices fetch from beyond their first tier, per token; a prediction."""
    weight_bytes_per_token: float = 0.0
    """Bytes of weights that all devices read, per token, wherever they lie."""
    on_front: bool = False
    """No other outcome of the comparison is as good in every respect and better in one."""

    @property
    def fits(self) -> bool:
        """Whether there is a plan."""
        return self.plan is not None

    @property
    def num_micro_batches(self) -> int:
        """Of each replica; 0 if nothing fits."""
        return self.plan.num_micro_batches if self.plan is not None else 0

    @property
    def micro_batch(self) -> int:
        """Sequences in each; 0 if nothing fits."""
        return self.plan.workload.chosen_micro_batch if self.plan is not None else 0

    @property
    def roofline_share(self) -> float:
        """Part of the whole cluster's roofline that is reached; 0 if nothing bounds it."""
        bounded = self.roofline_tokens_per_second < math.inf
        return self.tokens_per_second / self.roofline_tokens_per_second if bounded else 0.0


class Outcomes:
    """Outcomes of strategies on one cluster, each computed once.

    Args:
        profile: The layers, whole.
        cluster: All devices.
        workload: Its batch is that of all replicas together.
        constraints: Of all replicas together.
    """

    def __init__(self, profile: ModelProfile, cluster: Cluster, workload: Workload, constraints: Constraints) -> None:
        self.profile = profile
        self.cluster = cluster
        self.workload = workload
        self.constraints = constraints
        no_rates = {"min_tokens_per_second": None, "max_latency_seconds": None, "min_sequences": None}
        self._memory_limits = dataclasses.replace(constraints, **no_rates)
        self._sharded: dict[int, ModelProfile] = {1: profile}
        self._replicas: dict[Strategy, tuple[Cluster, ...]] = {}
        self._rooms: dict[tuple[Strategy, int], int] = {}
        self._made: dict[tuple[Strategy, int], Outcome | None] = {}
        self._described: dict[tuple[Strategy, int, int], Outcome | None] = {}
        self._rooflines: dict[int, float] = {}

    def share(self, strategy: Strategy) -> int:
        """Sequences of the batch for each replica."""
        return -(-self.workload.batch // strategy.data_parallel)

    def cuts(self, strategy: Strategy) -> list[int]:
        """Numbers of micro-batches worth trying: powers of two, one per stage, one per sequence; or as given."""
        share, given = self.share(strategy), self.workload.micro_batch
        if given is not None:
            return [-(-share // min(given, share))]
        powers = {1 << exponent for exponent in range(share.bit_length())}
        return sorted({*powers, min(strategy.pipeline_parallel, share), share})

    def at(self, strategy: Strategy, num_micro_batches: int) -> Outcome | None:
        """With each replica's share cut into at most so many micro-batches; None if that does not fit."""
        key = (strategy, num_micro_batches)
        if key not in self._made:
            self._made[key] = self._make(strategy, num_micro_batches)
        return self._made[key]

    def misfit(self, strategy: Strategy) -> Outcome:
        """The outcome of a strategy of which no cut fits, with the reason."""
        share = self.share(strategy)
        micro_batch = min(self.workload.micro_batch or 1, share)
        workload = self._workload(strategy, micro_batch if self.workload.phase == "decode" else share, micro_batch)
        plans = [emptiest(self._profile(strategy), replica, workload) for replica in self._parts(strategy)]
        stages = [stage for plan in plans for stage in plan.stages]
        worst = max(stages, key=lambda stage: stage.memory_bytes / stage.capacity_bytes)
        needed, usable = format_bytes(worst.memory_bytes), format_bytes(worst.capacity_bytes)
        reason = f"needs {needed} on a device with {usable} usable"
        if all(fits(plan) for plan in plans):
            reason = f"can't be cut so that it keeps to: {self.constraints.as_text()}"
        return Outcome(strategy=strategy, reason=reason, memory_share=worst.memory_bytes / worst.capacity_bytes)

    def _make(self, strategy: Strategy, cuts: int) -> Outcome | None:
        sequences = self.share(strategy)
        if self.workload.phase == "decode":
            sequences = min(sequences, self._room(strategy, 1))
        outcome = self._outcome(strategy, sequences, cuts) if sequences else None
        if outcome is not None or self.workload.phase != "decode":
            return outcome
        sequences = self._most_sequences(strategy, cuts, sequences)
        return self._outcome(strategy, sequences, cuts) if sequences else None

    def _micro_batch(self, sequences: int, cuts: int) -> int:
        given = self.workload.micro_batch
        return min(given, sequences) if given is not None else -(-sequences // cuts)

    def _most_sequences(self, strategy: Strategy, cuts: int, high: int) -> int:
        """Most sequences of a replica, at most ``high``, that fit in so many micro-batches; 0 if none does."""

        def room(sequences: int) -> int:
            return self._room(strategy, self._micro_batch(sequences, cuts))

        low = min(high, room(high)) if high else 0  # fits: fewer sequences are no larger micro-batches
        while low < high:
            middle = (low + high + 1) // 2
            if room(middle) >= middle:
                low = middle
            else:
                high = middle - 1
        return low

    def _room(self, strategy: Strategy, micro_batch: int) -> int:
        """Sequences whose KV cache fits each replica beside micro-batches of that size."""
        key = (strategy, micro_batch)
        if key not in self._rooms:
            workload = self._workload(strategy, micro_batch, micro_batch)
            rooms = []
            for replica in self._parts(strategy):
                plan = solve(self._profile(strategy), replica, workload, "sequences", self._memory_limits)
                most = self.share(strategy) if plan is None or plan.max_sequences is None else plan.max_sequences
                rooms.append(most if plan is not None else 0)
            self._rooms[key] = min(rooms)
        return self._rooms[key]

    def _outcome(self, strategy: Strategy, sequences: int, cuts: int) -> Outcome | None:
        key = (strategy, sequences, self._micro_batch(sequences, cuts))
        if key not in self._described:
            self._described[key] = self._solved(*key)
        return self._described[key]

    def _solved(self, strategy: Strategy, sequences: int, micro_batch: int) -> Outcome | None:
        workload = self._workload(strategy, sequences, micro_batch)
        limits = _of_a_replica(self.constraints, strategy.data_parallel, sequences, self.workload.batch)
        plans = {}
        for replica in self._parts(strategy):
            plan = solve(self._profile(strategy), replica, workload, "throughput", limits)
            if plan is None:
                return None
            plans[replica] = plan
        return self._describe(strategy, sequences, plans)

    def _describe(self, strategy: Strategy, sequences: int, plans: dict[Cluster, Plan]) -> Outcome:
        replica, plan = max(plans.items(), key=lambda each: each[1].makespan_seconds)
        phase, cuts = self.workload.phase, plan.num_micro_batches
        gradient = self._gradient_seconds(strategy, plan)
        seconds = plan.makespan_seconds + gradient
        latencies = {
            "prefill": max(each.latency_seconds for each in plans.values()),
            "decode": plan.makespan_seconds,
            "train": seconds,
        }
        in_flight = min(self.workload.batch, strategy.data_parallel * sequences)
        tokens = in_flight * self.workload.tokens_per_sequence
        rooms = [each.max_sequences for each in plans.values() if each.max_sequences is not None]
        table = LayerTable(self._profile(strategy), plan.workload)
        exchanging = cuts * _communication_seconds(table, replica, plan) / plan.num_stages + gradient
        stages = strategy.pipeline_parallel
        return Outcome(
            strategy=strategy,
            plan=plan,
            sequences=in_flight,
            tokens_per_second=tokens / seconds if seconds else math.inf,
            latency_seconds=latencies[phase],
            max_sequences=strategy.data_parallel * min(rooms) if rooms else None,
            memory_share=max(each.memory_share for each in plans.values()),
            communication_share=exchanging / seconds if seconds else 0.0,
            bubble=max(plan.bubble_fraction, 0.0) * plan.makespan_seconds / seconds if seconds else 0.0,
            gradient_seconds=gradient,
            schedule_bound=min(1.0, cuts / stages) if phase == "decode" else bubble_bound(stages, cuts),
            roofline_tokens_per_second=self._roofline(in_flight),
            dram_bytes_per_token=plan.dram_bytes_per_token,
            weight_bytes_per_token=_weight_bytes(table, plan) / table.tokens * strategy.tensor_parallel,
        )

    def _gradient_seconds(self, strategy: Strategy, plan: Plan) -> float:
        """All-reduce of the fullest stage's gradients: ring over the slowest link between its replicas."""
        if self.workload.phase != "train" or strategy.data_parallel == 1:
            return 0.0
        size = strategy.tensor_parallel * strategy.pipeline_parallel
        seconds = []
        for position, stage in enumerate(plan.stages):
            first = position * strategy.tensor_parallel
            last = first + strategy.tensor_parallel - 1 + (strategy.data_parallel - 1) * size
            link = reduce(slower_link, self.cluster.links[first:last])
            seconds.append(link.all_reduce_seconds(stage.weight_bytes, strategy.data_parallel))
        return max(seconds)

    def _roofline(self, sequences: int) -> float:
        if sequences not in self._rooflines:
            self._rooflines[sequences] = roofline_tokens_per_second(
                self.profile, self.cluster, self.workload, sequences
            )
        return self._rooflines[sequences]

    def _profile(self, strategy: Strategy) -> ModelProfile:
        size = strategy.tensor_parallel
        if size not in self._sharded:
            self._sharded[size] = self.profile.sharded(size)
        return self._sharded[size]

    def _parts(self, strategy: Strategy) -> tuple[Cluster, ...]:
        """The replicas' devices, equal ones once."""
        if strategy not in self._replicas:
            used = self.cluster.subset(strategy.num_devices).replicas(strategy.data_parallel)
            self._replicas[strategy] = tuple({part.grouped(strategy.tensor_parallel): None for part in used})
        return self._replicas[strategy]

    def _workload(self, strategy: Strategy, sequences: int, micro_batch: int) -> Workload:
        replicas = strategy.data_parallel if self.workload.phase == "train" else 1
        return dataclasses.replace(self.workload, batch=sequences, micro_batch=micro_batch, data_parallel=replicas)


def roofline_tokens_per_second(profile: ModelProfile, cluster: Cluster, workload: Workload, sequences: int) -> float:
    """Tokens per second that no strategy can exceed on these devices.

    All FLOPs at the datasheet's peak of all devices, or all weights and KV caches read once at their bandwidth,
    whichever takes longer; from the fastest tier in which they all fit, spread over the devices. Infinite for layers
    of which only the seconds are known.

    Args:
        profile: The layers, whole.
        cluster: All devices.
        workload: Phase and length.
        sequences: In flight.

    Source:
        Williams et al., Roofline, 2009, for the whole cluster.
    """
    table = LayerTable(profile, dataclasses.replace(workload, batch=sequences, micro_batch=sequences))
    flops = sum(dict(device.peak_flops).get(profile.dtype, math.inf) for device in cluster.devices)
    num_bytes = float(np.sum(table.touched))
    bandwidth = 0.0
    for level in range(max(len(device.tiers) for device in cluster.devices)):
        tiers = [device.tiers[min(level, len(device.tiers) - 1)] for device in cluster.devices]
        bandwidth = sum(tier.bandwidth_bytes_per_second for tier in tiers)
        if sum(tier.usable_bytes for tier in tiers) >= num_bytes:
            break
    seconds = max(float(np.sum(table.flops)) / flops, num_bytes / bandwidth)
    return sequences * workload.tokens_per_sequence / seconds if seconds else math.inf


def _communication_seconds(table: LayerTable, replica: Cluster, plan: Plan) -> float:
    """Transfers and all-reduces of one micro-batch, all stages together."""
    total = sum(stage.transfer_seconds for stage in plan.stages)
    if replica.group_size == 1:
        return total
    for stage, device, link in zip(plan.stages, replica.devices, replica.group_links, strict=True):
        alone = table.seconds(device, 0)
        added = table.seconds(device, 0, (link, replica.group_size)) - alone
        total += float(np.sum(added[stage.start : stage.stop]))
    return total


def _weight_bytes(table: LayerTable, plan: Plan) -> float:
    """Bytes of weights that one micro-batch reads in all stages."""
    touched = float(np.sum(table.touched))
    if plan.workload.phase != "decode":
        return touched
    pairs = zip(table.layers, table.kv_per_sequence, strict=True)
    read = sum(float(kept) for layer, kept in pairs if not layer.runs_once)
    return touched - read * plan.workload.chosen_micro_batch


def _of_a_replica(constraints: Constraints, replicas: int, sequences: int, batch: int) -> Constraints:
    """A replica's part of what all of them must reach: the fullest one has ``sequences``, the last one what is left."""
    rate, room = constraints.min_tokens_per_second, constraints.min_sequences
    return dataclasses.replace(
        constraints,
        min_tokens_per_second=None if rate is None else rate * sequences / min(batch, replicas * sequences),
        min_sequences=None if room is None else -(-room // replicas),
    )
