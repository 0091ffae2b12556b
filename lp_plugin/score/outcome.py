"""How a scoring job went: predicted beside measured."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lp_plugin.job.layout import Layout
from lp_plugin.plan import Plan
from lp_plugin.quantity import format_bytes, format_seconds
from lp_plugin.schedule import Interval, bubble_bound, makespan_seconds
from lp_plugin.score.batches import Step

__all__ = ["Outcome", "RankTimes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTimes:
    """What one rank measured."""

    wall_seconds: tuple[float, ...]
    """Of each step, from the common start to this rank's end."""
    forward_seconds: tuple[float, ...]
    """Of each step, in forward passes."""
    alone_seconds: float
    """One micro-batch of the first step through this stage without a pipeline; median of 7."""
    elapsed_seconds: float
    """From the first step's start to the last one's scores on disk (rank 0)."""
    intervals: tuple[Interval, ...]
    """Instructions of the step with the most micro-batches."""
    peak_bytes: int
    """Most memory that torch allocated on the GPU; 0 on CPUs."""
    host: str
    """What it ran on."""
    threads: int
    """Threads that torch computed with on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The whole job's figures."""

    plan: Plan | None
    """None if a resumed job had nothing left to do."""
    layout: Layout
    """The processes."""
    tokens_per_micro_batch: int
    """What documents were packed into; rows times length of a step is at most that."""
    steps: tuple[Step, ...]
    """What the first pipeline computed in this run; others did as many micro-batches of these shapes."""
    ranks: tuple[RankTimes, ...]
    """The first pipeline's first rank of each stage."""
    num_documents: int
    """In the output."""
    num_scored: int
    """Scored by this run; fewer than all after a resume."""
    num_tokens: int
    """Tokens of the documents scored by this run, padding not counted."""
    total_log_likelihood: float
    """Over all documents."""
    total_scored_tokens: int
    """Over all documents."""

    @property
    def perplexity(self) -> float:
        """``exp(-log likelihood per scored token)`` over all documents; nan without a scored token."""
        if not self.total_scored_tokens:
            return math.nan
        try:
            return math.exp(-self.total_log_likelihood / self.total_scored_tokens)
        except OverflowError:
            return math.inf

    @property
    def wall_seconds(self) -> float:
        """From the first step's start to the last one's scores on disk."""
        return self.ranks[0].elapsed_seconds

    @property
    def step_seconds(self) -> list[float]:
        """Each step's pipeline, until its slowest rank was done."""
        return [max(each) for each in zip(*(rank.wall_seconds for rank in self.ranks), strict=True)]

    @property
    def tokens_per_second(self) -> float:
        """Documents' tokens per second, padding not counted."""
        return self.num_tokens / self.wall_seconds

    @property
    def padded_tokens_per_second(self) -> float:
        """Tokens computed per second, padding counted: what the hardware did."""
        return self._computed_tokens * self.layout.data_parallel / self.wall_seconds

    def stage_seconds(self, stage: int) -> float:
        """Mean seconds of a stage's forward pass, scaled by tokens to a micro-batch of the first step."""
        return sum(self.ranks[stage].forward_seconds) / self._computed_tokens * self.steps[0].tokens

    @property
    def _computed_tokens(self) -> int:
        """By the first pipeline, padding included."""
        return sum(step.tokens * len(step.micro_batches) for step in self.steps)

    @property
    def bubble_fraction(self) -> float:
        """Share of the ranks' time not spent in forward passes: waiting and transfers."""
        busy = sum(sum(rank.forward_seconds) for rank in self.ranks)
        return 1.0 - busy / (self.wall_seconds * len(self.ranks))

    @property
    def bound_seconds(self) -> float:
        """Least seconds of these steps if the slowest stage ran at the rate it has alone.

        A step of m micro-batches on p stages needs m + p - 1 times the slowest stage (other shapes than the first
        step's are scaled by their tokens).
        """
        slowest = max(rank.alone_seconds for rank in self.ranks) / self.steps[0].tokens
        stages = len(self.ranks)
        counts = [(step.tokens, len(step.micro_batches)) for step in self.steps]
        return sum(slowest * tokens * m / bubble_bound(stages, m) for tokens, m in counts)

    @property
    def predicted_seconds(self) -> float:
        """What the plan predicts for these steps; other shapes than the planned one are scaled by their tokens."""
        if self.plan is None:
            return 0.0
        workload = self.plan.workload
        planned = workload.chosen_micro_batch * workload.tokens_per_sequence
        return sum(
            makespan_seconds(self.plan.stage_seconds, len(step.micro_batches)) * step.tokens / planned
            for step in self.steps
        )

    def as_json(self) -> dict[str, Any]:
        """The figures for a result file; times in seconds. JSON has no nan: such a perplexity is null."""
        scored = {
            "num_documents": self.num_documents,
            "num_scored": self.num_scored,
            "total_scored_tokens": self.total_scored_tokens,
            "total_log_likelihood": self.total_log_likelihood,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
        }
        if self.plan is None:
            return scored
        return scored | {
            "hosts": [rank.host for rank in self.ranks],
            "threads": self.ranks[0].threads,
            "boundaries": list(self.plan.boundaries),
            "tensor_parallel": self.layout.tensor_parallel,
            "data_parallel": self.layout.data_parallel,
            "dtype": self.plan.dtype,
            "tokens_per_micro_batch": self.tokens_per_micro_batch,
            "steps": [[step.rows, step.length, len(step.micro_batches)] for step in self.steps],
            "wall_seconds": self.wall_seconds,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "padded_tokens_per_second": self.padded_tokens_per_second,
            "predicted_seconds": self.predicted_seconds,
            "predicted_stage_seconds": list(self.plan.stage_seconds),
            "stage_seconds": [self.stage_seconds(stage) for stage in range(len(self.ranks))],
            "stage_alone_seconds": [rank.alone_seconds for rank in self.ranks],
            "bubble_fraction": self.bubble_fraction,
            "bubble_bound_seconds": self.bound_seconds,
            "share_of_bubble_bound": self.bound_seconds / self.wall_seconds,
            "peak_bytes": [rank.peak_bytes for rank in self.ranks],
            "predicted_memory_bytes": [stage.memory_bytes for stage in self.plan.stages],
        }

    def report(self) -> Group:
        """Tables and sentences for the terminal."""
        lines = [
            f"perplexity   {self.perplexity:.6g} over {self.total_scored_tokens:,} tokens of "
            f"{self.num_documents:,} documents"
        ]
        if self.plan is None:
            return Group(Text("nothing was left to score"), Text(lines[0]))
        error = self.predicted_seconds / self.wall_seconds - 1
        padding = self.tokens_per_second / self.padded_tokens_per_second
        lines += [
            f"throughput   {self.tokens_per_second:,.0f} tokens/s ({padding:.1%} of what was computed; "
            f"the rest is padding) in {format_seconds(self.wall_seconds)}",
            f"bubble       {self.bubble_fraction:.1%} of the stages' time was not forward passes",
            f"bound        {self.bound_seconds / self.wall_seconds:.1%} of m/(m+p-1) times the slowest stage alone",
            f"predicted    {format_seconds(self.predicted_seconds)} against "
            f"{format_seconds(self.wall_seconds)} measured ({error:+.1%})",
        ]
        cores, processes = os.cpu_count() or 1, self.layout.num_processes
        if self.ranks[0].host == "CPU" and processes * self.ranks[0].threads > cores:
            lines.append(f"note         {processes} processes share {cores} cores: stages slow each other down")
        return Group(self._stage_table(self.plan), Text("\n".join(lines)))

    def _stage_table(self, plan: Plan) -> Table:
        """Predicted beside measured, a row per stage, for the shape of the first step."""
        title = f"a micro-batch of {self.steps[0].tokens} tokens (other shapes scaled to it)"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for column in ("stage", "layers", "predicted", "alone", "in the pipeline", "busy", "peak memory"):
            table.add_column(column, justify="left" if column == "layers" else "right")
        workload = plan.workload
        scale = self.steps[0].tokens / (workload.chosen_micro_batch * workload.tokens_per_sequence)
        for index, (stage, rank) in enumerate(zip(plan.stages, self.ranks, strict=True)):
            table.add_row(
                str(index),
                f"{stage.start} .. {stage.stop - 1}",
                format_seconds(stage.compute_seconds * scale),
                format_seconds(rank.alone_seconds),
                format_seconds(self.stage_seconds(index)),
                f"{sum(rank.forward_seconds) / self.wall_seconds:.1%}",
                format_bytes(rank.peak_bytes) if rank.peak_bytes else "not measured",
            )
        return table
