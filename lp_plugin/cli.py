"""The command line: ``lp-plugin plan | explain | run | launch | bench``.

Every deliberate error ends with one message and exit code 2.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from lp_plugin._version import __version__
from lp_plugin.errors import LpPluginError, MissingDependencyError
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.planfile import load_plan, save_plan
from lp_plugin.planner import make_plan
from lp_plugin.report import WIDTH, plan_report
from lp_plugin.workload import Workload

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Decides which layers of a transformer go on which device, and runs the result.",
)
bench = typer.Typer(no_args_is_help=True, help="Benchmarks, each side by side in one run.")
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the ``lp-plugin`` command."""
    try:
        app()
    except LpPluginError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lp_plugin {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


def _require(extra: str, *modules: str) -> None:
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(f"{name} is not installed; install it with: pip install 'lp-plugin[{extra}]'")


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Model directory or its config.json; no weights needed.")],
    cluster: Annotated[str, typer.Option(help="Like h100-sxm:16, or a cluster file (.toml).")],
    batch: Annotated[int, typer.Option(help="Sequences in the whole batch.")],
    sequence: Annotated[int, typer.Option(help="Tokens per sequence; when decoding, of its context.")],
    stages: Annotated[int | None, typer.Option(help="Stages; all devices if left out.")] = None,
    phase: Annotated[Literal["prefill", "decode", "train"], typer.Option(help="What the model does.")] = "prefill",
    micro_batch: Annotated[int | None, typer.Option(help="Sequences per micro-batch; chosen if left out.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision instead of the config's.")] = None,
    objective: Annotated[
        Literal["throughput", "memory"], typer.Option(help="Fastest bottleneck, or emptiest fullest device.")
    ] = "throughput",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the plan as JSON.")] = None,
) -> None:
    """Plan a model on a cluster; needs no GPU."""
    profile = ModelProfile.from_config(model, dtype=dtype)
    workload = Workload(phase=phase, batch=batch, sequence=sequence, micro_batch=micro_batch)
    made = make_plan(profile, Cluster.parse(cluster), workload, stages, objective=objective)
    _console().print(plan_report(made))
    if output is not None:
        save_plan(made, output)
        _console().print(f"plan written to {output}")


@app.command()
def explain(
    plan_file: Annotated[Path, typer.Argument(help="A plan made by 'lp-plugin plan -o'.")],
    picture: Annotated[
        Path | None, typer.Option(help="Where the picture goes (.png, .svg, .pdf); beside the plan if left out.")
    ] = None,
) -> None:
    """Show a plan and draw it: memory by kind against capacity, pipeline timeline."""
    from lp_plugin.picture import plan_picture  # noqa: PLC0415 - matplotlib is slow to import

    loaded = load_plan(plan_file)
    target = picture if picture is not None else plan_file.with_suffix(".png")
    plan_picture(loaded, target)
    _console().print(plan_report(loaded))
    _console().print(f"picture written to {target}")


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
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the figures as JSON.")] = None,
) -> None:
    """Time our exact partition beside DeepSpeed's partition_balanced, on the same costs."""
    _require("deepspeed", "deepspeed")
    from lp_plugin.bench.planner import compare_planners  # noqa: PLC0415 - imports DeepSpeed

    compare_planners(_console(), layers=layers, stages=stages, repeats=repeats, output=output)
