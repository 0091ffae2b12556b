"""Pictures: a plan's memory and schedule, a run's timeline. matplotlib is loaded only here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lp_plugin.errors import InvalidInputError
from lp_plugin.files import check_output
from lp_plugin.plan import Plan
from lp_plugin.quantity import format_bytes, format_seconds
from lp_plugin.schedule import Interval, forward_timeline

__all__ = ["check_picture", "plan_picture", "save_figure", "timeline_picture"]

_KINDS = {
    "weights": ("weight_bytes", "#4477aa"),
    "KV cache": ("kv_bytes", "#66ccee"),
    "activations": ("activation_bytes", "#228833"),
    "buffers": ("buffer_bytes", "#ccbb44"),
    "training state": ("training_bytes", "#aa3377"),
}
_ENDINGS = (".png", ".svg", ".pdf")
_TRANSFER = "#bbbbbb"
_SHOWN_MICRO_BATCHES = 12


def plan_picture(plan: Plan, path: str | Path) -> None:
    """Memory by kind against capacity per stage, and the predicted pipeline timeline.

    Args:
        plan: To draw.
        path: ``.png``, ``.svg`` or ``.pdf``; replaced as a whole.
    """
    figure, (memory, timeline) = _canvas(plan.num_stages)
    _draw_memory(memory, plan)
    shown = min(plan.num_micro_batches, _SHOWN_MICRO_BATCHES)
    intervals = forward_timeline(plan.stage_seconds, shown)
    _draw_timeline(timeline, intervals, plan.num_stages)
    more = "" if shown == plan.num_micro_batches else f", first {shown} of {plan.num_micro_batches} micro-batches"
    timeline.set_title(f"predicted timeline{more}", loc="left", fontsize=10)
    workload = plan.workload
    figure.suptitle(
        f"{plan.model_name}: {plan.num_stages} stages, {workload.phase}, batch {workload.batch} x {workload.sequence}, "
        f"bottleneck {format_seconds(plan.bottleneck_seconds)}, bubble {plan.bubble_fraction:.1%}",
        fontsize=11,
    )
    save_figure(figure, path)


def timeline_picture(
    intervals: Sequence[Interval], num_stages: int, path: str | Path, *, title: str = "measured timeline"
) -> None:
    """What each stage did when; forward passes coloured by micro-batch, transfers and waiting grey."""
    figure, axes = _figure(11.0, 1.6 + 0.45 * num_stages)
    _draw_timeline(axes, intervals, num_stages)
    axes.set_title(title, loc="left", fontsize=10)
    save_figure(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # noqa: PLC0415 - a quarter of a second that only pictures need

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _canvas(num_stages: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # noqa: PLC0415

    height = 1.2 + 0.3 * num_stages
    figure = Figure(figsize=(11.0, 1.2 + 2 * height), layout="constrained")
    return figure, figure.subplots(2, 1)


def _draw_memory(axes: Any, plan: Plan) -> None:
    largest = max(max(stage.capacity_bytes, stage.memory_bytes) for stage in plan.stages)
    left = [0.0] * plan.num_stages
    positions = list(range(plan.num_stages))
    for label, (field, colour) in _KINDS.items():
        widths = [getattr(stage, field) / 1e9 for stage in plan.stages]
        if any(widths):
            axes.barh(positions, widths, left=left, color=colour, label=label, height=0.7)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    fullest = max(stage.memory_bytes / stage.capacity_bytes for stage in plan.stages)
    for position, stage in enumerate(plan.stages):
        if fullest > 0.25:  # else the limit would squeeze the bars: it stands in the text
            limit = stage.capacity_bytes / 1e9
            axes.plot([limit, limit], [position - 0.45, position + 0.45], color="#cc3311", linewidth=2)
        text = f" {format_bytes(stage.memory_bytes)} of {format_bytes(stage.capacity_bytes)}, tier {stage.tier}"
        axes.text(left[position], position, text, va="center", fontsize=8)
    shown = largest / 1e9 if fullest > 0.25 else max(left)
    axes.set_xlim(0, 1.45 * shown)
    axes.set_yticks(positions, [_stage_label(plan, position) for position in positions], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GB on the device" + (" (red: usable)" if fullest > 0.25 else ""))
    axes.set_title("memory by kind", loc="left", fontsize=10)
    axes.legend(loc="lower right", fontsize=8, ncols=len(_KINDS))
    axes.spines[["top", "right"]].set_visible(False)


def _stage_label(plan: Plan, position: int) -> str:
    stage = plan.stages[position]
    first, last = stage.layers[0], stage.layers[-1]
    return f"{position}: {first}" if first == last else f"{position}: {first} .. {last}"


def _draw_timeline(axes: Any, intervals: Sequence[Interval], num_stages: int) -> None:
    from matplotlib import colormaps  # noqa: PLC0415

    colours = colormaps["viridis"]
    count = max((each.micro_batch for each in intervals), default=0) + 1
    end = max((each.stop_seconds for each in intervals), default=0.0)
    scale, unit = (1e3, "ms") if end < 10 else (1.0, "s")
    for each in intervals:
        width = (each.stop_seconds - each.start_seconds) * scale
        is_forward = each.kind == "forward"
        colour = colours(0.15 + 0.8 * each.micro_batch / count) if is_forward else _TRANSFER
        height = 0.8 if is_forward else 0.3
        edge = "white" if count <= 64 and is_forward else "none"
        axes.barh(
            each.stage, width, left=each.start_seconds * scale, height=height, color=colour, edgecolor=edge, lw=0.4
        )
        if count <= _SHOWN_MICRO_BATCHES and is_forward:
            axes.text(
                (each.start_seconds + each.stop_seconds) / 2 * scale,
                each.stage,
                str(each.micro_batch),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if each.micro_batch / count < 0.6 else "black",
            )
    axes.set_xlim(0, end * scale or 1)
    axes.set_yticks(range(num_stages), [f"stage {stage}" for stage in range(num_stages)], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit}; coloured: forward passes by micro-batch" + _transfer_legend(intervals))
    axes.spines[["top", "right"]].set_visible(False)


def _transfer_legend(intervals: Sequence[Interval]) -> str:
    return "; grey: sending, receiving and waiting" if any(each.kind != "forward" for each in intervals) else ""


def save_figure(figure: Any, path: str | Path) -> None:
    """Writes a matplotlib figure; the file appears whole or not at all.

    Raises:
        InvalidInputError: If it can't be written, or its ending is no format of pictures.
    """
    target = check_picture(path)
    temporary = target.with_name(f".{target.name}.tmp{target.suffix}")
    try:
        figure.savefig(temporary, dpi=120)
        temporary.replace(target)
    except (OSError, ValueError) as error:
        temporary.unlink(missing_ok=True)
        raise InvalidInputError(f"the picture can't be written to {target}: {error}.") from None


def check_picture(path: str | Path) -> Path:
    """Where a picture can be written.

    Raises:
        InvalidInputError: If the name has another ending than .png, .svg or .pdf, its folder does not exist, or it is
            no regular file.
    """
    target = Path(path)
    if target.suffix not in _ENDINGS:
        raise InvalidInputError(
            f"the picture can't be written to {target}: give a name that ends in {', '.join(_ENDINGS)}."
        )
    check_output(target, "the picture")
    return target
