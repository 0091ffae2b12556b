"""``lp-plugin generate``: prepare the job, get ranks for it, show how it went."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from lp_plugin.generate.job import GenerateJob
from lp_plugin.generate.outcome import Outcome
from lp_plugin.job.figures import write_figures
from lp_plugin.job.launch import start_job
from lp_plugin.job.watch.timeout import check_timeout
from lp_plugin.report import console

__all__ = ["generate"]


def generate(prepared: Callable[[], GenerateJob], *, output: Path, report: Path | None, timeout: float) -> None:
    """Generates text; see `lp_plugin.cli.generate`.

    Args:
        prepared: Makes the job; called where it is needed, on one process alone.
        output: Where the results go.
        report: Where the figures go, if anywhere.
        timeout: Seconds after which a rank that does not move ends the job.

    Raises:
        LpPluginError: Any of its kinds; finished prompts are kept in ``OUTPUT.partial``.
    """
    check_timeout(timeout, "--timeout")
    outcome = start_job(prepared, functools.partial(_run_rank, timeout_seconds=timeout))
    if outcome is not None:
        _show(outcome, output, report)


def _run_rank(prepared: Callable[[], GenerateJob] | None, *, timeout_seconds: float) -> Outcome | None:
    from lp_plugin.generate.worker import run  # noqa: PLC0415 - DeepSpeed, only in the ranks
    from lp_plugin.job.ranks import run_rank  # noqa: PLC0415

    return run_rank(prepared, run, timeout_seconds=timeout_seconds)


def _show(outcome: Outcome, output: Path, report: Path | None) -> None:
    page = console()
    page.print(outcome.report())
    page.print(f"texts written to {output}")
    if report is not None:
        write_figures(report, outcome.as_json())
        page.print(f"figures written to {report}")
