"""``lp-plugin run``: prepare the job, get ranks for it, show how it went."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from lp_plugin.files import write_atomically
from lp_plugin.job.launch import join_launcher, launch_local, prepare_environment, run_and_report
from lp_plugin.picture import timeline_picture
from lp_plugin.report import WIDTH
from lp_plugin.score.job import ScoreJob, prepare
from lp_plugin.score.outcome import Outcome

__all__ = ["score"]


def score(
    directory: Path,
    *,
    input_path: Path,
    output: Path,
    num_stages: int | None,
    plan_path: Path | None,
    micro_batch: int | None,
    dtype: str | None,
    cluster: str | None,
    timeline: Path | None,
    report: Path | None,
) -> None:
    """Scores documents; see `lp_plugin.cli.run`.

    Raises:
        LpPluginError: Any of its kinds; finished documents are kept in ``OUTPUT.partial``.
    """

    def prepared() -> ScoreJob:
        return prepare(
            directory,
            input_path=input_path,
            output=output,
            num_stages=num_stages,
            plan_path=plan_path,
            micro_batch=micro_batch,
            dtype=dtype,
            cluster=cluster,
            timeline=timeline,
            report=report,
        )

    joined = join_launcher()
    prepare_environment(int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if joined else num_stages)
    if joined:
        outcome = run_and_report(_joined_rank, prepared)
    else:
        job = prepared()
        try:
            outcome = launch_local(job.num_stages, _local_rank, job)
        except KeyboardInterrupt:  # typer would end without a word
            print("interrupted; finished documents are kept: the same command goes on.", file=sys.stderr)  # noqa: T201
            raise SystemExit(130) from None
    if outcome is not None:
        _show(outcome, output, timeline, report)


def _local_rank(job: ScoreJob) -> Outcome | None:
    from lp_plugin.score.worker import run_rank  # noqa: PLC0415 - DeepSpeed, only in the ranks

    return run_rank(lambda: job)


def _joined_rank(prepared: Callable[[], ScoreJob]) -> Outcome | None:
    from lp_plugin.score.worker import run_rank  # noqa: PLC0415

    return run_rank(prepared if os.environ["RANK"] == "0" else None)


def _show(outcome: Outcome, output: Path, timeline: Path | None, report: Path | None) -> None:
    console = Console() if Console().is_terminal else Console(width=WIDTH)
    console.print(outcome.report())
    console.print(f"scores written to {output}")
    if timeline is not None and outcome.plan is not None:
        intervals = [each for rank in outcome.ranks for each in rank.intervals]
        timeline_picture(intervals, len(outcome.ranks), timeline)
        console.print(f"timeline written to {timeline}")
    if report is not None:
        write_atomically(report, json.dumps(outcome.as_json(), indent=2) + "\n")
        console.print(f"figures written to {report}")
