"""Commands that measure this machine: ``calibrate``, ``profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lp_plugin.cli import request as ask
from lp_plugin.cli.app import app, console, require

__all__ = ["calibrate", "profile"]


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", help="Cluster file to write, for --cluster.")] = Path(
        "cluster.toml"
    ),
    processes: Annotated[
        int | None, typer.Option(min=1, help="GPUs to use, all if left out; without GPUs processes, else 2.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw rates by size (.png, .svg, .pdf).")] = None,
) -> None:
    """Measure this machine for the planner: arithmetic, memory and caches, launches, links; under two minutes."""
    require("run", "torch", "deepspeed", "transformers")
    _prepare()
    from lp_plugin.bench.calibration import calibrate_host  # noqa: PLC0415 - imports torch

    calibrate_host(console(), output=output, processes=processes, picture=picture)


@app.command()
def profile(
    model: ask.Model,
    sequence: Annotated[int, typer.Option(help="Tokens per sequence; when decoding, of the cache.")],
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences per micro-batch.")] = 1,
    phase: Annotated[Literal["prefill", "decode"], typer.Option(help="What the model does.")] = "prefill",
    dtype: ask.Dtype = None,
    granularity: ask.Granularity = "layer",
    tensor_parallel: ask.TensorParallel = 1,
    cluster: Annotated[
        str | None, typer.Option(help="What to predict for, as for 'plan'; left out, the driver is asked.")
    ] = None,
    stages: Annotated[int | None, typer.Option(min=1, help="Say whether measured costs move the cut.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the times as JSON.")] = None,
) -> None:
    """Time a model's layers on this machine beside what the planner predicts; needs no weights."""
    require("run", "torch", "deepspeed", "transformers")
    _prepare()
    from lp_plugin.bench.layer_profile import profile_model  # noqa: PLC0415 - imports torch

    profile_model(
        console(),
        model,
        sequence=sequence,
        micro_batch=micro_batch,
        phase=phase,
        dtype=dtype,
        granularity=granularity,
        tensor_parallel=tensor_parallel,
        cluster=cluster,
        stages=stages,
        output=output,
    )


def _prepare() -> None:
    """Sets the variables that DeepSpeed reads when it is imported."""
    from lp_plugin.job.launch import prepare_environment  # noqa: PLC0415 - imports torch

    prepare_environment(None)
