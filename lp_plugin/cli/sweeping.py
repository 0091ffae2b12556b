"""``lp-plugin sweep``: what if there were more devices, longer contexts, larger batches, other precisions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lp_plugin.cli import request as ask
from lp_plugin.cli.app import app, console
from lp_plugin.model import ModelProfile
from lp_plugin.model.architecture import DTYPE_BYTES
from lp_plugin.model.quantization import WEIGHT_DTYPES
from lp_plugin.picture import check_picture
from lp_plugin.sweep.grid import Grid, Point, parse_clusters, parse_names, parse_numbers
from lp_plugin.sweep.grid import sweep as planned_points
from lp_plugin.sweep.report import save_csv, sweep_report
from lp_plugin.workload import Workload

__all__ = ["sweep"]

_MANY = 50
"""Points from which on a bar shows how far the sweep is."""


@app.command()
def sweep(
    model: ask.Model,
    cluster: Annotated[str, typer.Option(help="One or more, separated by commas: h100-sxm:4,h100-sxm:8,mine.toml.")],
    batch: Annotated[str, typer.Option(help="One or more numbers of sequences: 256,1024.")],
    sequence: Annotated[str, typer.Option(help="One or more lengths in tokens: 2048,10000.")],
    dtype: Annotated[str | None, typer.Option(help="One or more precisions; the config's if left out.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="One or more of float8, int8, int4; as --dtype if left out.")
    ] = None,
    phase: ask.PhaseName = "prefill",
    micro_batch: ask.MicroBatch = None,
    granularity: ask.Granularity = "layer",
    objective: ask.Objectives = "throughput",
    max_latency: ask.MaxLatency = None,
    min_tokens_per_second: ask.MinTokens = None,
    min_sequences: ask.MinSequences = None,
    max_memory: ask.MaxMemory = None,
    tier: ask.Tier = None,
    csv: Annotated[Path | None, typer.Option(help="Write all figures as CSV.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw tokens/s (.png, .svg, .pdf).")] = None,
) -> None:
    """Plan every combination of devices, batches, lengths and precisions; needs no GPU."""
    grid = Grid(
        clusters=parse_clusters("--cluster", cluster),
        batches=parse_numbers("--batch", batch),
        sequences=parse_numbers("--sequence", sequence),
        dtypes=parse_names("--dtype", dtype, DTYPE_BYTES) if dtype is not None else (None,),
        weight_dtypes=parse_names("--weights", weights, WEIGHT_DTYPES) if weights is not None else (None,),
    )
    if picture is not None:
        check_picture(picture)
    bounds = ask.constraints_of(max_latency, min_tokens_per_second, min_sequences, max_memory, tier)
    workload = Workload(phase=phase, batch=max(grid.batches), sequence=max(grid.sequences), micro_batch=micro_batch)

    def profile_of(precision: str | None, stored: str | None) -> ModelProfile:
        return ModelProfile.from_config(model, dtype=precision, weight_dtype=stored, granularity=granularity)

    columns = (TextColumn("planning"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=grid.num_points < _MANY) as progress:
        task = progress.add_task("", total=grid.num_points)

        def on_point(point: Point) -> None:
            del point
            progress.advance(task)

        points = planned_points(profile_of, grid, workload, objective=objective, constraints=bounds, on_point=on_point)
    console().print(sweep_report(points))
    if csv is not None:
        save_csv(points, csv)
        console().print(f"figures written to {csv}")
    if picture is not None:
        from lp_plugin.sweep.picture import sweep_picture  # noqa: PLC0415 - matplotlib is slow to import

        sweep_picture(points, picture)
        console().print(f"picture written to {picture}")
