"""Tables of trials: performance, how close to the limit of the bubble, consistency."""

from __future__ import annotations

from lp_plugin.bench.experiment.derived import (
    BubbleLimit,
    baseline_row,
    bubble_limit,
    control_row,
    is_control,
    num_micro_batches,
    row_figures,
)
from lp_plugin.bench.experiment.document import Figures
from lp_plugin.bench.experiment.results import CaseResult, Row
from lp_plugin.bench.experiment.statistics import Ratio, ratio_of_rates, spread
from lp_plugin.bench.experiment.wording import (
    boundaries_text,
    change_text,
    in_one_line,
    missing_text,
    ratio_text,
    seconds_text,
    share_text,
    tokens_text,
)
from lp_plugin.quantity import listed
from lp_plugin.strategy.layouts import Strategy

__all__ = ["bubble_table", "case_line", "configurations_table", "consistency_table", "performance_table"]


def case_line(case: CaseResult) -> str:
    """What a case does, in a sentence."""
    model = case.model
    sizes = [
        f"{word} {model[key]:,}"
        for key, word in (
            ("hidden_size", "hidden"),
            ("intermediate_size", "MLP"),
            ("num_attention_heads", "heads"),
            ("num_hidden_layers", "blocks"),
        )
        if isinstance(model.get(key), int)
    ]
    work = f"a batch of {case.batch:,} x {case.sequence:,} tokens in micro-batches of {case.micro_batch or 1:,}"
    if case.phase == "decode":
        work = f"{case.batch:,} x {case.sequence:,} tokens of prompts, {case.new_tokens:,} new tokens each, "
        work += f"{case.micro_batch:,} rows at a time" if case.micro_batch else "a slot for each stage"
    where = f"{case.processes} {'process' if case.processes == 1 else 'processes'}"
    if case.environment is not None:
        found, backend = case.environment.devices, case.environment.backend
        if backend == "nccl" and len(found) < case.processes:
            where = f"{len(found)} of {where}"
        devices = ", ".join(dict.fromkeys(found))
        where += f" over {backend} on {devices}" if devices else ""
    kind = model.get("model_type", "model")
    return f"{kind} ({', '.join(sizes)}) in {case.dtype}, {case.phase}: {work}; {where}."


def performance_table(case: CaseResult) -> Figures:
    """A row per configuration: rate, ratio to the baseline, latencies, use of the hardware."""
    headings = ("configuration", "execution", "tokens/s", "ratio", "1/TPS", "TPOT", "TTFT", "MFU", "HBM share")
    return Figures(
        title="Performance",
        headings=(*headings, "deviation", "note"),
        rows=tuple(_performance_row(case, row) for row in case.rows),
        texts=frozenset({0, 1, 10}),
        notes=_performance_notes(case),
    ).without_empty()


def _performance_row(case: CaseResult, row: Row) -> tuple[str, ...]:
    figures = row_figures(case, row)
    if figures.rate is None:
        return (row.name, row.execution, missing_text(row.reason), *[""] * 7, in_one_line(row.reason))
    return (
        row.name,
        row.execution,
        tokens_text(figures.rate.median),
        "1 (baseline)" if row is baseline_row(case) else ratio_text(figures.ratio),
        seconds_text(figures.seconds_per_token),
        seconds_text(figures.token_seconds) if case.phase == "decode" else "",
        seconds_text(figures.first_token_seconds),
        "" if figures.flops_fraction is None else share_text(figures.flops_fraction),
        "" if figures.bandwidth_fraction is None else share_text(figures.bandwidth_fraction),
        share_text(figures.rate.relative_deviation, 2) if figures.rate.count > 1 else "",
        in_one_line(row.reason),
    )


def _performance_notes(case: CaseResult) -> tuple[str, ...]:
    own, first = "", "until the first micro-batch's result, run by itself"
    if case.phase == "decode":
        own = "; TPOT is a sequence's own time per token, median sequence"
        first = "until a sequence's first token, median sequence"
    rates = (
        "tokens/s: median of the trials; ratio: over the baseline's, with its 95% bootstrap interval over paired "
        f"trials. 1/TPS is the machine's time per token{own}. TTFT: {first}."
    )
    unknown = [
        name
        for name, known in (
            ("MFU", any(row.flops and row.peak_flops for row in case.rows)),
            ("HBM share", any(row.traffic_bytes and row.peak_bandwidth for row in case.rows)),
        )
        if not known
    ]
    if unknown:
        return rates, f"{' and '.join(unknown)}: not measured, since the peak of this device is not known."
    return rates, (
        "MFU: counted operations per second over the devices' peak. HBM share: counted bytes per second over their "
        "nominal bandwidth."
    )


def bubble_table(case: CaseResult) -> Figures | None:
    """How close each pipeline came to what its stages could do; None unless stages were timed alone."""
    limits = [(row, bubble_limit(case, row)) for row in case.rows if not is_control(case, row)]
    rows = tuple(_bubble_row(row, limit) for row, limit in limits if limit is not None)
    if not rows:
        return None
    headings = ("configuration", "m", "p", "m/(m+p-1)", "slowest stage alone", "bound, tokens/s", "reached")
    return Figures(
        title="Against the bubble bound",
        headings=(*headings, "limit of its stages, tokens/s", "reached", "limit over baseline", "ratio without bubble"),
        rows=rows,
        notes=(
            "m micro-batches of a replica, p stages. Bound: m/(m+p-1) times the rate of the slowest stage timed "
            "alone, as for equal stages. Limit of its stages: the drained schedule with every stage's own time, "
            "transfers free; over the rate of the baseline as measured. Without bubble: the ratio if both sides' "
            "pipelines were always full. Stages of what did not run were timed one after the other, without an engine.",
        ),
    ).without_empty()


def _bubble_row(row: Row, limit: BubbleLimit) -> tuple[str, ...]:
    return (
        row.name,
        f"{limit.num_micro_batches:,}",
        str(row.pipeline_parallel),
        share_text(limit.bound),
        seconds_text(limit.slowest_seconds),
        tokens_text(limit.rate_at_bound),
        share_text(limit.share_of_bound),
        tokens_text(limit.rate_of_stages),
        share_text(limit.share_of_stages),
        "" if limit.stages_over_baseline is None else f"{limit.stages_over_baseline:.3f}",
        "" if limit.ratio_without_bubble is None else ratio_text(limit.ratio_without_bubble),
    )


def consistency_table(case: CaseResult) -> Figures:
    """Spread of repeated trials, the gain pair by pair, and the A/A control."""
    baseline = baseline_row(case)
    rows = []
    for row in case.rows:
        rate = spread([case.tokens / each for each in row.seconds])
        if rate is None:
            rows.append((row.name, "0", *[""] * 6, in_one_line(row.reason)))
            continue
        ratio = None if baseline is None or row is baseline else ratio_of_rates(row.seconds, baseline.seconds)
        rows.append(
            (
                row.name,
                str(rate.count),
                tokens_text(rate.mean),
                "" if rate.deviation is None else tokens_text(rate.deviation),
                "" if rate.relative_deviation is None else share_text(rate.relative_deviation, 2),
                f"{tokens_text(rate.lowest)} .. {tokens_text(rate.highest)}",
                _gain(ratio),
                _gain_range(row, baseline) if ratio is not None else "",
                in_one_line(row.reason),
            )
        )
    return Figures(
        title="Consistency",
        headings=(
            "configuration",
            "trials",
            "mean tokens/s",
            "standard deviation",
            "relative",
            "lowest .. highest",
            "gain (95% interval)",
            "gain of single pairs",
            "note",
        ),
        rows=tuple(rows),
        texts=frozenset({0, 8}),
        notes=tuple(_consistency_notes(case)),
    ).without_empty()


def _consistency_notes(case: CaseResult) -> list[str]:
    notes = ["A trial of short batches is the median of several."]
    if case.turns:
        notes.append(f"Trials took turns: {listed(case.turns, 20)}.")
    control, baseline = control_row(case), baseline_row(case)
    if control is None or baseline is None:
        notes.append("The A/A control was not measured.")
        return notes
    ratio = ratio_of_rates(control.seconds, baseline.seconds)
    if ratio is None or ratio.low is None or ratio.high is None:
        return notes
    holds = "holds 1" if ratio.low <= 1 <= ratio.high else "does not hold 1"
    notes.append(
        f"A/A control, the baseline against itself in turns of its own: {ratio_text(ratio)}, which {holds}; "
        f"differences below {max(abs(ratio.low - 1), abs(ratio.high - 1)):.1%} are noise."
    )
    return notes


def _gain(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    interval = "" if ratio.low is None or ratio.high is None else f" [{ratio.low - 1:+.1%}, {ratio.high - 1:+.1%}]"
    return f"{change_text(ratio.value - 1)}{interval}"


def _gain_range(row: Row, baseline: Row | None) -> str:
    """Least and greatest gain of one trial over the baseline's trial of the same turn."""
    if baseline is None:
        return ""
    gains = [other / own - 1 for own, other in zip(row.seconds, baseline.seconds, strict=False)]
    return f"{change_text(min(gains))} .. {change_text(max(gains))}"


def _strategy(row: Row) -> Strategy:
    return Strategy(
        data_parallel=row.data_parallel, tensor_parallel=row.tensor_parallel, pipeline_parallel=row.pipeline_parallel
    )


def configurations_table(case: CaseResult) -> Figures:
    """What each configuration is: its share of devices, its cut, its micro-batches."""
    rows = tuple(
        (
            row.name,
            _strategy(row).label,
            row.partition if row.pipeline_parallel > 1 else "",
            boundaries_text(row.boundaries),
            f"{num_micro_batches(case, row):,} x {row.micro_batch:,}",
        )
        for row in case.rows
    )
    return Figures(
        title="Configurations",
        headings=("configuration", "devices", "partition", "boundaries", "micro-batches"),
        rows=rows,
        texts=frozenset({0, 1, 2, 3}),
    ).without_empty()
