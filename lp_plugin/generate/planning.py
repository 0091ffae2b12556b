"""How a batch of prompts is generated: boundaries, rows per micro-batch and micro-batches in flight, and their memory.

A *slot* is one of the micro-batches that circle the ring of stages, with a KV cache of its own on every stage; it holds
``rows`` prompts from their prefill to their last token, then takes the next ones. All caches are static: as long as the
longest prompt and all new tokens, also where a layer looks back on a window alone.

Memory of a stage, in bytes: weights + slots * rows * (prompt + new tokens) * KV bytes + the larger of what the prefill
of one micro-batch and a decode step keep for a while. A prefill computes the logits of last tokens alone; its
output (half of what comes in and goes out) waits in each slot until the next stage has it.

Seconds, as predicted: each round of slots is a prefill pipeline and then a turn of the ring per further token, the
turn's launches replayed from a CUDA graph on GPUs. Not modelled: prompts of different lengths, sampling beyond the
largest logit, end-of-sequence tokens before the last one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lp_plugin.errors import InfeasibleError, PlanFileError, WorkloadError
from lp_plugin.generate.static_layers import last_logits, on_static_caches, replayed, workspace_bytes
from lp_plugin.hardware import Cluster, Link
from lp_plugin.model import ModelProfile
from lp_plugin.objective import Constraints
from lp_plugin.plan import Plan
from lp_plugin.planner import check_request
from lp_plugin.quantity import format_bytes, shown
from lp_plugin.report import as_text, stage_table
from lp_plugin.schedule import makespan_seconds, ring_seconds
from lp_plugin.solver.cost import StageTable, stage_tables
from lp_plugin.solver.criteria import Seconds, StageLimits
from lp_plugin.solver.layer_table import IntArray
from lp_plugin.solver.partition import partition
from lp_plugin.solver.solve import emptiest, evaluate, fits
from lp_plugin.workload import Workload

__all__ = ["GenerationPlan", "given_generation", "plan_generation"]

_CLOSE = 1.05
"""Predictions are no better than that: of numbers of slots as close to the fastest, the largest is taken, as more slots
hide what is not modelled (waiting for tokens and flags)."""
_MOST_TIMES = 8
"""As many times the stages are tried as a remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """Where the layers go, how many prompts a micro-batch has, and how many micro-batches are in flight."""

    plan: Plan
    """The decode step of all slots; its stages' activations and buffers are those of prefill where these are larger."""
    prompts: int
    """Prompts in all."""
    prompt_tokens: int
    """Tokens of the longest prompt."""
    new_tokens: int
    """Tokens made for each prompt."""
    micro_batch: int
    """Rows of a slot: prompts that are prefilled and decoded together."""
    num_slots: int
    """Micro-batches that circle the ring."""
    weight_bytes: tuple[int, ...]
    """Parameters of each stage."""
    stage_memory_bytes: tuple[int, ...]
    """All of each stage's memory at its peak."""
    prefill_stage_seconds: tuple[float, ...]
    """Predicted seconds of each stage for the prefill of one micro-batch."""

    @property
    def predicted_seconds(self) -> float:
        """Seconds until all prompts have all their tokens: rounds of slots, the last one perhaps with fewer."""
        groups = -(-self.prompts // self.micro_batch)
        rounds, rest = divmod(groups, self.num_slots)
        last = self._round_seconds(rest) if rest else 0.0
        return rounds * self._round_seconds(self.num_slots) + last

    @property
    def tokens_per_second(self) -> float:
        """Predicted new tokens per second, prefill included; infinite for a model that costs nothing."""
        seconds = self.predicted_seconds
        return self.prompts * self.new_tokens / seconds if seconds else float("inf")

    def _round_seconds(self, slots: int) -> float:
        turns = (self.new_tokens - 1) * ring_seconds(self.plan.stage_seconds, slots)
        return makespan_seconds(self.prefill_stage_seconds, slots) + turns


def plan_generation(
    profile: ModelProfile,
    cluster: Cluster,
    *,
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    num_stages: int,
    micro_batch: int | None = None,
    plan: Plan | None = None,
    compiled: bool = False,
) -> GenerationPlan:
    """The fastest way to make new tokens for all prompts that fits the memory, by prediction.

    For each number of slots up to the number of stages, rows are as many as fit, evened out over the rounds, or fewer
    where smaller micro-batches are faster; for each of these the boundaries are exact.

    Args:
        profile: The layers; of one member of a group if stages are tensor-parallel (`ModelProfile.sharded`).
        cluster: A device or group per stage, in pipeline order; the first ``num_stages`` are used.
        prompts: Prompts in all.
        prompt_tokens: Tokens of the longest prompt.
        new_tokens: Tokens to make for each prompt.
        num_stages: Stages.
        micro_batch: Rows of a slot; chosen if left out. More than there are prompts count as one for each.
        plan: Boundaries to use; its micro-batch is not.
        compiled: Whether decode passes will be compiled.

    Returns:
        The plan.

    Raises:
        WorkloadError: If a number is not a whole one of at least 1, stages outnumber layers or devices, or prompt and
            new tokens are more than the model's positions.
        PlanFileError: If the given plan has other numbers of layers or stages.
        InfeasibleError: If not even one slot of one row (or of ``micro_batch`` rows) fits.

    Example:
        >>> profile = ModelProfile.from_config("examples/dense16")
        >>> chosen = plan_generation(profile, Cluster.parse("h200:2"), prompts=64, prompt_tokens=128, new_tokens=64,
        ...                          num_stages=2)
        >>> chosen.micro_batch, chosen.num_slots, chosen.plan.boundaries
        (32, 2, (0, 9, 19))
    """
    for name, value in (("prompts", prompts), ("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        _check_count(name, value)
    if micro_batch is not None:
        _check_count("micro_batch", micro_batch)
    shape = Workload(phase="decode", batch=1, sequence=prompt_tokens + new_tokens, micro_batch=1)
    used = check_request(profile, cluster, shape, num_stages, "throughput", Constraints())
    if plan is not None and (len(plan.layers) != profile.num_layers or plan.num_stages != num_stages):
        raise PlanFileError(
            f"the plan has {len(plan.layers)} layers in {plan.num_stages} stages, the model {profile.num_layers} in "
            f"{num_stages}; make a plan for this model and these stages."
        )
    search = _Search(
        profile=profile,
        cluster=used,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        micro_batch=None if micro_batch is None else min(micro_batch, prompts),
        boundaries=None if plan is None else plan.boundaries,
        compiled=compiled,
    )
    return search.best()


def given_generation(
    profile: ModelProfile,
    cluster: Cluster,
    boundaries: Sequence[int],
    *,
    prompt_tokens: int,
    new_tokens: int,
    micro_batch: int,
    num_slots: int,
) -> GenerationPlan:
    """Figures of one full round with everything given, otherwise as `plan_generation`; memory may be exceeded."""
    search = _Search(
        profile=profile,
        cluster=cluster,
        prompts=micro_batch * num_slots,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        micro_batch=micro_batch,
        boundaries=tuple(boundaries),
        compiled=False,
    )
    return search.described(micro_batch, num_slots, boundaries)


@dataclass(frozen=True, kw_only=True)
class _Search:
    """Tries rows and slots for one request; fields as the arguments of `plan_generation`."""

    profile: ModelProfile
    cluster: Cluster
    """A device or group per stage."""
    prompts: int
    prompt_tokens: int
    new_tokens: int
    micro_batch: int | None
    boundaries: tuple[int, ...] | None
    """None to find the best."""
    compiled: bool

    @property
    def _length(self) -> int:
        """Tokens of a cache."""
        return self.prompt_tokens + self.new_tokens

    @cached_property
    def _replayed(self) -> Cluster:
        return replayed(self.cluster, "decode", compiled=self.compiled)

    @cached_property
    def _decode(self) -> ModelProfile:
        return on_static_caches(self.profile, 1, self._length)

    @cached_property
    def _prefill(self) -> ModelProfile:
        return last_logits(on_static_caches(self.profile, self.prompt_tokens, self._length), self.prompt_tokens)

    def best(self) -> GenerationPlan:
        """The fastest; of numbers of slots that are close, the largest."""
        found = [made for slots in range(1, len(self.cluster.devices) + 1) if (made := self._best_of(slots))]
        if not found:
            raise self._error()
        close = _CLOSE * min(made.predicted_seconds for made in found)
        return max(
            (made for made in found if made.predicted_seconds <= close),
            key=lambda made: (made.num_slots, -made.predicted_seconds),
        )

    def _best_of(self, slots: int) -> GenerationPlan | None:
        """The fastest with so many slots; None if they can't be filled, or don't fit."""
        tried = [made for rows in self._rows(slots) if (made := self._made(rows, slots))]
        return min(tried, key=lambda made: made.predicted_seconds, default=None)

    def _rows(self, slots: int) -> Iterator[int]:
        """Rows worth trying, each with a prompt for every slot: the most that fit, evened out over rounds; halves."""
        if self.micro_batch is not None:
            if -(-self.prompts // self.micro_batch) >= slots:
                yield self.micro_batch
            return
        most = self._most_rows(slots, -(-self.prompts // slots))
        if not most:
            return
        rounds, rows = -(-self.prompts // (slots * most)), 0
        while rows != 1:
            rows = -(-self.prompts // (slots * rounds))
            if -(-self.prompts // rows) >= slots:
                yield rows
            rounds *= 2

    def _most_rows(self, slots: int, most: int) -> int:
        """Largest number of rows up to ``most`` that fits; 0 if not even one does."""
        low, high, middle = 0, most, most
        while low < high:
            if self._cut(middle, slots) is None:
                high = middle - 1
            else:
                low = middle
            middle = (low + high + 1) // 2
        return low

    def _made(self, rows: int, slots: int) -> GenerationPlan | None:
        """The best partition's figures; None if none fits."""
        boundaries = self._cut(rows, slots)
        return None if boundaries is None else self.described(rows, slots, boundaries)

    def _cut(self, rows: int, slots: int) -> tuple[int, ...] | None:
        """The best boundaries, or those that were given; None if they don't fit."""
        if self.boundaries is not None:
            return self.boundaries if fits(self.described(rows, slots, self.boundaries).plan) else None
        decode, prefill = self._workloads(rows, slots)
        turns = stage_tables(self._decode, self._replayed, decode)
        firsts = stage_tables(self._prefill, self.cluster, prefill)
        known: dict[tuple[int, int], _Turn] = {}
        stages = [
            known.setdefault((id(turn), id(first)), _Turn(turn, first, slots))
            for turn, first in zip(turns, firsts, strict=True)
        ]
        return partition(stages, self.profile.num_layers)

    def _workloads(self, rows: int, slots: int) -> tuple[Workload, Workload]:
        """Of a decode step and of the prefill."""
        decode = Workload(phase="decode", batch=rows * slots, sequence=self._length, micro_batch=rows)
        prefill = Workload(phase="prefill", batch=rows * slots, sequence=self.prompt_tokens, micro_batch=rows)
        return decode, prefill

    def described(self, rows: int, slots: int, boundaries: Sequence[int]) -> GenerationPlan:
        """Figures of given boundaries, whether or not they fit."""
        decode, prefill = self._workloads(rows, slots)
        step = evaluate(self._decode, self._replayed, decode, boundaries)
        first = evaluate(self._prefill, self.cluster, prefill, boundaries)
        stages = []
        for stage, ahead, device in zip(step.stages, first.stages, self.cluster.devices, strict=True):
            waiting = math.ceil(ahead.activation_bytes * slots / 2)
            pairs = (stage.activation_bytes, stage.buffer_bytes), (waiting, ahead.buffer_bytes)
            activations, buffers = max(pairs, key=sum)
            buffers += workspace_bytes(device)
            here = dataclasses.replace(stage, activation_bytes=activations, buffer_bytes=buffers)
            kept = stage.kv_bytes // (rows * slots)
            room = max((here.capacity_bytes - here.memory_bytes + here.kv_bytes) // kept, 0) if kept else None
            stages.append(dataclasses.replace(here, max_sequences=room))
        plan = dataclasses.replace(
            step,
            stages=tuple(stages),
            objective="throughput" if self.boundaries is None else None,
            model_digest=self.profile.digest,
            cluster_digest=self.cluster.digest,
        )
        return GenerationPlan(
            plan=plan,
            prompts=self.prompts,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            micro_batch=rows,
            num_slots=slots,
            weight_bytes=tuple(stage.weight_bytes for stage in stages),
            stage_memory_bytes=tuple(stage.memory_bytes for stage in stages),
            prefill_stage_seconds=first.stage_seconds,
        )

    def _error(self) -> InfeasibleError:
        """Not even one slot fits; remedies are tried out."""
        rows, boundaries = self.micro_batch or 1, self.boundaries
        decode, _ = self._workloads(rows, 1)
        shown_at = boundaries or emptiest(self._decode, self._replayed, decode).boundaries
        plan = self.described(rows, 1, shown_at).plan
        worst = max(plan.stages, key=lambda stage: stage.memory_bytes / stage.capacity_bytes)
        prompts = f"one prompt of {self.prompt_tokens} tokens" if rows == 1 else f"{rows} prompts at a time"
        return InfeasibleError(
            f"{self.profile.name} has no room to generate for {prompts} ({self._length} tokens each with the new "
            f"ones) on {len(plan.stages)} x {worst.device}: "
            f"{'even the emptiest partition' if boundaries is None else 'the given partition'} needs "
            f"{format_bytes(worst.memory_bytes)} on one device of {format_bytes(worst.capacity_bytes)} usable.",
            table=as_text(stage_table(plan)),
            remedies=tuple(self._remedies()),
        )

    def _remedies(self) -> Iterator[str]:
        """Fewer rows, shorter prompts, more devices: the smallest change of each kind that fits."""
        rows = self.micro_batch or 1
        if fewer := self._most_rows(1, rows - 1):
            yield f"a micro-batch of {fewer} instead of {rows}"
        low, high = 0, self.prompt_tokens - 1
        while low < high:
            middle = (low + high + 1) // 2
            fitting = dataclasses.replace(self, prompt_tokens=middle)._cut(rows, 1) is not None
            low, high = (middle, high) if fitting else (low, middle - 1)
        if low:
            yield f"prompts of at most {low} tokens instead of {self.prompt_tokens}"
        stages = len(self.cluster.devices)
        for more in range(stages + 1, min(_MOST_TIMES * stages, self.profile.num_layers) + 1):
            larger = dataclasses.replace(self, cluster=_longer(self.cluster, more), boundaries=None)
            if larger._cut(rows, 1) is not None:
                yield f"{more} stages instead of {stages}"
                return


class _Turn(Seconds):
    """Seconds of a stage's decode turn; only where the prefill fits beside weights and KV cache, too.

    Args:
        table: Of the decode step.
        prefill: Of the same stage's prefill.
        slots: Micro-batches that may each have a prefill's output on its way.
    """

    def __init__(self, table: StageTable, prefill: StageTable, slots: int) -> None:
        super().__init__(table, StageLimits())
        self._prefill = prefill
        self._slots = slots
        self._workspace = workspace_bytes(table.device)

    def _within(self, starts: IntArray, stops: IntArray) -> NDArray[np.bool_]:
        in_out, buffers = self.table.table.peaks(starts, stops)
        passing = 2 * in_out + buffers
        stays = self.table.total_bytes(starts, stops) - passing + self._workspace
        in_out, buffers = self._prefill.table.peaks(starts, stops)
        before = np.ceil(in_out * self._slots / 2) + in_out + buffers
        return np.asarray(stays + np.maximum(passing, before) <= self.table.device.memory.usable_bytes)


def _longer(cluster: Cluster, stages: int) -> Cluster:
    """The cluster with more devices like its last one; over which link does not matter to memory."""
    link = cluster.links[-1] if cluster.links else Link(name="any", bandwidth_bytes_per_second=1e9, latency_seconds=0.0)
    more = stages - len(cluster.devices)
    return dataclasses.replace(
        cluster,
        devices=cluster.devices + cluster.devices[-1:] * more,
        links=cluster.links + (link,) * more,
        group_links=cluster.group_links + cluster.group_links[-1:] * more,
    )


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise WorkloadError(f"{name} is {shown(value)}; it must be a whole number of at least 1.")
