"""``lp-plugin run``: prepare the job, get ranks for it, show how it went."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from lp_plugin.job.figures import write_figures
from lp_plugin.job.launch import start_job
from lp_plugin.job.watch.timeout import check_timeout
from lp_plugin.picture import timeline_picture
from lp_plugin.report import console
from lp_plugin.score.job import ScoreJob
from lp_plugin.score.outcome import Outcome

__all__ = ["score"]


def score(
    prepared: Callable[[], ScoreJob], *, output: Path, timeline: Path | None, report: Path | None, timeout: float
) -> None:
    """Scores documents; see `lp_plugin.cli.run`.

    Args:
        prepared: Makes the job; called where it is needed, on one process alone.
        output: Where the results go.
        timeline: Where a picture of what each stage did when goes, if anywhere.
        report: Where the figures go, if anywhere.
        timeout: Seconds after which a rank that does not move ends the job.

    Raises:
        LpPluginError: Any of its kinds; finished documents are kept in ``OUTPUT.partial``.
    """
    check_timeout(timeout, "--timeout")
    outcome = start_job(prepared, functools.partial(_run_rank, timeout_seconds=timeout))
    if outcome is not None:
        _show(outcome, output, timeline, report)


def _run_rank(prepared: Callable[[], ScoreJob] | None, *, timeout_seconds: float) -> Outcome | None:
    from lp_plugin.job.ranks import run_rank  # noqa: PLC0415
    from lp_plugin.score.worker import run  # noqa: PLC0415 - DeepSpeed, only in the ranks

    return run_rank(prepared, run, timeout_seconds=timeout_seconds)


def _show(outcome: Outcome, output: Path, timeline: Path | None, report: Path | None) -> None:
    page = console()
    page.print(outcome.report())
    page.print(f"scores written to {output}")
    if timeline is not None and outcome.plan is not None:
        intervals = [each for rank in outcome.ranks for each in rank.intervals]
        timeline_picture(intervals, len(outcome.ranks), timeline)
        page.print(f"timeline written to {timeline}")
    if report is not None:
        write_figures(report, outcome.as_json())
        page.print(f"figures written to {report}")
