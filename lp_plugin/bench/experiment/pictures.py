"""Pictures of trials, predictions, footprints and simulated clusters. matplotlib is loaded only when one is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lp_plugin.bench.experiment.derived import (
    baseline_row,
    first_block,
    is_control,
    layer_rest_bytes,
    profile_of,
    row_figures,
    rows_that_ran,
    same_memory,
    several_rows,
)
from lp_plugin.bench.experiment.results import CaseResult, SimulatedRow
from lp_plugin.bench.experiment.scaling import rates_by_family, simulated_cases, starting_point
from lp_plugin.bench.experiment.statistics import Ratio
from lp_plugin.bench.experiment.wording import ratio_text, tokens_text
from lp_plugin.picture import save_figure
from lp_plugin.quantity import format_bytes

__all__ = ["footprint_picture", "new_axes", "performance_picture", "prediction_picture", "scaling_picture"]

_BLUE, _GREEN, _GREY, _RED, _YELLOW, _PURPLE = "#4477aa", "#228833", "#888888", "#cc3311", "#ccbb44", "#aa3377"
_SOURCES = {"catalogue": (_GREY, "o"), "calibrated": (_BLUE, "s"), "timed layers": (_GREEN, "^")}
_FAMILIES = {
    "TP x PP": (_GREY, "s"),
    "PP": (_BLUE, "o"),
    "PP, sub-layer cuts": (_GREEN, "^"),
    "DP": (_PURPLE, "D"),
}


def new_axes(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes; matplotlib is loaded here."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - a quarter of a second that only pictures need

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def performance_picture(case: CaseResult, path: Path) -> bool:
    """Tokens per second of each configuration with every trial, and the ratio with its interval.

    Returns:
        Whether there was anything to draw.
    """
    if not any(row.seconds for row in case.rows):
        return False
    rows, fastest = case.rows, case.tokens / min(row.median_seconds for row in case.rows if row.seconds)
    figure, (left, right) = new_axes(11.0, 1.5 + 0.42 * len(rows), 1, 2, sharey=True, width_ratios=(3, 2))
    for place, row in enumerate(rows):
        if not row.seconds:
            left.text(0.0, place, " left out", va="center", color=_RED, fontsize=8)
            continue
        colour = _GREY if row is baseline_row(case) or is_control(case, row) else _BLUE
        rate, trials = case.tokens / row.median_seconds, [case.tokens / each for each in row.seconds]
        left.barh(place, rate, color=colour, height=0.66)
        left.plot(trials, [place] * len(trials), "|", color="black", ms=9)
        where, shade = (0.0, "white") if rate > 0.2 * fastest else (max(trials), "black")
        left.text(where, place, f"  {tokens_text(rate)}", va="center", color=shade, fontsize=8, fontweight="bold")
        ratio = row_figures(case, row).ratio
        if ratio is not None:
            _draw_ratio(right, place, ratio, colour)
    left.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=9)
    left.set_ylim(len(rows) - 0.4, -0.7)
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.set_xlabel("tokens/s, median; marks: single trials")
    right.axvline(1.0, color="black", lw=0.8, ls=":")
    right.margins(x=0.3)
    right.set_xlabel(f"ratio to {case.baseline}, with 95% interval")
    _finish(figure, f"{case.name}, {case.phase}", path, left, right)
    return True


def _draw_ratio(axes: Any, place: int, ratio: Ratio, colour: str) -> None:
    if ratio.low is not None and ratio.high is not None:
        axes.plot([ratio.low, ratio.high], [place, place], color=colour, lw=5, alpha=0.4, solid_capstyle="butt")
    axes.plot(ratio.value, place, "o", color=colour, ms=4)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    where = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "bbox": box}
    axes.annotate(ratio_text(ratio), (ratio.value, place), (0, 6), **where)


def prediction_picture(cases: Sequence[CaseResult], path: Path) -> bool:
    """Predicted against measured seconds of every configuration, by source; the diagonal is a perfect prediction.

    Returns:
        Whether there was anything to draw.
    """
    points = [
        (prediction.source, row.median_seconds, prediction.seconds)
        for case in cases
        for row in rows_that_ran(case)
        for prediction in row.predictions
    ]
    if not points:
        return False
    figure, (left, right) = new_axes(11.0, 4.6, 1, 2)
    lowest = min(min(measured, predicted) for _, measured, predicted in points)
    highest = max(max(measured, predicted) for _, measured, predicted in points)
    left.plot([lowest, highest], [lowest, highest], color="black", lw=0.8, ls=":")
    for source in _SOURCES:
        _draw_predictions(left, right, source, [own for name, *own in points if name == source])
    right.axhline(0.0, color="black", lw=0.8, ls=":")
    if max(abs(predicted / measured - 1) for _, measured, predicted in points) > 0.5:
        right.set_yscale("symlog", linthresh=10)
        right.yaxis.set_major_formatter("{x:g}")
    right.axhspan(-5, 5, color=_GREEN, alpha=0.1, lw=0)
    if highest > 3 * lowest:
        for axes in (left, right):
            axes.set_xscale("log")
        left.set_yscale("log")
        _label_decades(left.xaxis, left.yaxis, right.xaxis)
    for axes, label in ((left, "predicted seconds"), (right, "error in %; band: 5%")):
        axes.set_xlabel("measured seconds of a trial")
        axes.set_ylabel(label)
    left.legend(fontsize=9, frameon=False)
    _finish(figure, "predicted against measured", path, left, right)
    return True


def _draw_predictions(left: Any, right: Any, source: str, points: Sequence[Sequence[float]]) -> None:
    """One source's: measured and predicted seconds on the left, errors on the right."""
    if not points:
        return
    colour, marker = _SOURCES[source]
    style: dict[str, Any] = {"color": colour, "marker": marker, "ls": "", "ms": 7, "alpha": 0.75, "label": source}
    left.plot(*zip(*points, strict=True), **style)
    errors = [(measured, 100 * (predicted / measured - 1)) for measured, predicted in points]
    right.plot(*zip(*errors, strict=True), **style)


def footprint_picture(case: CaseResult, path: Path) -> bool:
    """Each rank's memory by the plan beside what was measured, and a layer's, predicted and measured.

    Returns:
        Whether there was anything to draw.
    """
    bars = [*_layer_bars(case), *_rank_bars(case)]
    if not bars:
        return False
    largest = max(bar.weights + bar.rest for bar in bars)
    scale, unit = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    figure, axes = new_axes(11.0, 1.3 + 0.27 * len(bars))
    for place, bar in enumerate(bars):
        faint = 0.45 if bar.is_predicted else 1.0
        axes.barh(place, bar.weights / scale, color=_BLUE, alpha=faint, height=0.8)
        axes.barh(place, bar.rest / scale, left=bar.weights / scale, color=_YELLOW, alpha=faint, height=0.8)
        rest = f" + {format_bytes(bar.rest)}" if bar.rest else ""
        text = f" {format_bytes(bar.weights)}{rest}"
        axes.text((bar.weights + bar.rest) / scale, place, text, va="center", fontsize=8)
    names = [f"{bar.name}, {'predicted' if bar.is_predicted else 'measured'}" for bar in bars]
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * largest / scale)
    axes.set_xlabel(f"{unit}: weights (blue), everything else at the peak (yellow); pale: predicted")
    _finish(figure, f"{case.name}: footprint", path, axes)
    return True


class _Bar(NamedTuple):
    """Bytes of a layer or a rank."""

    name: str
    weights: int
    rest: float
    is_predicted: bool


def _layer_bars(case: CaseResult) -> Iterator[_Bar]:
    """The first block, as each degree of tensor parallelism holds it; by execution where that makes a difference."""
    groups = same_memory(case.layers)
    kinds = Counter((ways[0].tensor_parallel, ways[0].granularity, ways[0].rows) for ways in groups)
    for ways in groups:
        times = ways[0]
        profile = profile_of(case, times)
        place = None if profile is None else first_block(profile)
        if profile is None or place is None:
            continue
        layer, peak = profile.layers[place], times.peak_bytes[place]
        name = layer.name if times.tensor_parallel == 1 else f"{layer.name} of TP={times.tensor_parallel}"
        if several_rows(case):
            name = f"{name}, {times.rows:,} rows"
        if kinds[times.tensor_parallel, times.granularity, times.rows] > 1:
            name = f"{name}, {' and '.join(each.execution for each in ways)}"
        yield _Bar(name, layer.weight_bytes, layer_rest_bytes(case, times, layer), is_predicted=True)
        yield _Bar(name, times.weight_bytes[place], peak or 0, is_predicted=False)


def _rank_bars(case: CaseResult) -> Iterator[_Bar]:
    """The fullest rank of each configuration."""
    for row in case.rows:
        fullest = max(row.memory, key=lambda each: each.predicted_peak, default=None)
        if fullest is None or is_control(case, row):
            continue
        name, weights = f"{row.name}, fullest rank", fullest.predicted_weights
        yield _Bar(name, weights, fullest.predicted_peak - weights, is_predicted=True)
        if fullest.loaded is not None:
            rest = 0 if fullest.peak is None else max(fullest.peak - fullest.loaded, 0)
            yield _Bar(name, fullest.loaded, rest, is_predicted=False)


def scaling_picture(simulated: Sequence[SimulatedRow], path: Path) -> bool:
    """Simulated tokens per second over the number of devices, with the straight line from each curve's first point.

    Returns:
        Whether there was anything to draw.
    """
    cases = {name: curves for name, rows in simulated_cases(simulated).items() if (curves := rates_by_family(rows))}
    if not cases:
        return False
    columns, lines = min(len(cases), 2), -(-len(cases) // 2)
    figure, grid = new_axes(1.0 + 6.5 * columns, 4.6 * lines, lines, columns, squeeze=False)
    for axes in grid.flat[len(cases) :]:
        axes.set_axis_off()
    for axes, (name, curves) in zip(grid.flat, cases.items(), strict=False):
        for family, curve in curves.items():
            colour, marker = _FAMILIES.get(family, (_RED, "v"))
            axes.plot(list(curve), list(curve.values()), color=colour, marker=marker, label=family, alpha=0.85)
            (fewest, rate), most = starting_point(curves, family), max(curve)
            axes.plot([fewest, most], [rate, rate * most / fewest], color=colour, lw=0.8, ls=":")
        axes.set_xticks(sorted({devices for curve in curves.values() for devices in curve}))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("devices; dotted: linear from the first point")
        axes.set_ylabel("tokens/s, SIMULATED")
        axes.legend(fontsize=8, frameon=False)
        axes.set_title(name, loc="left", fontsize=10)
    _finish(figure, "simulated clusters, fed with measured layers and links", path, *grid.flat)
    return True


def _label_decades(*axis: Any) -> None:
    """Plain numbers at 1, 2 and 5 of logarithmic axes."""
    from matplotlib.ticker import LogLocator, NullFormatter  # noqa: PLC0415

    for each in axis:
        each.set_major_locator(LogLocator(subs=(1, 2, 5)))
        each.set_major_formatter("{x:g}")
        each.set_minor_formatter(NullFormatter())


def _finish(figure: Any, title: str, path: Path, *axes: Any) -> None:
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)
