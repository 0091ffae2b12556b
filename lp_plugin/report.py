"""A `Plan` as tables and sentences for the terminal."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lp_plugin.hardware import Cluster
from lp_plugin.plan import Plan, Stage
from lp_plugin.quantity import format_bytes, format_seconds
from lp_plugin.solver.solve import uniform_boundaries
from lp_plugin.workload import Workload

__all__ = ["as_text", "console", "layer_table", "plan_report", "stage_table", "summary", "tier_table"]

_KINDS = {
    "weight_bytes": "weights",
    "activation_bytes": "activ.",
    "kv_bytes": "KV cache",
    "buffer_bytes": "buffers",
    "training_bytes": "training",
}
"""Field of a stage -> heading."""

_SAME = 0.001
"""Seconds that differ by less than this share are called the same."""

WIDTH = 160
"""Columns that every table fits in; given to outputs that are no terminal."""


def as_text(renderable: RenderableType, width: int = WIDTH) -> str:
    """Anything rich can draw as plain text, trailing blanks removed."""
    page = Console(file=io.StringIO(), width=width, color_system=None)
    page.print(renderable)
    lines = page.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def console() -> Console:
    """The terminal, or a wide enough page where there is none."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)


def plan_report(plan: Plan, cluster: Cluster | None = None) -> Group:
    """Everything about a plan: layers, stages, memory tiers, figures, notes.

    Args:
        plan: Decided or given.
        cluster: What it was made for; without it the tiers' sizes are unknown and their table is left out.
    """
    notes = [Text(f"• {note}") for note in plan.notes]
    tables = [layer_table(plan), stage_table(plan)]
    if cluster is not None:
        tables.append(tier_table(plan, cluster))
    return Group(Text(_title(plan), style="bold"), *tables, summary(plan), *notes)


def layer_table(plan: Plan) -> Table:
    """Memory footprint of each layer; equal neighbours share a row."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer")
    for column in ("weights", "activations", "KV cache", "buffers", "total"):
        table.add_column(column, justify="right")
    keys = [(_kind(layer.name), dataclasses.replace(layer, name="", block=None)) for layer in plan.layers]
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


def stage_table(plan: Plan, marks: Mapping[int, str] = MappingProxyType({})) -> Table:
    """A row per stage: layers, memory by kind, share of the usable memory, working set, tier and its hits, seconds.

    Equal neighbours share a row; columns that say nothing (no KV cache, one kind of device) are left out.

    Args:
        plan: Decided or given.
        marks: What is wrong with some stages, by position, beside those that exceed their device's memory.
    """
    wrong = {
        position: "does not fit"
        for position, stage in enumerate(plan.stages)
        if stage.memory_bytes > stage.capacity_bytes
    } | dict(marks)
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
    has_hits = any(stage.hit_fraction for stage in plan.stages)
    for heading in ("used", "working set", "tier", *(["hits"] if has_hits else []), "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for first, last in _equal_neighbours([(_key(stage), wrong.get(i)) for i, stage in enumerate(plan.stages)]):
        stage = plan.stages[first]
        slowest = max(plan.stage_seconds[first : last + 1]) == plan.bottleneck_seconds
        table.add_row(
            str(first) if first == last else f"{first} .. {last}",
            Text(_layers(plan, first, last)),
            *([Text(stage.device)] if len(devices) > 1 else []),
            *(format_bytes(getattr(stage, kind)) for kind in kinds),
            format_bytes(stage.memory_bytes),
            f"{stage.memory_bytes / stage.capacity_bytes:.1%}",
            format_bytes(stage.working_set_bytes),
            Text(stage.tier),
            *([f"{stage.hit_fraction:.1%}"] if has_hits else []),
            format_seconds(stage.seconds),
            Text(f"<- {wrong[first]}" if first in wrong else "<- slowest" if slowest else ""),
            style="bold red" if first in wrong else None,
        )
    return table


def tier_table(plan: Plan, cluster: Cluster) -> Table:
    """A row per stage: its working set as a share of each memory tier's usable bytes, and what the first tier serves.

    Args:
        plan: Decided or given.
        cluster: What it was made for.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("stage", "working set"):
        table.add_column(heading, justify="right", no_wrap=True)
    names = list(dict.fromkeys(tier.name for device in cluster.devices for tier in device.tiers))
    for name in names:
        table.add_column(Text(f"of {name}"), justify="right", no_wrap=True)
    for heading in ("hits", "DRAM/token", "time", "all in the first tier"):
        table.add_column(heading, justify="right", no_wrap=True)
    tokens = plan.workload.chosen_micro_batch * plan.workload.tokens_per_sequence
    rows = []
    for stage, device in zip(plan.stages, cluster.devices, strict=True):
        usable = {tier.name: tier.usable_bytes for tier in device.tiers}
        missed = stage.traffic_bytes * (1 - stage.hit_fraction) * plan.tensor_parallel / tokens
        rows.append(
            (
                format_bytes(stage.working_set_bytes),
                *(_share(stage.working_set_bytes, usable[name]) if name in usable else "" for name in names),
                f"{stage.hit_fraction:.1%}",
                format_bytes(missed),
                format_seconds(stage.seconds),
                format_seconds(stage.resident_seconds + stage.transfer_seconds),
            )
        )
    for first, last in _equal_neighbours(rows):
        table.add_row(str(first) if first == last else f"{first} .. {last}", *rows[first])
    return table


def _share(num_bytes: int, usable_bytes: int) -> str:
    share = num_bytes / usable_bytes if usable_bytes else float("inf")
    return f"{share:.1%}" if share < 9.995 else f"{share:,.3g} x" if share < 999.5 else f"{share:,.0f} x"


def summary(plan: Plan) -> Text:
    """Bottleneck, bounds, what a uniform split gives, throughput: each figure with what is proven about it."""
    workload = plan.workload
    lines = [
        f"bottleneck   {format_seconds(plan.bottleneck_seconds)} per micro-batch{_claim(plan)}",
        f"lower bound  {format_seconds(plan.lower_bound_seconds)}, the heaviest layer or all work spread evenly"
        + (f"; the bottleneck is {plan.gap:.1%} above it" if plan.lower_bound_seconds else ""),
        f"uniform      {_uniform(plan)}",
        f"throughput   {plan.tokens_per_second:,.0f} tokens/s predicted{_replicas(plan)}; "
        f"{_counted(plan.num_micro_batches, 'micro-batch', 'micro-batches')} of {workload.chosen_micro_batch}, "
        f"bubble {plan.bubble_fraction:.1%}, whole batch {format_seconds(plan.makespan_seconds)}",
        f"traffic      {format_bytes(plan.dram_bytes_per_token)} per token from beyond the first memory tier",
        f"boundaries   {list(plan.boundaries)}",
    ]
    return Text("\n".join(lines))


def _replicas(plan: Plan) -> str:
    """Whose throughput it is, if the pipeline has replicas."""
    count = plan.workload.data_parallel
    return f" of each of {count} replicas, their gradient all-reduce not counted" if count > 1 else ""


def _counted(count: int, one: str, many: str) -> str:
    """A number and what it counts."""
    return f"{count} {one if count == 1 else many}"


def _claim(plan: Plan) -> str:
    """What is proven about the plan; nothing if its boundaries were given."""
    if plan.objective is None:
        return ""
    among = "all partitions"
    if plan.constraints.given:
        among += f" with {plan.constraints.as_text()}"
    if plan.objective == "throughput":
        return f", proven least of {among} (the search is exact)"
    room = plan.max_sequences or 0
    what = {
        "latency": f"latency {format_seconds(plan.latency_seconds)}, proven least",
        "sequences": f"room for {room:,} {'sequence' if room == 1 else 'sequences'}, proven most",
        "memory": f"the fullest device is {plan.memory_share:.1%} full, proven least",
    }
    return f"; {what[plan.objective]} of {among} (the search is exact)"


def _uniform(plan: Plan) -> str:
    """What equally many layers per stage would give."""
    uniform, now = plan.uniform_seconds, plan.bottleneck_seconds
    if uniform is None:
        return "equally many layers per stage do not fit the memory"
    gain = uniform / now - 1 if now else 0.0
    split = f"{format_seconds(uniform)} with equally many layers per stage"
    if plan.objective != "throughput":
        return split
    if gain > _SAME:
        return f"{split}, {gain:.1%} more than the plan"
    if gain < -_SAME:
        return f"{split}, but that breaks a constraint"
    if plan.constraints.given and plan.boundaries != uniform_boundaries(len(plan.layers), plan.num_stages):
        return f"{split}: the same, if it keeps to the constraints"
    more = f" ({gain:.2%})" if gain > 0 else ""
    return f"{split}: uniform is already optimal, nothing to gain{more}"


def _title(plan: Plan) -> str:
    workload = plan.workload
    return (
        f"{plan.model_name} in {plan.dtype}, {workload.phase}{_training(workload)}: batch {workload.batch} x sequence "
        f"{workload.sequence}, micro-batch {workload.chosen_micro_batch}, "
        f"{_counted(plan.num_stages, 'stage', 'stages')}"
    )


def _training(workload: Workload) -> str:
    """What was asked of a training run beside its batch: `` with ZeRO stage 1 over 8 replicas, checkpointing``."""
    replicas = _counted(workload.data_parallel, "replica", "replicas")
    asked = [f"ZeRO stage {workload.zero_stage} over {replicas}"] if workload.zero_stage else []
    if workload.data_parallel > 1 and not workload.zero_stage:
        asked.append(replicas)
    if workload.checkpointing:
        asked.append("checkpointing")
    if workload.float32_gradients:
        asked.append("gradients summed up in float32")
    return f" with {', '.join(asked)}" if asked else ""


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
    names = _halves_joined(names)
    for first, last in _equal_neighbours([_kind(name) for name in names]):
        end = f"-{names[last].rsplit(' ', 1)[-1]}" if last > first else ""
        parts.append(names[first] + end)
    return ", ".join(parts)


def _halves_joined(names: Sequence[str]) -> list[str]:
    """Both halves of a block as one: ``block 0 attention, block 0 mlp`` become ``block 0``."""
    joined: list[str] = []
    for name in names:
        block, _, half = name.rpartition(" ")
        if half == "mlp" and joined and joined[-1] == f"{block} attention":
            joined[-1] = block
        else:
            joined.append(name)
    return joined


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
