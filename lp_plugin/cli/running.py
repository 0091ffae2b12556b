"""Commands that start processes or need a framework: ``run``, ``generate``, ``launch``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from lp_plugin.cli.app import app, require
from lp_plugin.job.watch.timeout import DEFAULT_TIMEOUT_SECONDS

__all__ = ["generate", "launch", "run"]

_TIMEOUT = "Seconds after which a rank that hangs ends the job; one that dies does at once."


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="Model directory: config.json, tokenizer, safetensors.")],
    input: Annotated[Path, typer.Option(help=".jsonl with id and text, or .txt with a document per line.")],  # noqa: A002
    stages: Annotated[int | None, typer.Option(help="Stages; taken from --plan if left out.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan to use; left out, layers are timed and planned.")] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="Processes that share each stage's layers; taken from --plan if left out.")
    ] = None,
    data_parallel: Annotated[int, typer.Option(help="Replicas of the whole pipeline, which share the documents.")] = 1,
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
    timeout: Annotated[float, typer.Option(help=_TIMEOUT)] = DEFAULT_TIMEOUT_SECONDS,
    check_finite: Annotated[
        bool, typer.Option("--check-finite", help="Name the first stage and micro-batch whose output is not finite.")
    ] = False,
) -> None:
    """Score documents with a pipelined model; interrupted, the same command goes on where it stopped."""
    require("run", "torch", "deepspeed", "transformers")
    from lp_plugin.score.command import score  # noqa: PLC0415 - imports torch
    from lp_plugin.score.job import prepare  # noqa: PLC0415

    prepared = functools.partial(
        prepare,
        model,
        input_path=input,
        output=output,
        num_stages=stages,
        tensor_parallel=tensor_parallel,
        data_parallel=data_parallel,
        plan_path=plan,
        micro_batch=micro_batch,
        dtype=dtype,
        cluster=cluster,
        timeline=timeline,
        report=report,
        check_finite=check_finite,
    )
    score(prepared, output=output, timeline=timeline, report=report, timeout=timeout)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Model directory: config.json, tokenizer, safetensors.")],
    prompts: Annotated[Path, typer.Option(help=".jsonl with id and text, or .txt with a prompt per line.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most new tokens for each prompt.")],
    stages: Annotated[int | None, typer.Option(help="Stages; taken from --plan if left out.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan with --phase decode to use; left out, one is made for these devices.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the texts go, one JSON object per prompt.")] = Path(
        "generated.jsonl"
    ),
    micro_batch: Annotated[int | None, typer.Option(help="Prompts that go round together; chosen if left out.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision instead of the config's.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Devices to plan for, as for 'plan'; left out, the driver is asked.")
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="Processes that share each stage's layers; taken from --plan if left out.")
    ] = None,
    data_parallel: Annotated[int, typer.Option(help="Replicas of the whole pipeline, which share the prompts.")] = 1,
    sample: Annotated[
        bool | None,
        typer.Option("--sample/--greedy", help="Draw tokens, or take the likeliest; else as the model's files say."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits; implies --sample.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many tokens, 0 for all; implies --sample.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest with this probability together; implies --sample.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws; tokens don't depend on the number of processes.")] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Fuse decode kernels with torch.compile; GPUs only, some 20 s once.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print texts as they come.")] = False,
    timeout: Annotated[float, typer.Option(help=_TIMEOUT)] = DEFAULT_TIMEOUT_SECONDS,
) -> None:
    """Continue prompts with a pipelined model; interrupted, the same command goes on where it stopped."""
    require("run", "torch", "deepspeed", "transformers")
    from lp_plugin.generate.command import generate as start  # noqa: PLC0415 - imports torch
    from lp_plugin.generate.job import prepare  # noqa: PLC0415

    prepared = functools.partial(
        prepare,
        model,
        prompts_path=prompts,
        output=output,
        max_new_tokens=max_new_tokens,
        num_stages=stages,
        plan_path=plan,
        micro_batch=micro_batch,
        dtype=dtype,
        cluster=cluster,
        tensor_parallel=tensor_parallel,
        data_parallel=data_parallel,
        sample=sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        compiled=compiled,
        report=report,
        stream=stream,
    )
    start(prepared, output=output, report=report, timeout=timeout)


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
    require("deepspeed", "deepspeed")
    from lp_plugin.integrations.deepspeed.launch import launch_script  # noqa: PLC0415 - imports torch

    launch_script(script, context.args)
