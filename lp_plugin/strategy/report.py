"""A `Study` of strategies as tables and sentences for the terminal."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lp_plugin.quantity import format_bytes, format_seconds
from lp_plugin.report import layer_table
from lp_plugin.schedule import bubble_bound
from lp_plugin.solver.solve import evaluate
from lp_plugin.strategy.compare import Comparison, Study, SweepRow, best_of, filling_crossover, sweep_crossover
from lp_plugin.strategy.layouts import Strategy, nodes_in_words
from lp_plugin.strategy.outcome import Outcome

__all__ = ["equal_batch_table", "footprint", "strategy_report", "strategy_table", "sweep_table"]

_LATENCY = {"prefill": "latency", "decode": "TPOT", "train": "step"}
"""What a request waits for, by phase; TPOT: time per output token of one sequence."""


_LEGEND = (
    "m x size: micro-batches of each replica x sequences in each. comm.: transfers and all-reduces; bubble: stages "
    "wait; bound: share of the slowest stage's rate that the schedule allows, m / (m + p - 1), decoding min(1, m / p); "
    "of peak: of all FLOP/s or all bandwidth of the cluster; +%: against {baseline}; *: on the Pareto front of "
    "tokens/s, latency and sequences that fit; T: most tokens/s; L: least latency with as many in flight as T; "
    "<: best m, within 1%."
)


def strategy_report(study: Study) -> Group:
    """Everything: footprint of the layers, strategies of each phase, micro-batches swept, verdicts."""
    parts: list[RenderableType] = [Text(_title(study), style="bold"), *footprint(study)]
    for position, comparison in enumerate(study.comparisons):
        workload = comparison.workload
        parts.append(Text(f"{workload.phase}: batch {workload.batch:,} x sequence {workload.sequence:,}", style="bold"))
        parts += [strategy_table(comparison, study.swept[0]), *_left_out(comparison)]
        rows = study.sweeps[position]
        if rows:
            parts += [Text("micro-batches swept", style="bold"), sweep_table(rows, study.swept)]
            parts += [Text(f"• {sentence}") for sentence in _crossovers(rows, study.swept, workload.phase)]
        if workload.phase == "decode" and study.equal_batch:
            count = study.equal_batch[0].sequences
            parts += [Text(f"at an equal batch of {count:,}", style="bold"), equal_batch_table(study.equal_batch)]
            parts.append(Text(f"• {_equal_batch_sentence(study.equal_batch)}"))
        parts.append(Text(f"• {comparison.verdict}", style="bold"))
    return Group(*parts, Text(_LEGEND.format(baseline=study.swept[0].label), style="dim"))


def footprint(study: Study) -> Iterator[RenderableType]:
    """Each layer's bytes, and what the whole batch needs against what the devices have."""
    profile, workload = study.profile, study.comparisons[0].workload
    one = dataclasses.replace(workload, micro_batch=workload.micro_batch or 1)
    plan = evaluate(profile, study.cluster.subset(1), one, [0, profile.num_layers])
    yield layer_table(plan)
    devices = study.cluster.devices
    capacity = sum(device.memory.capacity_bytes for device in devices)
    usable = sum(device.memory.usable_bytes for device in devices)
    memory = f"{format_bytes(capacity)} of device memory ({format_bytes(usable)} usable)"
    yield Text(f"weights      {format_bytes(plan.stages[0].weight_bytes)} in all, against {memory}")
    boundary = max([profile.input_bytes_per_token, *(layer.output_bytes_per_token for layer in profile.layers[:-1])])
    yield Text(
        f"activations  {format_bytes(boundary * workload.total_tokens)} of the whole batch at a stage boundary, "
        f"{format_bytes(boundary * workload.tokens_per_sequence)} of one sequence"
    )
    per_token = sum(layer.kv_bytes_per_token for layer in profile.layers)
    rooms = [outcome for outcome in study.comparisons[-1].outcomes if outcome.max_sequences is not None]
    if not per_token or workload.phase == "train":
        return
    kept = [min(workload.sequence, layer.kv_window or workload.sequence) for layer in profile.layers]
    sizes = [layer.kv_bytes_per_token * count for layer, count in zip(profile.layers, kept, strict=True)]
    whole = format_bytes(sum(sizes) * workload.batch)
    text = f"KV cache     {format_bytes(per_token)} per token, {whole} of the whole batch"
    if rooms:
        most = max(rooms, key=lambda outcome: outcome.max_sequences or 0)
        held = (
            f"all {workload.batch:,} sequences fit"
            if (most.max_sequences or 0) >= workload.batch
            else (f"{most.max_sequences:,} of {workload.batch:,} sequences fit at most")
        )
        text += f": {held} ({most.strategy.label})"
    yield Text(text)


def strategy_table(comparison: Comparison, baseline: Strategy) -> Table:
    """A row per strategy that fits, the most tokens per second first.

    Args:
        comparison: Of one phase.
        baseline: Strategy that rates and traffic are compared with.
    """
    phase, batch = comparison.workload.phase, comparison.workload.batch
    shown = [outcome for outcome in comparison.outcomes if outcome.fits]
    reference = comparison.of(baseline)
    base_rate = reference.tokens_per_second if reference is not None else 0.0
    base_traffic = reference.dram_bytes_per_token if reference is not None else 0.0
    cut = any(outcome.sequences < batch for outcome in shown)
    roomy = not cut and any(outcome.max_sequences is not None for outcome in shown)
    columns: dict[str, Callable[[Outcome], str]] = {
        "m x size": lambda each: f"{each.num_micro_batches:,} x {each.micro_batch:,}",
        **({"in flight": lambda each: f"{each.sequences:,} of {batch:,}"} if cut else {}),
        "tokens/s": lambda each: f"{each.tokens_per_second:,.0f}",
        "": lambda each: _against(each.tokens_per_second, base_rate),
        _LATENCY[phase]: lambda each: format_seconds(each.latency_seconds),
        **({"1/TPS": lambda each: format_seconds(1 / each.tokens_per_second)} if phase == "decode" else {}),
        **({"KV fits": lambda each: f"{each.max_sequences or 0:,}"} if roomy else {}),
        "memory": lambda each: f"{each.memory_share:.1%}",
        "comm.": lambda each: f"{each.communication_share:.1%}",
        "bubble": lambda each: f"{each.bubble:.1%}",
        "bound": lambda each: f"{each.schedule_bound:.1%}",
        "of peak": lambda each: f"{each.roofline_share:.1%}",
        "DRAM/token": lambda each: format_bytes(each.dram_bytes_per_token),
        " ": lambda each: _against(each.dram_bytes_per_token, base_traffic),
    }
    table = _table("strategy", *columns)
    table.add_column("front", no_wrap=True)
    for outcome in shown:
        cells = (cell(outcome) for cell in columns.values())
        table.add_row(outcome.strategy.label, *cells, _mark(outcome, comparison))
    return table


def sweep_table(rows: Sequence[SweepRow], strategies: Sequence[Strategy]) -> Table:
    """Tokens per second over the number of micro-batches, beside the bound that the schedule sets.

    Args:
        rows: Of `lp_plugin.strategy.compare.micro_batch_sweep`.
        strategies: The ones swept.
    """
    best = [_best_row(rows, index) for index in range(len(strategies))]
    in_flight = {outcome.sequences for row in rows for outcome in row.outcomes if outcome}
    extra = ["in flight"] if len(in_flight) > 1 else []
    headings = [heading for strategy in strategies for heading in ("size", *extra, strategy.label, "bound")]
    table = _table("m", *headings)
    table.columns[0].justify = "right"
    for row in rows:
        cells: list[str] = []
        for outcome, most in zip(row.outcomes, best, strict=True):
            if outcome is None:
                cells += ["-"] * (3 + len(extra))
                continue
            cells += [f"{outcome.micro_batch:,}", *([f"{outcome.sequences:,}"] if extra else [])]
            rate = f"{outcome.tokens_per_second:,.0f} {'<' if row is most else ' '}"
            cells += [rate, f"{outcome.schedule_bound:.1%}"]
        if any(row.outcomes):
            table.add_row(f"{row.num_micro_batches:,}", *cells)
    return table


def equal_batch_table(outcomes: Sequence[Outcome]) -> Table:
    """Decoding equally many sequences: what is read per token, and what comes of it."""
    table = _table("strategy", "m x size", "weights/token", "DRAM/token", "comm.", "TPOT", "tokens/s")
    for outcome in sorted(outcomes, key=lambda each: -each.tokens_per_second):
        table.add_row(
            outcome.strategy.label,
            f"{outcome.num_micro_batches:,} x {outcome.micro_batch:,}",
            format_bytes(outcome.weight_bytes_per_token),
            format_bytes(outcome.dram_bytes_per_token),
            f"{outcome.communication_share:.1%}",
            format_seconds(outcome.latency_seconds),
            f"{outcome.tokens_per_second:,.0f}",
        )
    return table


def _title(study: Study) -> str:
    cluster, profile = study.cluster, study.profile
    counts = Counter(device.name for device in cluster.devices)
    devices = " + ".join(f"{count} x {name}" for name, count in counts.items())
    nodes = f" in {nodes_in_words(cluster)}" if len(cluster.node_sizes()) > 1 else ""
    return f"{profile.name} in {profile.dtype} on {devices}{nodes}"


def _left_out(comparison: Comparison) -> Iterator[Text]:
    """What does not fit, and what was not tried."""
    for outcome in comparison.outcomes:
        if not outcome.fits:
            yield Text(f"does not fit: {outcome.strategy.label} {outcome.reason}")
    for layout in comparison.left_out:
        yield Text(f"left out: {layout.label}, {layout.reason}")


def _crossovers(rows: Sequence[SweepRow], strategies: Sequence[Strategy], phase: str) -> Iterator[str]:
    """Each strategy at its best, and from how many micro-batches on the longest pipeline beats the baseline."""
    best = {strategy: _best_row(rows, index) for index, strategy in enumerate(strategies)}
    if len(strategies) == 1 or not all(best.values()):
        return
    at = [f"{strategy.label} at m = {row.num_micro_batches:,}" for strategy, row in best.items() if row]
    first, last = strategies[0].label, strategies[-1].label
    count = sweep_crossover(rows, len(strategies) - 1, 0)
    ahead = f"not ahead of {first} at equal m" if count is None else f"ahead of {first} from m = {count:,} on"
    yield f"Best: {', '.join(at)}. Wherever both fit, {last} is {ahead}."
    challengers, baselines = (
        {outcome.micro_batch: outcome for row in rows if (outcome := row.outcomes[index])} for index in (-1, 0)
    )
    size = min(challengers.keys() & baselines.keys(), default=0)
    if phase == "decode" or not size:
        return
    count = filling_crossover(challengers[size], baselines[size])
    unit = f"micro-batches of {size:,} sequence{'s' if size > 1 else ''}"
    if count is None:
        yield f"With {unit} {last} stays behind {first} however long the batch is."
    else:
        bound = bubble_bound(strategies[-1].pipeline_parallel, count)
        yield f"With {unit}, {last} is ahead of {first} once a replica has {count:,} of them (bound {bound:.1%})."


def _best_row(rows: Sequence[SweepRow], index: int) -> SweepRow | None:
    """Where one strategy is at its best, as in a `Comparison`; None if it never fits."""
    at = {id(outcome): row for row in rows if (outcome := row.outcomes[index])}
    fitting = [outcome for row in rows if (outcome := row.outcomes[index])]
    return at[id(best_of(fitting))] if fitting else None


def _equal_batch_sentence(outcomes: Sequence[Outcome]) -> str:
    """Why a pipeline gains nothing when all hold the same batch."""
    best = max(outcomes, key=lambda outcome: outcome.tokens_per_second)
    longest = max(outcomes, key=lambda outcome: outcome.strategy.pipeline_parallel)
    if longest is best:
        return f"{best.strategy.label} makes most tokens per second."
    read = [
        f"{format_bytes(each.weight_bytes_per_token)} per token in {each.strategy.label} ({each.num_micro_batches:,})"
        for each in (longest, best)
    ]
    return f"A stage reads its weights again for every micro-batch: {read[0]}, {read[1]}."


def _mark(outcome: Outcome, comparison: Comparison) -> str:
    marks = ["*" if outcome.on_front else " "]
    marks += ["T"] if outcome is comparison.throughput else []
    marks += ["L"] if outcome is comparison.latency else []
    return " ".join(marks).rstrip()


def _against(value: float, reference: float) -> str:
    """The difference to a reference as a share of it."""
    return f"{value / reference - 1:+.0%}" if reference and value != reference else ""


def _table(first: str, *others: str) -> Table:
    """A table whose first column is text, and the others numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
