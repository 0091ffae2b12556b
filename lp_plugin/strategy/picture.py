"""Picture of a `Study`: latency against tokens per second, and tokens per second over micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lp_plugin.errors import InvalidInputError
from lp_plugin.picture import save_figure
from lp_plugin.strategy.compare import Comparison, Study, SweepRow
from lp_plugin.strategy.outcome import Outcome

__all__ = ["strategy_picture"]

_KINDS = {
    "1 device": ("#888888", "D"),
    "DP": ("#228833", "o"),
    "TP": ("#4477aa", "s"),
    "DP x TP": ("#66ccee", "s"),
    "PP": ("#cc3311", "^"),
    "DP x PP": ("#ee7733", "^"),
    "TP x PP": ("#aa3377", "v"),
    "DP x TP x PP": ("#ccbb44", "v"),
}
"""`Strategy.kind` -> colour and marker."""

_LATENCIES = {"prefill": "latency of a request", "decode": "time per token of a sequence", "train": "step"}
_LINES = ("-", "--", ":")
_WIDE = 3.0
"""Latencies further apart than by this factor are drawn on a logarithmic axis."""
_CLEAR = 6.0
"""Pixels around a point's centre that stay clear of labels."""


def strategy_picture(study: Study, path: str | Path) -> None:
    """Strategies of each phase, and those that were swept.

    Left: what every strategy reaches, the Pareto front filled. Right: tokens per second over the number of
    micro-batches.

    Args:
        study: To draw.
        path: ``.png``, ``.svg`` or ``.pdf``; replaced as a whole.

    Raises:
        InvalidInputError: If nothing fits in any phase or takes time, or the file can't be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - a quarter of a second that only pictures need

    drawn = [
        (comparison, rows)
        for comparison, rows in zip(study.comparisons, study.sweeps, strict=True)
        if comparison.throughput is not None and comparison.throughput.tokens_per_second < math.inf
    ]
    if not drawn:
        raise InvalidInputError(
            f"{study.profile.name}: no strategy fits, or the model takes no time, so there is nothing to draw; "
            "see the report."
        )
    figure = Figure(figsize=(13.0, 0.8 + 4.6 * len(drawn)), layout="constrained")
    axes = figure.subplots(len(drawn), 2, squeeze=False, width_ratios=(3, 2))
    for (comparison, rows), (left, right) in zip(drawn, axes, strict=True):
        _draw_outcomes(left, comparison)
        if any(any(row.outcomes) for row in rows):
            _draw_sweep(right, rows, [strategy.label for strategy in study.swept])
        else:
            right.set_axis_off()
    figure.suptitle(f"{study.profile.name} on {len(study.cluster.devices)} devices", fontsize=12)
    _legend(figure, [outcome for comparison, _ in drawn for outcome in comparison.outcomes if outcome.fits])
    figure.draw_without_rendering()  # labels are placed where the points are
    for (comparison, _), (left, _) in zip(drawn, axes, strict=True):
        _label(left, [outcome for outcome in comparison.outcomes if outcome.fits])
    save_figure(figure, path)


def _draw_outcomes(axes: Any, comparison: Comparison) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter  # noqa: PLC0415

    fitting = [outcome for outcome in comparison.outcomes if outcome.fits]
    for kind, (colour, marker) in _KINDS.items():
        points = [outcome for outcome in fitting if outcome.strategy.kind == kind]
        if points:
            axes.scatter(
                [point.latency_seconds * 1e3 for point in points],
                [point.tokens_per_second for point in points],
                s=52,
                marker=marker,
                facecolors=[colour if point.on_front else "none" for point in points],
                edgecolors=colour,
                zorder=3,
            )
    workload = comparison.workload
    held = [outcome.sequences for outcome in fitting if outcome.strategy.num_devices > 1] or [fitting[0].sequences]
    some = f"{min(held):,}-{max(held):,} of {workload.batch:,}" if min(held) < workload.batch else f"{workload.batch:,}"
    latencies = [point.latency_seconds * 1e3 for point in fitting]
    if max(latencies) > _WIDE * min(latencies):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.margins(x=0.2)
    axes.set_ylim(bottom=0, top=1.12 * max(point.tokens_per_second for point in fitting))
    axes.set_xlabel(f"{_LATENCIES[workload.phase]} in ms")
    axes.set_ylabel("tokens/s")
    axes.set_title(f"{workload.phase}: {some} sequences of {workload.sequence:,} tokens", loc="left", fontsize=10)
    _tidy(axes)


def _draw_sweep(axes: Any, rows: Sequence[SweepRow], labels: Sequence[str]) -> None:
    for index, label in enumerate(labels):
        points = [(row.num_micro_batches, outcome) for row in rows if (outcome := row.outcomes[index])]
        if not points:
            continue
        colour, marker = _KINDS[points[0][1].strategy.kind]
        axes.plot(
            [count for count, _ in points],
            [outcome.tokens_per_second for _, outcome in points],
            marker=marker,
            color=colour,
            linestyle=_LINES[index % len(_LINES)],
            label=label,
        )
    axes.set_xscale("log", base=2)
    counts = [row.num_micro_batches for row in rows if any(row.outcomes)]
    axes.set_xticks(counts, [f"{count:,}" for count in counts], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("micro-batches of each replica")
    axes.set_title("tokens/s over micro-batches", loc="left", fontsize=10)
    axes.legend(fontsize=8)
    _tidy(axes)


def _legend(figure: Any, outcomes: Sequence[Outcome]) -> None:
    """The kinds that occur, below everything."""
    from matplotlib.lines import Line2D  # noqa: PLC0415

    handles = [
        Line2D([], [], linestyle="none", marker=marker, color=colour, label=kind)
        for kind, (colour, marker) in _KINDS.items()
        if any(outcome.strategy.kind == kind for outcome in outcomes)
    ]
    title = "filled: on the Pareto front of tokens/s, latency and sequences that fit"
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(_KINDS), title=title, fontsize=8, title_fontsize=8
    )


def _label(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """Each point's strategy beside it, moved up or down where a point or another label is."""
    from matplotlib.text import Text  # noqa: PLC0415
    from matplotlib.transforms import Bbox  # noqa: PLC0415

    points = {outcome: (outcome.latency_seconds * 1e3, outcome.tokens_per_second) for outcome in outcomes}
    centres = {outcome: axes.transData.transform(point) for outcome, point in points.items()}
    points_per_pixel = 72 / axes.figure.dpi
    taken = [Bbox.from_bounds(x - _CLEAR, y - _CLEAR, 2 * _CLEAR, 2 * _CLEAR) for x, y in centres.values()]
    for outcome in sorted(outcomes, key=lambda each: -each.tokens_per_second):
        text = axes.annotate(
            outcome.strategy.label,
            points[outcome],
            xytext=(0, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#999999", "shrinkA": 0, "shrinkB": 3},
        )
        text.set_in_layout(False)
        size = Text.get_window_extent(text)
        x, y = centres[outcome]
        for across, up in _places():
            left = x + across if across > 0 else x + across - size.width
            box = Bbox.from_bounds(left, y + up - size.height / 2, size.width, size.height)
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        text.set_position(((left - x) * points_per_pixel, up * points_per_pixel))


def _places() -> Iterator[tuple[float, float]]:
    """Offsets from a point in pixels: beside it, then further up and down."""
    for step in range(0, 200, 4):
        for up in (step, -step):
            yield 2.0 * _CLEAR, up
            yield -2.0 * _CLEAR, up


def _tidy(axes: Any) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(visible=True, color="#eeeeee", zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
