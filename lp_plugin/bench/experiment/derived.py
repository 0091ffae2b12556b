"""What a case's measurements say: rates, ratios, shares of what the hardware could do, errors of the predictions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lp_plugin.bench.experiment.results import CaseResult, Prediction, Row
from lp_plugin.bench.experiment.statistics import Ratio, Spread, ratio_of_rates, spread
from lp_plugin.errors import InvalidInputError
from lp_plugin.measured import LayerTimes, Links
from lp_plugin.model import LayerCost, ModelProfile
from lp_plugin.schedule import bubble_bound, makespan_seconds

__all__ = [
    "BubbleLimit",
    "ErrorSummary",
    "Regret",
    "RowFigures",
    "baseline_row",
    "bubble_limit",
    "control_row",
    "counted_dram_bytes",
    "dram_bytes",
    "error_summary",
    "first_block",
    "is_control",
    "layer_rest_bytes",
    "link_share",
    "num_micro_batches",
    "prediction_error",
    "profile_of",
    "proposed_row",
    "regrets",
    "row_figures",
    "rows_that_ran",
    "same_memory",
    "several_rows",
    "stage_errors",
    "why_nothing_ran",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFigures:
    """One configuration's figures; None where they were not measured."""

    rate: Spread | None
    """Tokens per second of the trials."""
    ratio: Ratio | None
    """Rate over the baseline's; None for the baseline itself."""
    seconds_per_token: float | None
    """1/TPS: median seconds of a trial over its tokens."""
    token_seconds: float | None
    """TPOT: decoding, a sequence's own seconds per token; median of the trials."""
    first_token_seconds: float | None
    """TTFT: until the first result; median of the trials."""
    flops_fraction: float | None
    """MFU: counted operations per second over the devices' peak."""
    bandwidth_fraction: float | None
    """HBM share: counted bytes per second over the devices' nominal bandwidth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BubbleLimit:
    """What a pipeline of these stages could reach if nothing but its own drain cost time."""

    num_micro_batches: int
    """Of the largest replica."""
    bound: float
    """m / (m + p - 1), for equal stages."""
    slowest_seconds: float
    """The slowest stage alone, one micro-batch."""
    rate_at_bound: float
    """Tokens per second: the bound times the slowest stage's rate."""
    rate_of_stages: float
    """Tokens per second of the schedule with each stage's own seconds; equal to the above for equal stages."""
    share_of_bound: float | None
    """Measured rate over ``rate_at_bound``; above 1 is possible only if stages are unequal. None if it did not run."""
    share_of_stages: float | None
    """Measured rate over ``rate_of_stages``; None if it did not run."""
    stages_over_baseline: float | None
    """``rate_of_stages`` over the baseline's measured rate; None for the baseline, and if that did not run."""
    ratio_without_bubble: Ratio | None
    """Rate over the baseline's if neither had a bubble: the ratio over the quotient of the bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """What following a prediction costs against the best that was measured."""

    source: str
    """Of the predictions."""
    chosen: str
    """Predicted fastest."""
    best: str
    """Measured fastest."""
    fraction: float
    """Seconds of the one over seconds of the other, minus 1; 0 if they are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSummary:
    """Predictions of one source beside what was measured."""

    source: str
    """Of the predictions."""
    count: int
    """Configurations compared."""
    median: float
    """Of the absolute errors."""
    worst: float
    """The largest error, with its sign."""
    where: str
    """Case and configuration of the worst."""


def baseline_row(case: CaseResult) -> Row | None:
    """What ratios refer to, if it ran."""
    return next((row for row in case.rows if row.name == case.baseline and row.seconds), None)


def control_row(case: CaseResult) -> Row | None:
    """The baseline's second run, if it ran."""
    return next((row for row in case.rows if is_control(case, row) and row.seconds), None)


def proposed_row(case: CaseResult) -> Row | None:
    """The first layer-wise pipeline of ours that ran: whole layers on each rank, cut cache-aware."""
    return next(
        (
            row
            for row in rows_that_ran(case)
            if row.pipeline_parallel > 1
            and row.tensor_parallel == row.data_parallel == 1
            and row.partition == "cache-aware"
            and row.execution != "stock"
            and row.name != case.baseline
        ),
        None,
    )


def num_micro_batches(case: CaseResult, row: Row) -> int:
    """Micro-batches of the largest replica."""
    return math.ceil(math.ceil(case.batch / row.data_parallel) / row.micro_batch)


def row_figures(case: CaseResult, row: Row) -> RowFigures:
    """Everything that one configuration's trials say."""
    baseline = baseline_row(case)
    seconds = row.median_seconds if row.seconds else None
    return RowFigures(
        rate=spread([case.tokens / each for each in row.seconds]),
        ratio=ratio_of_rates(row.seconds, baseline.seconds) if baseline is not None and baseline is not row else None,
        seconds_per_token=None if seconds is None else seconds / case.tokens,
        token_seconds=_median(row.token_seconds),
        first_token_seconds=_median(row.first_token_seconds),
        flops_fraction=_share(row.flops, seconds, row.peak_flops),
        bandwidth_fraction=_share(row.traffic_bytes, seconds, row.peak_bandwidth),
    )


def bubble_limit(case: CaseResult, row: Row) -> BubbleLimit | None:
    """How fast a prefill can be by its stages' own speed, and how close it came; None unless stages were timed."""
    if not row.alone_seconds or not max(row.alone_seconds):
        return None
    count, baseline = num_micro_batches(case, row), baseline_row(case)
    bound, slowest = bubble_bound(row.pipeline_parallel, count), max(row.alone_seconds)
    bound_seconds = count * slowest / bound
    stages_seconds = makespan_seconds(row.alone_seconds, count)
    ratio = row_figures(case, row).ratio
    if ratio is not None and baseline is not None:
        ratio = ratio.times(bubble_bound(baseline.pipeline_parallel, num_micro_batches(case, baseline)) / bound)
    return BubbleLimit(
        num_micro_batches=count,
        bound=bound,
        slowest_seconds=slowest,
        rate_at_bound=case.tokens / bound_seconds,
        rate_of_stages=case.tokens / stages_seconds,
        share_of_bound=bound_seconds / row.median_seconds if row.seconds else None,
        share_of_stages=stages_seconds / row.median_seconds if row.seconds else None,
        stages_over_baseline=None if baseline is None or baseline is row else baseline.median_seconds / stages_seconds,
        ratio_without_bubble=ratio,
    )


def prediction_error(row: Row, prediction: Prediction) -> float | None:
    """Predicted over measured seconds of a trial, minus 1; None if it did not run."""
    return prediction.seconds / row.median_seconds - 1 if row.seconds else None


def stage_errors(row: Row, prediction: Prediction) -> tuple[float, ...]:
    """The same of each stage by itself; empty if stages were not timed."""
    if len(row.alone_seconds) != len(prediction.stage_seconds) or not all(row.alone_seconds):
        return ()
    pairs = zip(prediction.stage_seconds, row.alone_seconds, strict=True)
    return tuple(predicted / measured - 1 for predicted, measured in pairs)


def regrets(case: CaseResult) -> tuple[Regret, ...]:
    """Of each source: the configuration predicted fastest against the one measured fastest, among those that ran."""
    ran = rows_that_ran(case)
    found = []
    for source in _sources(ran):
        predicted = {
            row.name: prediction.seconds for row in ran for prediction in row.predictions if prediction.source == source
        }
        compared = [row for row in ran if row.name in predicted]
        if len(compared) < 2:
            continue
        best = min(compared, key=lambda row: row.median_seconds)
        chosen = min(compared, key=lambda row: predicted[row.name])
        lost = chosen.median_seconds / best.median_seconds - 1
        found.append(Regret(source=source, chosen=chosen.name, best=best.name, fraction=lost))
    return tuple(found)


def error_summary(cases: Iterable[CaseResult]) -> tuple[ErrorSummary, ...]:
    """Of each source: median and worst error over all configurations that were predicted and ran."""
    errors: dict[str, list[tuple[float, str]]] = {}
    for case in cases:
        for row in rows_that_ran(case):
            for prediction in row.predictions:
                error = prediction_error(row, prediction)
                if error is not None:
                    errors.setdefault(prediction.source, []).append((error, f"{case.name}: {row.name}"))
    summaries = []
    for source, found in errors.items():
        worst, where = max(found, key=lambda pair: abs(pair[0]))
        middle = statistics.median(abs(error) for error, _ in found)
        summaries.append(ErrorSummary(source=source, count=len(found), median=middle, worst=worst, where=where))
    return tuple(summaries)


def dram_bytes(row: Row) -> float | None:
    """Device memory read and written for one micro-batch, by all devices of a replica; None if not measured."""
    each = [
        counters.dram_read_bytes + counters.dram_write_bytes
        for counters in row.counters
        if counters.dram_read_bytes is not None and counters.dram_write_bytes is not None
    ]
    return sum(each) * row.tensor_parallel if each and len(each) == row.pipeline_parallel else None


def counted_dram_bytes(row: Row) -> float | None:
    """The same as the planner counts it; None if counters were not asked for."""
    if len(row.counters) != row.pipeline_parallel:
        return None
    return row.tensor_parallel * sum(
        counters.counted_bytes * (1 - counters.predicted_hit_fraction) for counters in row.counters
    )


def link_share(row: Row, links: Links) -> float | None:
    """The busiest stage's bytes over NVLink per second of a trial, over the fastest message's rate.

    None if they were not counted, and of decoding, whose seconds leave out the prompts that bytes were counted with.
    """
    if row.token_seconds:
        return None
    best = max(
        (size / seconds for size, seconds in zip(links.send_bytes, links.send_seconds, strict=True)), default=0.0
    )
    measured = [counters.nvlink_bytes for counters in row.counters if counters.nvlink_bytes is not None]
    return max(measured) / row.median_seconds / best if measured and row.seconds and best else None


def same_memory(layers: Sequence[LayerTimes]) -> list[list[LayerTimes]]:
    """Together those that are the same layers, with the same memory, timed in several ways."""
    found: dict[tuple[object, ...], list[LayerTimes]] = {}
    for times in layers:
        which = (times.tensor_parallel, times.granularity, times.rows, times.weight_bytes, times.peak_bytes)
        found.setdefault(which, []).append(times)
    return list(found.values())


def several_rows(case: CaseResult) -> bool:
    """Whether layers were timed with micro-batches of different sizes."""
    return len({times.rows for times in case.layers}) > 1


def profile_of(case: CaseResult, times: LayerTimes) -> ModelProfile | None:
    """The layers that were timed, as the planner describes them; None if it can't any more."""
    try:
        profile = ModelProfile.from_config(case.model, dtype=case.dtype, granularity=times.granularity)
        profile = profile.sharded(times.tensor_parallel) if times.tensor_parallel > 1 else profile
    except InvalidInputError:
        return None
    return profile if profile.num_layers == len(times.seconds) else None


def first_block(profile: ModelProfile) -> int | None:
    """Position of the first layer that belongs to a transformer block; None if there is none."""
    return next((place for place, layer in enumerate(profile.layers) if layer.block is not None), None)


def layer_rest_bytes(case: CaseResult, times: LayerTimes, layer: LayerCost) -> float:
    """What the planner expects beside a layer's weights and input: its output and buffers, for one micro-batch."""
    tokens = times.rows * (case.sequence if case.phase == "prefill" else 1)
    return tokens * (layer.output_bytes_per_token + layer.buffer_bytes_per_token)


def _sources(rows: Iterable[Row]) -> list[str]:
    """Of predictions, in order of appearance, each once."""
    return list(dict.fromkeys(prediction.source for row in rows for prediction in row.predictions))


def why_nothing_ran(case: CaseResult) -> str:
    """The first reason; empty if something ran, or nothing was to run."""
    if case.reason or not case.rows:
        return case.reason
    return "" if any(not row.reason for row in case.rows) else case.rows[0].reason


def rows_that_ran(case: CaseResult) -> list[Row]:
    """To the end, and without the control."""
    return [row for row in case.rows if row.seconds and not row.reason and not is_control(case, row)]


def is_control(case: CaseResult, row: Row) -> bool:
    """Whether a row is the baseline's second run."""
    return row.name == f"{case.baseline} (again)"


def _median(values: tuple[float, ...]) -> float | None:
    return statistics.median(values) if values else None


def _share(amount: float, seconds: float | None, peak: float) -> float | None:
    """Amount per second over the peak; None if any of them is unknown."""
    return amount / seconds / peak if amount and seconds and peak else None
