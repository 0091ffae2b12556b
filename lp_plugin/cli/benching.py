"""Benchmarks, each side by side in one run: ``bench FILE.toml``, ``bench planner``, ``bench generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lp_plugin.cli.app import EXPERIMENT, bench, console, require

__all__ = ["bench_experiment", "bench_generate", "bench_planner", "bench_report"]

_Tables = Annotated[
    list[str] | None,
    typer.Option(
        "--table",
        metavar="NAME",
        help="Only this one, and what it needs; may come several times. One of: performance, time-split, "
        "memory-access, footprint, consistency, scaling. Left out: all.",
    ),
]


@bench.command(EXPERIMENT)
def bench_experiment(
    file: Annotated[Path, typer.Argument(help="Cases, each a model, its work and the configurations to compare.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for results and report; bench-NAME if left out.")
    ] = None,
    table: _Tables = None,
) -> None:
    """Run an experiment: configurations in turns in the same processes; tables, pictures, one page of HTML."""
    require("run", "torch", "deepspeed", "transformers")
    from lp_plugin.bench.experiment.checks import checked_experiment  # noqa: PLC0415
    from lp_plugin.bench.experiment.report import chosen_tables  # noqa: PLC0415

    tables = chosen_tables(table or ())
    experiment = checked_experiment(file, tables)
    from lp_plugin.bench.experiment.command import run_experiment  # noqa: PLC0415 - imports torch, which takes seconds

    run_experiment(console(), experiment, folder=output, tables=tables)


@bench.command("report")
def bench_report(
    folder: Annotated[Path, typer.Argument(help="Where an experiment has put its results.json.")],
    table: _Tables = None,
) -> None:
    """Make the report of an experiment again, from its results; nothing is measured."""
    from lp_plugin.bench.experiment.output import report_again  # noqa: PLC0415 - imports matplotlib

    report_again(console(), folder, tables=table or ())


@bench.command("planner")
def bench_planner(
    layers: Annotated[int, typer.Option(help="Layers.")] = 1000,
    stages: Annotated[int, typer.Option(help="Stages.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats of ours.")] = 7,
    model: Annotated[Path | None, typer.Option(help="Also time 'lp-plugin plan' on this model, as a process.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the figures as JSON.")] = None,
) -> None:
    """Time the planner: beside DeepSpeed's partition_balanced on the same costs, large, and with tiers and memory."""
    require("deepspeed", "deepspeed")
    from lp_plugin.bench.planner import compare_planners  # noqa: PLC0415 - imports DeepSpeed

    compare_planners(console(), layers=layers, stages=stages, repeats=repeats, model=model, output=output)


@bench.command("generate")
def bench_generate(
    model: Annotated[Path, typer.Argument(help="Model directory: config.json, safetensors.")],
    stages: Annotated[int, typer.Option(help="Devices of those that use several.")],
    requests: Annotated[int, typer.Option(help="Prompts, all given at once.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt; random ones.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to make for each, whatever they are.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 5,
    baselines: Annotated[
        str,
        typer.Option(
            help="all, or with commas: ours-compiled, native-pp, accelerate, tp, one-gpu, one-gpu-compiled, "
            "ours-one-gpu, ours-one-gpu-compiled, ours-replicas."
        ),
    ] = "all",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the figures as JSON.")] = None,
) -> None:
    """Time generation in turns with transformers and accelerate: same model, prompts and GPUs, greedy, one batch."""
    require("run", "torch", "deepspeed", "transformers")
    from lp_plugin.bench.generate import compare_generation  # noqa: PLC0415 - imports torch

    compare_generation(
        console(),
        model,
        stages=stages,
        requests=requests,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        baselines=baselines,
        output=output,
    )
