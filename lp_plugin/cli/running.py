"""Commands that start processes or need a framework: ``run``, ``launch``, ``bench``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from lp_plugin.cli.app import app, bench, console
from lp_plugin.errors import MissingDependencyError

__all__ = ["bench_planner", "launch", "run"]


def _require(extra: str, *modules: str) -> None:
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(f"{name} is not installed; install it with: pip install 'lp-plugin[{extra}]'")


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="Model directory: config.json, tokenizer, safetensors.")],
    input: Annotated[Path, typer.Option(help=".jsonl with id and text, or .txt with a document per line.")],  # noqa: A002
    stages: Annotated[int | None, typer.Option(help="Stages; taken from --plan if left out.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan to use; left out, layers are timed and planned.")] = None,
    output: Annotated[Path, typer.Option(help="Where the scores go, one JSON object per document.")] = Path(
        "scores.jsonl"
    ),
    micro_batch: Annotated[
        int | None,
        typer.Option(help="Documents of the longest length per micro-batch (shorter ones share its tokens)."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision instead of the config's.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Devices to plan for, as for 'plan'; left out, the driver is asked.")
    ] = None,
    timeline: Annotated[Path | None, typer.Option(help="Draw what each stage did when (.png, .svg, .pdf).")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Score documents with a pipelined model; interrupted, the same command goes on where it stopped."""
    _require("run", "torch", "deepspeed", "transformers")
    from lp_plugin.score.command import score  # noqa: PLC0415 - imports torch

    score(
        model,
        input_path=input,
        output=output,
        num_stages=stages,
        plan_path=plan,
        micro_batch=micro_batch,
        dtype=dtype,
        cluster=cluster,
        timeline=timeline,
        report=report,
    )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def launch(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="The training or inference script; its arguments follow.")],
) -> None:
    """Run an unchanged DeepSpeed script with the "lp_plugin" section of its --deepspeed_config.

    Under torchrun: torchrun --nproc-per-node 4 --no-python lp-plugin launch train.py --deepspeed_config ds.json
    """
    _require("deepspeed", "deepspeed")
    from lp_plugin.integrations.deepspeed.launch import launch_script  # noqa: PLC0415 - imports torch

    launch_script(script, context.args)


@bench.command("planner")
def bench_planner(
    layers: Annotated[int, typer.Option(help="Layers.")] = 1000,
    stages: Annotated[int, typer.Option(help="Stages.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats of ours.")] = 7,
    model: Annotated[Path | None, typer.Option(help="Also time 'lp-plugin plan' on this model, as a process.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the figures as JSON.")] = None,
) -> None:
    """Time the planner: beside DeepSpeed's partition_balanced on the same costs, large, and with tiers and memory."""
    _require("deepspeed", "deepspeed")
    from lp_plugin.bench.planner import compare_planners  # noqa: PLC0415 - imports DeepSpeed

    compare_planners(console(), layers=layers, stages=stages, repeats=repeats, model=model, output=output)
