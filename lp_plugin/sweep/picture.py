"""A sweep as a picture: tokens per second over one variable, a line for each value of another. Loads matplotlib."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lp_plugin.errors import InvalidInputError
from lp_plugin.picture import save_figure
from lp_plugin.sweep.grid import Point
from lp_plugin.sweep.report import sweep_title

__all__ = ["sweep_picture"]

_MOST_PANELS = 24
_MOST_LINES = 24
_COLOURS = ("#4477aa", "#cc3311", "#228833", "#ccbb44", "#aa3377", "#66ccee", "#333333")
_MARKERS = "os^vDPX"
_POWERS = 8.0
"""Values that span this factor, by steps that span half of it, are drawn on a logarithmic axis."""
_BAND = 0.05
"""Height of a line's marks for points without a plan, as a share of a panel."""
_MOST_BAND = 0.4
_MOST_TICKS = 12
_MOST_LETTERS = 44
_LETTERS_PER_INCH = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variable:
    """One thing that varies in a sweep."""

    name: str
    """For the axis or the legend."""
    of: Callable[[Point], Any]
    """Its value in a point."""
    values: tuple[Any, ...]
    """All of them, numbers rising, others as they come."""

    @property
    def is_number(self) -> bool:
        """Whether it can be an axis."""
        return isinstance(self.values[0], int)

    def label(self, value: Any) -> str:
        """The value as text."""
        return f"{value:,}" if self.is_number else str(value)


def sweep_picture(points: Sequence[Point], path: str | Path) -> None:
    """Tokens per second of every point; those without a plan are marked at the foot.

    The number with most values is the axis (devices, then tokens, then sequences if they have equally many); of the
    rest the variable with most values has a line for each; the others have a panel for each combination.

    Args:
        points: Of one sweep.
        path: ``.png``, ``.svg`` or ``.pdf``; replaced as a whole.

    Raises:
        InvalidInputError: If there are too many values to draw, or the file can't be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - a quarter of a second that only pictures need

    axis, line, panels = _roles(points)
    columns, rows = _layout(panels)
    single = columns * rows == 1
    width, height = (9.0, 5.2) if single else (1.6 + 4.2 * columns, 1.2 + 3.2 * rows)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    spots = [axes for row in grid for axes in row]
    combinations = list(itertools.product(*(panel.values for panel in panels)))
    band = min(_BAND * len(line.values), _MOST_BAND) if any(not _is_drawn(point) for point in points) else 0.0
    scale = _scale(points, band)
    for axes, combination in itertools.zip_longest(spots, combinations):
        if combination is None:
            axes.set_visible(False)
            continue
        here = [point for point in points if tuple(panel.of(point) for panel in panels) == combination]
        _draw(axes, here, axis, line, band)
        title = ", ".join(_said(panel, value) for panel, value in zip(panels, combination, strict=True))
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_yscale("log" if scale.is_log else "linear")
        axes.set_ylim(scale.low, scale.high)
    _finish(figure, grid, axis, scale)
    _legend(figure, line, points)
    figure.suptitle("\n".join(textwrap.wrap(sweep_title(points), round(width * _LETTERS_PER_INCH))), fontsize=11)
    save_figure(figure, path)


def _roles(points: Sequence[Point]) -> tuple[_Variable, _Variable, list[_Variable]]:
    """What is the axis, what has a line for each value, and what has panels."""
    context = "tokens of context" if points[0].phase == "decode" else "tokens of a sequence"
    rows: dict[str, Callable[[Point], Any]] = {
        "devices": lambda point: point.num_devices,
        context: lambda point: point.sequence,
        "sequences in the batch": lambda point: point.batch,
        "device": lambda point: point.device,
        "precision": _precision,
    }
    if len({(point.device, point.num_devices) for point in points}) < len({point.cluster for point in points}):
        del rows["devices"], rows["device"]
        rows["cluster"] = lambda point: point.cluster
    variables = []
    for name, of in rows.items():
        values = list(dict.fromkeys(of(point) for point in points))
        variables.append(
            _Variable(name=name, of=of, values=tuple(sorted(values) if isinstance(values[0], int) else values))
        )
    axis = max(variables, key=lambda each: (each.is_number and len(each.values) > 1, len(each.values)))
    others = sorted((each for each in variables if each is not axis), key=lambda each: -len(each.values))
    return axis, others[0], [each for each in others[1:] if len(each.values) > 1]


def _precision(point: Point) -> str:
    return point.dtype if point.weight_dtype == point.dtype else f"{point.dtype}, {point.weight_dtype} weights"


def _layout(panels: Sequence[_Variable]) -> tuple[int, int]:
    """Columns and rows: the first variable across, all others down; one alone in a block."""
    counts = [len(panel.values) for panel in panels]
    total = math.prod(counts)
    if total > _MOST_PANELS:
        sizes = " x ".join(f"{len(panel.values)} of {panel.name}" for panel in panels)
        raise InvalidInputError(
            f"the picture would have {total} panels ({sizes}); at most {_MOST_PANELS} are drawn. Vary less at once, "
            "or write the CSV alone."
        )
    if len(counts) > 1:
        return total // math.prod(counts[:-1]), math.prod(counts[:-1])
    columns = total if total <= 3 else math.ceil(math.sqrt(total))
    return columns, math.ceil(total / columns)


def _is_drawn(point: Point) -> bool:
    return point.tokens_per_second is not None and 0 < point.tokens_per_second < math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """The vertical axis, its foot kept clear for marks."""

    low: float
    """Where it begins."""
    floor: float
    """The lowest rate that has a tick."""
    high: float
    """Where it ends."""
    is_log: bool
    """Whether equal distances are equal factors."""


def _scale(points: Sequence[Point], band: float) -> _Scale:
    """Room for all rates above the lowest ``band`` of the axis."""
    rates = [point.tokens_per_second or 0.0 for point in points if _is_drawn(point)]
    if not rates:
        return _Scale(low=0.0, floor=math.inf, high=1.0, is_log=False)
    if max(rates) > _POWERS * min(rates):
        top, floor = math.log10(max(rates)) + 0.08, math.log10(min(rates)) - 0.08
        return _Scale(low=10 ** (floor - (top - floor) * band / (1 - band)), floor=10**floor, high=10**top, is_log=True)
    high = 1.1 * max(rates)
    return _Scale(low=-high * band / (1 - band), floor=0.0, high=high, is_log=False)


def _draw(axes: Any, points: Sequence[Point], axis: _Variable, line: _Variable, band: float) -> None:
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    places = {value: value if axis.is_number else index for index, value in enumerate(axis.values)}
    transform = axes.get_xaxis_transform()
    for index, value in enumerate(line.values):
        colour, marker = _style(line, index)
        here = sorted((point for point in points if line.of(point) == value), key=lambda point: places[axis.of(point)])
        if any(_is_drawn(point) for point in here):
            axes.plot(
                [places[axis.of(point)] for point in here],
                [point.tokens_per_second if _is_drawn(point) else math.nan for point in here],
                linestyle="-" if axis.is_number else "none",
                marker=marker,
                markersize=5,
                color=colour,
                zorder=3,
            )
        height = band * (1 - (index + 0.5) / len(line.values))
        for outcome, sign in (("does not fit", "x"), ("makes no sense", "_")):
            missing = [places[axis.of(point)] for point in here if point.outcome == outcome]
            axes.scatter(
                missing, [height] * len(missing), transform=transform, marker=sign, s=26, color=colour, lw=1.4, zorder=4
            )
    if band:
        axes.add_patch(Rectangle((0, 0), 1, band, transform=axes.transAxes, color="#f4f4f4", zorder=1, lw=0))


def _style(line: _Variable, index: int) -> tuple[Any, str]:
    """Colour and marker: numbers and long lists from dark to light, names each its own."""
    from matplotlib import colormaps  # noqa: PLC0415

    count = len(line.values)
    if count > _MOST_LINES:
        raise InvalidInputError(
            f"the picture would have {count} lines, one for each of {line.name}; at most {_MOST_LINES} are drawn. Vary "
            "less at once, or write the CSV alone."
        )
    by_name = not line.is_number and count <= len(_COLOURS)
    colour = _COLOURS[index] if by_name or count == 1 else colormaps["viridis"](0.88 * index / (count - 1))
    return colour, _MARKERS[index % len(_MARKERS)]


def _finish(figure: Any, grid: Any, axis: _Variable, scale: _Scale) -> None:
    """Axes: ticks at the values themselves, and at rates above the marks."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator  # noqa: PLC0415

    first = grid[0][0]
    if axis.is_number:
        _number_axis(first, axis.values)
    else:
        first.set_xlim(-0.5, len(axis.values) - 0.5)
    ticks = _some(axis.values) if axis.is_number else range(len(axis.values))
    labels = [axis.label(value) for value in (ticks if axis.is_number else axis.values)]
    first.set_xticks(ticks, labels)
    first.xaxis.set_minor_locator(NullLocator())
    if scale.is_log:
        first.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    rates = first.yaxis.get_major_locator().tick_values(scale.low, scale.high)
    first.yaxis.set_major_locator(FixedLocator([rate for rate in rates if scale.floor <= rate <= scale.high]))
    first.yaxis.set_minor_locator(NullLocator())
    first.yaxis.set_major_formatter(lambda rate, _: f"{rate:,.0f}" if rate >= 10 or rate == 0 else f"{rate:.3g}")
    for axes in grid.flat:
        axes.grid(visible=True, color="#e6e6e6", zorder=0)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=8, rotation=35 if sum(map(len, labels)) > _MOST_LETTERS else 0)
        axes.tick_params(axis="y", labelsize=8)
    figure.supxlabel(axis.name, fontsize=10)
    figure.supylabel("tokens/s", fontsize=10)


def _number_axis(axes: Any, values: Sequence[int]) -> None:
    """Limits a little beyond the values; powers at equal distances."""
    steps = [high - low for low, high in itertools.pairwise(values)] or [1]
    if values[-1] >= _POWERS * values[0] and max(steps) >= _POWERS / 2 * min(steps):
        axes.set_xscale("log", base=2)
        margin = (values[-1] / values[0]) ** 0.04
        axes.set_xlim(values[0] / margin, values[-1] * margin)
        return
    margin = 0.04 * (values[-1] - values[0]) or 0.5
    axes.set_xlim(values[0] - margin, values[-1] + margin)


def _some(values: Sequence[int]) -> Sequence[int]:
    """At most `_MOST_TICKS` of them at equal distances in the list, the last included."""
    step = math.ceil(len(values) / _MOST_TICKS)
    return values[(len(values) - 1) % step :: step]


def _legend(figure: Any, line: _Variable, points: Sequence[Point]) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415

    handles = []
    if len(line.values) > 1:
        for index, value in enumerate(line.values):
            colour, marker = _style(line, index)
            handles.append(Line2D([], [], color=colour, marker=marker, markersize=5, label=line.label(value)))
    for outcome, sign in (("does not fit", "x"), ("makes no sense", "_")):
        if any(point.outcome == outcome for point in points):
            handles.append(Line2D([], [], linestyle="none", marker=sign, color="#555555", label=outcome))
    if handles:
        title = line.name if len(line.values) > 1 else None
        figure.legend(handles=handles, loc="outside center right", fontsize=8, title=title, title_fontsize=8)


def _said(variable: _Variable, value: Any) -> str:
    """A value with the name of what it is, for a panel's title."""
    return f"{variable.label(value)} {variable.name}" if variable.is_number else str(value)
