"""Commands that decide, and need no framework: ``plan``, ``explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lp_plugin.cli import request as ask
from lp_plugin.cli.app import app, console
from lp_plugin.errors import WorkloadError
from lp_plugin.picture import check_picture, plan_picture
from lp_plugin.planfile import load_plan, save_plan
from lp_plugin.planner import make_plan
from lp_plugin.report import plan_report
from lp_plugin.workload import Workload

__all__ = ["explain", "plan"]


@app.command()
def plan(
    model: ask.Model,
    cluster: ask.ClusterSpec,
    batch: ask.Batch,
    sequence: ask.Sequence,
    strategy: Annotated[
        Literal["pipeline", "all"], typer.Option(help="One pipeline over all devices, or compare DP, TP, PP and mixes.")
    ] = "pipeline",
    stages: ask.Stages = None,
    phase: ask.PhaseName = "prefill",
    micro_batch: ask.MicroBatch = None,
    dtype: ask.Dtype = None,
    weights: ask.Weights = None,
    granularity: ask.Granularity = "layer",
    objective: ask.Objectives = "throughput",
    max_latency: ask.MaxLatency = None,
    min_tokens_per_second: ask.MinTokens = None,
    min_sequences: ask.MinSequences = None,
    max_memory: ask.MaxMemory = None,
    tier: ask.Tier = None,
    best_order: Annotated[
        bool, typer.Option("--best-order", help="Put unequal devices in the order that serves best.")
    ] = False,
    tensor_parallel: ask.TensorParallel = 1,
    checkpointing: ask.Checkpointing = False,
    zero_stage: ask.ZeroStage = 0,
    data_parallel: ask.DataParallel = 1,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the plan as JSON.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="With --strategy all: draw the comparison (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Plan a model on a cluster; needs no GPU."""
    profile, devices = ask.described(
        model, cluster, dtype=dtype, weights=weights, granularity=granularity, tensor_parallel=tensor_parallel
    )
    workload = Workload(
        phase=phase,
        batch=batch,
        sequence=sequence,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        zero_stage=zero_stage,
        data_parallel=data_parallel,
    )
    bounds = ask.constraints_of(max_latency, min_tokens_per_second, min_sequences, max_memory, tier)
    if strategy == "all":
        decided = stages is not None or tensor_parallel != 1 or best_order or output is not None
        if decided or objective != "throughput":
            raise WorkloadError(
                "--strategy all tries every number of stages and shards, and decides nothing; leave "
                "out --stages, --tensor-parallel, --best-order, --objective and -o, and plan your choice with them."
            )
        if picture is not None:
            check_picture(picture)
        from lp_plugin.cli.strategies import compare_all  # noqa: PLC0415 - only this option needs it

        compare_all(profile, devices, workload, bounds, picture)
        return
    if picture is not None:
        raise WorkloadError("--picture draws a comparison; add --strategy all, or draw one plan with 'explain'.")
    if best_order:
        if objective != "throughput" or bounds.given:
            raise WorkloadError(
                "--best-order puts devices in the order with the fastest slowest stage; leave out --objective and "
                "constraints, or write the order you want into the cluster file."
            )
        from lp_plugin.order import best_order as ordered  # noqa: PLC0415 - only this option needs it

        devices = ordered(profile, devices if stages is None else devices.subset(stages), workload)
    made = make_plan(profile, devices, workload, stages, objective=objective, constraints=bounds)
    console().print(plan_report(made, devices.subset(made.num_stages)))
    if output is not None:
        save_plan(made, output)
        console().print(f"plan written to {output}")


@app.command()
def explain(
    plan_file: Annotated[Path, typer.Argument(help="A plan made by 'lp-plugin plan -o'.")],
    picture: Annotated[
        Path | None, typer.Option(help="Where the picture goes (.png, .svg, .pdf); beside the plan if left out.")
    ] = None,
) -> None:
    """Show a plan and draw it: memory by kind against capacity, pipeline timeline."""
    loaded = load_plan(plan_file)
    target = picture if picture is not None else plan_file.with_suffix(".png")
    plan_picture(loaded, target)
    console().print(plan_report(loaded))
    console().print(f"picture written to {target}")
