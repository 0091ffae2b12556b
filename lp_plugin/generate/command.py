"""``lp-plugin generate``: prepare the job, get ranks for it, show how it went."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lp_plugin.generate.job import GenerateJob, prepare
from lp_plugin.generate.outcome import Outcome
from lp_plugin.job.figures import write_figures
from lp_plugin.job.launch import start_job
from lp_plugin.report import console

__all__ = ["generate"]


def generate(
    directory: Path,
    *,
    prompts_path: Path,
    output: Path,
    max_new_tokens: int,
    num_stages: int | None,
    plan_path: Path | None,
    micro_batch: int | None,
    dtype: str | None,
    cluster: str | None,
    tensor_parallel: int | None,
    data_parallel: int,
    sample: bool | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    compiled: bool,
    report: Path | None,
    stream: bool,
) -> None:
    """Generates text; see `lp_plugin.cli.generate`.

    Raises:
        LpPluginError: Any of its kinds; finished prompts are kept in ``OUTPUT.partial``.
    """

    def prepared() -> GenerateJob:
        return prepare(
            directory,
            prompts_path=prompts_path,
            output=output,
            max_new_tokens=max_new_tokens,
            num_stages=num_stages,
            plan_path=plan_path,
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

    outcome = start_job(prepared, _run_rank)
    if outcome is not None:
        _show(outcome, output, report)


def _run_rank(prepared: Callable[[], GenerateJob] | None) -> Outcome | None:
    from lp_plugin.generate.worker import run  # noqa: PLC0415 - DeepSpeed, only in the ranks
    from lp_plugin.job.ranks import run_rank  # noqa: PLC0415

    return run_rank(prepared, run)


def _show(outcome: Outcome, output: Path, report: Path | None) -> None:
    page = console()
    page.print(outcome.report())
    page.print(f"texts written to {output}")
    if report is not None:
        write_figures(report, outcome.as_json())
        page.print(f"figures written to {report}")
