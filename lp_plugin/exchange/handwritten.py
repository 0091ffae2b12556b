"""Partitions that someone else decided, beside the best one: same model, devices, workload and micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lp_plugin.errors import WorkloadError
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.objective import Constraints
from lp_plugin.plan import Plan
from lp_plugin.planner import best_plan, check_request
from lp_plugin.quantity import format_seconds
from lp_plugin.solver.solve import evaluate, fits
from lp_plugin.workload import Workload

__all__ = ["Scored", "score_partitions", "score_table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One partition and what it is predicted to give."""

    name: str
    """Where it comes from."""
    plan: Plan
    """Evaluated, not decided; its memory may be exceeded."""
    fits: bool
    """Whether every stage stays within its device's usable memory."""
    gap: float | None
    """Its slowest stage over the best plan's, less 1; None if nothing fits at all."""


def score_partitions(
    profile: ModelProfile, cluster: Cluster, workload: Workload, partitions: Sequence[tuple[str, tuple[int, ...]]]
) -> tuple[Scored, ...]:
    """Evaluates partitions beside the best one, which comes first if any partition fits.

    Args:
        profile: The layers.
        cluster: Devices in pipeline order; as many are used as the partitions have stages.
        workload: With an open micro-batch all are evaluated at the one that the best plan chooses (1 if none fits).
        partitions: (name, boundaries), all with the same number of stages.

    Raises:
        WorkloadError: If partitions are missing or differ in their number of stages, or don't match the layers.
    """
    counts = {len(boundaries) - 1 for _, boundaries in partitions}
    if len(counts) != 1:
        found = ", ".join(f"{name} with {len(boundaries) - 1}" for name, boundaries in partitions) or "none"
        raise WorkloadError(f"partitions must have one number of stages to be compared, got {found}; score them apart.")
    (stages,) = counts
    used = check_request(profile, cluster, workload, stages, "throughput", Constraints())
    best = best_plan(profile, used, workload, "throughput", Constraints())
    chosen = best.workload if best else workload.with_micro_batch(workload.micro_batch or 1)
    scored = [_scored("lp_plugin", best, best)] if best else []
    for name, boundaries in partitions:
        scored.append(_scored(name, evaluate(profile, used, chosen, boundaries), best))
    return tuple(scored)


def _scored(name: str, plan: Plan, best: Plan | None) -> Scored:
    if best is None:
        gap = None
    elif best.bottleneck_seconds:
        gap = plan.bottleneck_seconds / best.bottleneck_seconds - 1
    else:
        gap = 0.0
    return Scored(name=name, plan=plan, fits=fits(plan), gap=gap)


def score_table(scored: Sequence[Scored]) -> Table:
    """A row per partition: blocks per stage, slowest stage, distance from the best, rate, memory."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("partition", no_wrap=True)
    table.add_column("blocks per stage")
    for heading in ("slowest stage", "against best", "tokens/s", "fullest device"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for each in scored:
        plan = each.plan
        where = plan.stage_seconds.index(plan.bottleneck_seconds)
        table.add_row(
            Text(each.name),
            Text(" ".join(_blocks(plan))),
            f"{format_seconds(plan.bottleneck_seconds)} (stage {where})",
            "" if each.gap is None else f"{each.gap:+.1%}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.memory_share:.1%}",
            "" if each.fits else "<- does not fit",
            style=None if each.fits else "bold red",
        )
    return table


def _blocks(plan: Plan) -> list[str]:
    """Blocks of each stage; halves of blocks as fractions, layers outside of blocks left out."""
    halves: dict[int, int] = {}
    for layer in plan.layers:
        if layer.block is not None:
            halves[layer.block] = halves.get(layer.block, 0) + 1
    counts = []
    for start, stop in pairwise(plan.boundaries):
        inside = [layer.block for layer in plan.layers[start:stop] if layer.block is not None]
        counts.append(f"{sum(1 / halves[block] for block in inside):g}")
    return counts
