"""Tables of what the devices did: clocks, where time went, how memory was accessed, what took room in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from lp_plugin.bench.experiment.derived import (
    baseline_row,
    dram_bytes,
    layer_rest_bytes,
    link_share,
    profile_of,
    same_memory,
    several_rows,
)
from lp_plugin.bench.experiment.document import Figures
from lp_plugin.bench.experiment.results import CaseResult
from lp_plugin.bench.experiment.wording import (
    NOT_MEASURED,
    bytes_text,
    change_text,
    in_one_line,
    seconds_text,
    share_text,
)
from lp_plugin.measured import Clock, LayerTimes, TimeSplit
from lp_plugin.model import LayerCost
from lp_plugin.quantity import format_bytes, format_seconds

__all__ = [
    "clocks_table",
    "footprint_table",
    "memory_access_table",
    "memory_table",
    "time_split_table",
]

_NOISE_SECONDS = 1e-6
"""Of a layer's time."""


def clocks_table(case: CaseResult) -> Figures | None:
    """A row per rank whose GPU told its clock; None if none did."""
    rows = _ranks_joined(
        (row.name, str(each.rank), *_clock_cells(each.trials, each.alone)) for row in case.rows for each in row.clocks
    )
    if not rows:
        return None
    headings = ("configuration", "rank", "in trials", "alone", "change", "capped in trials", "capped alone")
    return Figures(
        title="Clocks",
        headings=headings,
        rows=rows,
        notes=(
            "Of the multiprocessors, by the driver, the median turn; alone: while stages were timed by themselves. "
            "Capped: share of the time in which its power limit held the GPU back.",
        ),
    )


def _clock_cells(trials: Clock | None, alone: Clock | None) -> tuple[str, ...]:
    return (
        _hertz_text(trials),
        _hertz_text(alone),
        "" if trials is None or alone is None else change_text(trials.hertz / alone.hertz - 1),
        "" if trials is None else share_text(trials.capped_fraction, 0),
        "" if alone is None else share_text(alone.capped_fraction, 0),
    )


def _hertz_text(clock: Clock | None) -> str:
    return "" if clock is None else f"{clock.hertz / 1e6:,.0f} MHz"


def time_split_table(case: CaseResult) -> Figures | None:
    """A row per profiled rank, as shares of the trial's time; None if nothing was profiled."""
    rows = _ranks_joined(
        (row.name, str(split.rank), format_seconds(split.wall_seconds), *_split_cells(split))
        for row in case.rows
        for split in row.split
    )
    if not rows:
        return None
    headings = ("configuration", "rank", "trial", "compute", "of it alone", "both at once", "communication alone")
    return Figures(
        title="Time split",
        headings=(*headings, "bytes moving", "waiting for the peer", "idle"),
        rows=rows,
        notes=(
            "Of one profiled trial, from the first to the last thing that any rank did; the profiler adds to every "
            "launch, so trials above are the ones to compare. Compute alone, both at once, communication alone and "
            "idle are 100% of the trial. Communication alone is bytes moving (all peers were there) and waiting for "
            "the peer. Memory-bound kernels count as compute: memory traffic is not a time of its own.",
        ),
    )


def _split_cells(split: TimeSplit) -> tuple[str, ...]:
    wall = split.wall_seconds or 1.0
    alone = split.communication_seconds - split.overlap_seconds
    moving = split.exposed_transfer_seconds
    shares: tuple[float | None, ...] = (
        split.compute_seconds,
        split.compute_seconds - split.overlap_seconds,
        split.overlap_seconds,
        alone,
        moving,
        None if moving is None else alone - moving,
        split.idle_seconds,
    )
    return tuple(share_text(None if seconds is None else max(seconds, 0.0) / wall) for seconds in shares)


def _ranks_joined(rows: Iterable[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Neighbours that differ in nothing but their second cell, the rank, as one: ``0 .. 3``."""
    joined: list[tuple[str, ...]] = []
    for (name, *_), group in groupby(rows, key=lambda row: (row[0], *row[2:])):
        same = list(group)
        ranks = same[0][1] if len(same) == 1 else f"{same[0][1]} .. {same[-1][1]}"
        joined.append((name, ranks, *same[0][2:]))
    return tuple(joined)


def memory_access_table(case: CaseResult) -> Figures | None:
    """A row per stage whose counters were asked for; None if none were."""
    rows = tuple(
        (
            row.name,
            str(each.stage),
            share_text(each.l2_read_hit_fraction),
            share_text(each.predicted_hit_fraction),
            bytes_text(each.dram_read_bytes),
            bytes_text(each.dram_write_bytes),
            bytes_text(each.counted_bytes),
            bytes_text(each.nvlink_bytes),
            bytes_text(each.counted_link_bytes),
            "; ".join(
                dict.fromkeys(in_one_line(reason).rstrip(".") for reason in (each.reason, each.nvlink_reason) if reason)
            ),
        )
        for row in case.rows
        for each in row.counters
    )
    if not rows:
        return None
    headings = ("configuration", "stage", "L2 read hits", "first tier predicted", "DRAM read", "DRAM written")
    return Figures(
        title="Memory access",
        headings=(*headings, "bytes counted", "sent over NVLink", "sent, counted", "note"),
        rows=rows,
        texts=frozenset({0, 9}),
        notes=tuple(_memory_access_notes(case)),
    ).without_empty()


def _memory_access_notes(case: CaseResult) -> list[str]:
    notes = [
        "Counters of one pass of one micro-batch through the stage on one device, passes following each other. Bytes "
        "counted: what the planner says the pass moves in and out of its tier. NVLink: one trial."
    ]
    baseline = baseline_row(case)
    before = None if baseline is None else dram_bytes(baseline)
    for row in case.rows:
        now = dram_bytes(row)
        if before and now is not None and row is not baseline:
            change = f"{now / before - 1:+.1%}"
            notes.append(
                f"{row.name}: {format_bytes(now)} of DRAM traffic per micro-batch on all devices of a replica, against "
                f"{format_bytes(before)} of {case.baseline} ({change})."
            )
    for row in case.rows:
        share = link_share(row, case.links)
        if share is not None:
            notes.append(f"{row.name}: NVLink at {share:.1%} of the fastest message measured here, over a trial.")
    return notes


def footprint_table(case: CaseResult) -> Figures | None:
    """A row per distinct layer: memory and time, predicted beside measured; None if no layer was timed."""
    rows = tuple(row for ways in same_memory(case.layers) for row in _footprint_rows(case, ways))
    if not rows:
        return None
    headings = ("layer", "TP", "rows", "timed as", "weights", "measured", "error", "output and buffers", "measured")
    return Figures(
        title="Footprint per layer",
        headings=(*headings, "error", "total", "time", "in the first tier"),
        rows=rows,
        texts=frozenset({0, 3}),
        notes=(
            "Of one rank, one micro-batch. Predicted from the configuration alone, "
            "then measured, then the error of the prediction. Output and buffers: the most that is alive beside "
            "weights and input. Time: alone, weights from memory; in the first tier: over and over on one copy, "
            "where it could fit; if timed in several ways, in that order.",
        ),
    ).without_empty()


def _footprint_rows(case: CaseResult, ways: Sequence[LayerTimes]) -> Iterable[tuple[str, ...]]:
    times, profile = ways[0], profile_of(case, ways[0])
    if profile is None:
        return
    for places in _alike(profile.layers, ways):
        first, last = places[0], places[-1]
        layer, weights, peak = profile.layers[first], times.weight_bytes[first], times.peak_bytes[first]
        buffers = layer_rest_bytes(case, times, layer)
        residents = [each.resident_seconds[first] for each in ways]
        yield (
            layer.name if first == last else f"{layer.name} .. {profile.layers[last].name}, each of {len(places)}",
            str(times.tensor_parallel),
            f"{times.rows:,}" if several_rows(case) else "",
            ", ".join(each.execution for each in ways),
            bytes_text(layer.weight_bytes),
            bytes_text(weights),
            change_text(layer.weight_bytes / weights - 1) if weights else "",
            bytes_text(buffers),
            bytes_text(peak),
            change_text(buffers / peak - 1) if peak else "",
            bytes_text(layer.weight_bytes + buffers),
            ", ".join(_above_noise(each.seconds[first]) for each in ways),
            ", ".join(_above_noise(each) for each in residents if each is not None),
        )


def _above_noise(seconds: float) -> str:
    """A layer's time; what is left of a short one, once the pass around it is taken off, may be nothing."""
    return seconds_text(seconds) if seconds >= _NOISE_SECONDS else f"< {format_seconds(_NOISE_SECONDS)}"


def _alike(layers: Sequence[LayerCost], ways: Sequence[LayerTimes]) -> list[list[int]]:
    """Positions of layers that are the same but for their number, in order of the first of each kind."""
    found: dict[tuple[object, ...], list[int]] = {}
    for place, layer in enumerate(layers):
        measured = tuple((each.weight_bytes[place], each.peak_bytes[place], each.seconds[place]) for each in ways)
        found.setdefault((layer.kind, layer.weight_bytes, *measured), []).append(place)
    return list(found.values())


def memory_table(case: CaseResult) -> Figures | None:
    """A row per rank: memory after loading and at the peak; None if no configuration said."""
    rows = _ranks_joined(
        (
            row.name,
            str(each.rank),
            bytes_text(each.predicted_weights),
            bytes_text(each.loaded),
            change_text(each.predicted_weights / each.loaded - 1) if each.loaded else "",
            bytes_text(each.predicted_peak),
            bytes_text(each.peak),
            change_text(each.predicted_peak / each.peak - 1) if each.peak else "",
        )
        for row in case.rows
        for each in row.memory
    )
    if not rows:
        return None
    on_cpus = case.environment is not None and case.environment.backend == "gloo"
    why = f" {NOT_MEASURED.capitalize()} on CPUs." if on_cpus else ""
    headings = ("configuration", "rank", "weights predicted", "loaded", "error", "peak predicted", "peak", "error")
    return Figures(
        title="Memory per rank",
        headings=headings,
        rows=rows,
        notes=(f"Peak: weights, activations, KV cache and buffers together.{why}",),
    )
