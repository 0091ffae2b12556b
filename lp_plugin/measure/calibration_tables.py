"""A calibration as tables and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lp_plugin.hardware import Cluster
from lp_plugin.measure.bandwidth import CopyRate
from lp_plugin.measure.calibration import Calibration
from lp_plugin.measure.turns import UNSTEADY, WHY_UNSTEADY, format_difference
from lp_plugin.measured import Links
from lp_plugin.picture import save_figure
from lp_plugin.quantity import format_bytes, format_seconds

__all__ = ["calibration_picture", "calibration_report"]


def calibration_report(calibration: Calibration, cluster: Cluster) -> Group:
    """Everything that was measured, and what the planner takes of it.

    Args:
        calibration: The figures.
        cluster: Made of them.
    """
    title = f"{calibration.count} x {calibration.hardware}, torch {calibration.torch_version}"
    tables = [_matmul_table(calibration), _copy_table(calibration.copies)]
    if calibration.links.ranks > 1:
        tables.append(_link_table(calibration.links))
    return Group(Text(title, style="bold"), *tables, *(Text(line) for line in _summary(calibration, cluster)))


def calibration_picture(calibration: Calibration, path: str | Path) -> None:
    """Matrix products by size, bandwidth by working set, messages by size.

    Args:
        calibration: To draw.
        path: ``.png``, ``.svg`` or ``.pdf``; replaced as a whole.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - a quarter of a second that only pictures need

    linked = calibration.links.ranks > 1
    figure = Figure(figsize=(13.0 if linked else 9.0, 3.8), layout="constrained")
    axes = figure.subplots(1, 3 if linked else 2)
    scale, unit = _flops_unit(calibration)
    for dtype in dict.fromkeys(rate.dtype for rate in calibration.matmul):
        rates = [rate for rate in calibration.matmul if rate.dtype == dtype]
        axes[0].plot(
            [rate.size for rate in rates], [rate.flops_per_second / scale for rate in rates], marker="o", label=dtype
        )
    _label(axes[0], "matrix products", "rows and columns", unit)
    axes[0].legend(fontsize=8)
    sizes = [rate.working_set_bytes for rate in calibration.copies]
    axes[1].plot(sizes, [rate.bytes_per_second / 1e9 for rate in calibration.copies], marker="o", color="#228833")
    for cache in calibration.caches:
        axes[1].axvline(cache.capacity_bytes, color="#bbbbbb", linewidth=1)
        axes[1].annotate(
            f" {cache.name}", (cache.capacity_bytes, 1), xycoords=("data", "axes fraction"), va="top", color="#666666"
        )
    _label(axes[1], "bandwidth", "working set, bytes", "GB/s, read and written")
    if linked:
        links = calibration.links
        for what, num_bytes, seconds in (
            ("from one to the next", links.send_bytes, links.send_seconds),
            (f"all-reduce over {links.ranks}", links.reduce_bytes, links.reduce_seconds),
        ):
            axes[2].plot(
                num_bytes, [size / each / 1e9 for size, each in zip(num_bytes, seconds, strict=True)], "o-", label=what
            )
        _label(axes[2], "messages", "bytes", "GB/s")
        axes[2].legend(fontsize=8)
    figure.suptitle(f"{calibration.count} x {calibration.hardware}", fontsize=11)
    save_figure(figure, path)


def _label(axes: Any, title: str, horizontal: str, vertical: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(horizontal)
    axes.set_ylabel(vertical)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def _matmul_table(calibration: Calibration) -> Table:
    rates = {(rate.size, rate.dtype): rate.flops_per_second for rate in calibration.matmul}
    dtypes = list(dict.fromkeys(rate.dtype for rate in calibration.matmul))
    scale, unit = _flops_unit(calibration)
    table = _table(f"matrix products, {unit}", *dtypes)
    for size in sorted({size for size, _ in rates}):
        cells = [f"{rates[size, dtype] / scale:.3g}" if (size, dtype) in rates else "too slow" for dtype in dtypes]
        table.add_row(f"{size} x {size}", *cells)
    return table


def _copy_table(copies: Sequence[CopyRate]) -> Table:
    table = _table("working set", "read and written")
    for rate in copies:
        table.add_row(format_bytes(rate.working_set_bytes), f"{format_bytes(rate.bytes_per_second)}/s")
    return table


def _link_table(links: Links) -> Table:
    table = _table("message", "to the next", "rate", f"all-reduce over {links.ranks}", "rate")
    for size, sent, reduced in zip(links.send_bytes, links.send_seconds, links.reduce_seconds, strict=True):
        table.add_row(
            format_bytes(size),
            format_seconds(sent),
            f"{format_bytes(size / sent)}/s",
            format_seconds(reduced),
            f"{format_bytes(size / reduced)}/s",
        )
    return table


def _summary(calibration: Calibration, cluster: Cluster) -> list[str]:
    device, layer, launches = cluster.devices[0], calibration.layer, calibration.launches
    scale, unit = _flops_unit(calibration)
    lines = [
        f"{layer.shape}: {layer.flops / layer.seconds / scale:.3g} {unit}, "
        f"{device.compute_efficiency:.0%} of the peak of {dict(device.peak_flops)[layer.dtype] / scale:.4g}",
    ]
    lines += [
        f"{tier.name}: {format_bytes(tier.usable_bytes)} of {format_bytes(tier.capacity_bytes)} usable "
        f"at {format_bytes(tier.achieved_bytes_per_second)}/s"
        for tier in device.tiers
    ]
    replayed, layer_replayed = launches.replayed, calibration.replayed_layer_seconds
    lines.append(
        f"launches: {format_seconds(launches.eager)} a kernel, "
        f"{format_difference(calibration.eager_layer_seconds)} a tiny layer"
        + (f"; in a CUDA graph {format_seconds(replayed)} a kernel" if replayed is not None else "")
        + (f", {format_difference(layer_replayed)} a layer" if layer_replayed is not None else "")
    )
    if cluster.links:
        link = cluster.links[0]
        achieved = link.bandwidth_bytes_per_second * link.bandwidth_efficiency
        lines.append(
            f"link: {format_seconds(link.latency_seconds)} and {format_bytes(achieved)}/s; "
            f"all-reduces reach {link.collective_efficiency:.0%} of that"
        )
    return [*lines, *_unsteady(calibration.spreads)]


def _unsteady(spreads: Mapping[str, float]) -> list[str]:
    """A warning, if repeats differ too much to be believed."""
    found = [name for name, spread in spreads.items() if spread > UNSTEADY]
    if not found:
        return []
    worst = max(found, key=spreads.__getitem__)
    return [
        f"warning: repeats differ by more than {UNSTEADY:.0%} for {len(found)} of {len(spreads)} figures, most for "
        f"{worst}: {spreads[worst]:.0%}. {WHY_UNSTEADY}"
    ]


def _flops_unit(calibration: Calibration) -> tuple[float, str]:
    """What rates of products are divided by, and what they are then in."""
    best = max(rate.flops_per_second for rate in calibration.matmul)
    return (1e12, "TFLOP/s") if best >= 1e12 else (1e9, "GFLOP/s")


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in (first, *others):
        table.add_column(heading, justify="right", no_wrap=True)
    return table
