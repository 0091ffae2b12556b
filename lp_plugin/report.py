"""A `Plan` as tables and sentences for the terminal."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lp_plugin.plan import Plan, Stage
from lp_plugin.quantity import format_bytes, format_seconds

__all__ = ["as_text", "layer_table", "plan_report", "stage_table", "summary"]

_KINDS = {
    "weight_bytes": "weights",
    "activation_bytes": "activ.",
    "kv_bytes": "KV cache",
    "buffer_bytes": "buffers",
    "training_bytes": "training",
}
"""Field of a stage -> heading."""

WIDTH = 160
"""Columns that every table fits in; given to outputs that are no terminal."""


def as_text(renderable: RenderableType, width: int = WIDTH) -> str:
    """Anything rich can draw as plain text, trailing blanks removed."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def plan_report(plan: Plan) -> Group:
    """Everything about a plan: layers, stages, figures, notes."""
    notes = [Text(f"• {note}") for note in plan.notes]
    return Group(Text(_title(plan), style="bold"), layer_table(plan), stage_table(plan), summary(plan), *notes)


def layer_table(plan: Plan) -> Table:
    """Memory footprint of each layer; equal neighbours share a row."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer")
    for column in ("weights", "activations", "KV cache", "buffers", "total"):
        table.add_column(column, justify="right")
    keys = [(_kind(layer.name), dataclasses.astuple(layer)[1:]) for layer in plan.layers]
    for first, last in _equal_neighbours(keys):
        layer = plan.layers[first]
        name = _compressed([layer.name for layer in plan.layers[first : last + 1]]) + (", each" if last > first else "")
        amounts = (
            layer.weight_bytes,
            layer.activation_bytes,
            layer.kv_bytes,
            layer.buffer_bytes,
            layer.total_bytes,
        )
        table.add_row(Text(name), *(format_bytes(amount) for amount in amounts))
    return table


def stage_table(plan: Plan) -> Table:
    """A row per stage: layers, memory by kind, share of the usable memory, working set, tier, seconds.

    Equal neighbours share a row; columns that say nothing (no KV cache, one kind of device) are left out.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("stage", justify="right", no_wrap=True)
    table.add_column("layers", no_wrap=True)
    devices = {stage.device for stage in plan.stages}
    if len(devices) > 1:
        table.add_column("device", no_wrap=True)
    kinds = [
        kind
        for kind in _KINDS
        if kind in ("weight_bytes", "activation_bytes") or any(getattr(stage, kind) for stage in plan.stages)
    ]
    for heading in (*(_KINDS[kind] for kind in kinds), "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("used", "working set", "tier", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for first, last in _equal_neighbours([_key(stage) for stage in plan.stages]):
        stage = plan.stages[first]
        over = stage.memory_bytes > stage.capacity_bytes
        slowest = max(plan.stage_seconds[first : last + 1]) == plan.bottleneck_seconds
        table.add_row(
            str(first) if first == last else f"{first} .. {last}",
            Text(_layers(plan, first, last)),
            *([Text(stage.device)] if len(devices) > 1 else []),
            *(format_bytes(getattr(stage, kind)) for kind in kinds),
            format_bytes(stage.memory_bytes),
            f"{stage.memory_bytes / stage.capacity_bytes:.1%}",
            format_bytes(stage.working_set_bytes),
            stage.tier,
            format_seconds(stage.seconds),
            "<- does not fit" if over else "<- slowest" if slowest else "",
            style="bold red" if over else None,
        )
    return table


def summary(plan: Plan) -> Text:
    """Bottleneck, bound, throughput in one paragraph."""
    gap = plan.bottleneck_seconds / plan.lower_bound_seconds - 1 if plan.lower_bound_seconds else 0.0
    lines = [
        f"bottleneck   {format_seconds(plan.bottleneck_seconds)} per micro-batch{_claim(plan)}",
        f"lower bound  {format_seconds(plan.lower_bound_seconds)}, the heaviest layer or all work spread evenly "
        f"({gap:+.1%})",
        f"throughput   {plan.tokens_per_second:,.0f} tokens/s predicted; "
        f"{plan.num_micro_batches} micro-batches of {plan.workload.chosen_micro_batch}, "
        f"bubble {plan.bubble_fraction:.1%}, whole batch {format_seconds(plan.makespan_seconds)}",
        f"boundaries   {list(plan.boundaries)}",
    ]
    return Text("\n".join(lines))


def _claim(plan: Plan) -> str:
    """What is proven about the plan."""
    if plan.objective == "memory":
        used = max(stage.memory_bytes / stage.capacity_bytes for stage in plan.stages)
        return f"; the fullest device is {used:.1%} full, proven to be the least possible"
    tiers = sorted({stage.tier for stage in plan.stages})
    return f", proven to be the least with every stage in {' or '.join(tiers)}" if plan.objective else ""


def _title(plan: Plan) -> str:
    workload = plan.workload
    return (
        f"{plan.model_name} in {plan.dtype}, {workload.phase}: batch {workload.batch} x sequence "
        f"{workload.sequence}, micro-batch {workload.chosen_micro_batch}, {plan.num_stages} stages"
    )


def _key(stage: Stage) -> tuple[object, ...]:
    """What makes two stages look the same in a table."""
    kinds = tuple(getattr(stage, kind) for kind in _KINDS)
    return (stage.device, stage.stop - stage.start, _kind(stage.layers[0]), kinds, format_seconds(stage.seconds))


def _layers(plan: Plan, first: int, last: int) -> str:
    """The layers of stages ``first .. last``, which hold equally many."""
    names = [name for stage in plan.stages[first : last + 1] for name in stage.layers]
    count = len(plan.stages[first].layers)
    return _compressed(names) + (f", {count} each" if last > first else "")


def _compressed(names: Sequence[str]) -> str:
    """Names in order, neighbours that differ only in their number joined: ``embedding, block 0-3``."""
    parts = []
    for first, last in _equal_neighbours([_kind(name) for name in names]):
        end = f"-{names[last].rsplit(' ', 1)[-1]}" if last > first else ""
        parts.append(names[first] + end)
    return ", ".join(parts)


def _kind(name: str) -> str:
    """A layer's name without its number."""
    head, _, tail = name.rpartition(" ")
    return head if tail.isdigit() else name


def _equal_neighbours(keys: Sequence[object]) -> list[tuple[int, int]]:
    """First and last index of runs of equal keys."""
    runs: list[tuple[int, int]] = []
    for index, key in enumerate(keys):
        if runs and key == keys[runs[-1][0]]:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs
