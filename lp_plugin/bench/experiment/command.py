"""An experiment from file to report: every case in processes of its own, what fails is said and the rest goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from lp_plugin.bench.experiment.derived import why_nothing_ran
from lp_plugin.bench.experiment.job import CaseInterrupt, CaseJob, empty_result, run_case, write_model
from lp_plugin.bench.experiment.output import RESULTS, keep, made_folder, report
from lp_plugin.bench.experiment.results import CaseResult, Results
from lp_plugin.bench.experiment.scale_out import needed_times, simulate_scale_out
from lp_plugin.bench.experiment.settings import Case, Experiment
from lp_plugin.errors import RuntimeEnvironmentError
from lp_plugin.job.launch import join_launcher, prepare_environment
from lp_plugin.measure.counters import CountedStage, count_stage

__all__ = ["run_experiment"]

_FROM_RUN = ("counted_bytes", "predicted_hit_fraction", "nvlink_bytes", "nvlink_reason", "counted_link_bytes")
"""Fields of counters that the case's own processes have filled in."""
_COUNTED = "lp_plugin.bench.experiment.counted_stage"
_COUNTING = "interrupted before all counters were read"
_ENDING = (signal.SIGTERM, signal.SIGHUP)
"""What a session or a scheduler sends; an interrupt from the keyboard is one already."""


def run_experiment(console: Console, experiment: Experiment, *, folder: Path | None, tables: Sequence[str]) -> None:
    """Measures what an experiment asks for and writes the report.

    Args:
        console: For progress lines and tables.
        experiment: As `checked_experiment` gives it.
        folder: Where results and report go; ``bench-NAME`` if left out.
        tables: Only these, and only what they need is measured; as `chosen_tables` gives them.

    Raises:
        InvalidInputError: If the folder can't be written, before anything runs or later.
        RuntimeEnvironmentError: If a launcher has started this; or if nothing at all ran, once that is written down.
    """
    if join_launcher():
        raise RuntimeEnvironmentError("the benchmark starts its own processes; run it without torchrun or srun.")
    folder = made_folder(folder or Path(f"bench-{experiment.name}"))
    if (folder / RESULTS).exists():
        console.print(f"{folder}: files of an earlier run are replaced", highlight=False, markup=False)
    results = Results(
        command=shlex.join(["lp-plugin", *sys.argv[1:]]),
        experiment=experiment.name,
        title=experiment.title,
        trials=experiment.trials,
        cases=(),
    )
    prepare_environment(None)
    results = _measured(console, experiment, results, folder, frozenset(tables))
    if "scaling" in tables:
        results = dataclasses.replace(results, simulated=simulate_scale_out(experiment, results.cases))
        keep(results, folder)
    report(console, results, folder, tables)
    reasons = [why_nothing_ran(case) for case in results.cases]
    if all(reasons):
        raise RuntimeEnvironmentError(f"nothing ran; the first reason: {reasons[0]}.")


def _measured(
    console: Console, experiment: Experiment, results: Results, folder: Path, tables: frozenset[str]
) -> Results:
    """The results with every case; kept in the folder as they come, and when a signal ends the command."""
    start = time.time()
    with _interrupted_by_signals() as ignore_further:
        try:
            for number, case in enumerate(experiment.cases):
                for found in _run(console, experiment, case, tables, start):
                    results = dataclasses.replace(results, cases=(*results.cases[:number], found))
                    keep(results, folder)
        except KeyboardInterrupt as interrupt:  # typer would end without a word
            ignore_further()
            if isinstance(interrupt, CaseInterrupt):
                results = dataclasses.replace(results, cases=(*results.cases, interrupt.measured))
                keep(results, folder)
            kept = f"what is measured is in {folder / RESULTS}, lp-plugin bench report {folder} makes the report"
            print(f"interrupted; {kept if results.cases else 'nothing is measured yet'}", file=sys.stderr)  # noqa: T201
            raise SystemExit(130) from None
    return results


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[Callable[[], None]]:
    """Inside, the first signal that asks this process to end interrupts it, so that what it has started ends, too.

    Further ones are ignored: a session that ends sends several, and there is something to keep. What was ignored
    before, as by nohup, stays so. Yields what ignores them all from then on.
    """
    heeded = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]

    def ignore() -> None:
        for number in heeded:
            signal.signal(number, signal.SIG_IGN)

    def interrupt(number: int, frame: FrameType | None) -> None:
        ignore()
        raise KeyboardInterrupt

    for number in heeded:
        signal.signal(number, interrupt)
    try:
        yield ignore
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)


def _run(
    console: Console, experiment: Experiment, case: Case, tables: frozenset[str], start: float
) -> Iterator[CaseResult]:
    """One case; yields its result each time that there is more of it."""

    def say(text: str) -> None:
        console.print(f"{time.time() - start:6.1f} s  {text}", highlight=False, markup=False)

    reason = _unable(case)
    if reason:
        say(f"case {case.name} is left out: {reason}")
        yield empty_result(case, reason)
        return
    asked = experiment if "scaling" in tables else dataclasses.replace(experiment, scale_out=())
    with tempfile.TemporaryDirectory(prefix="lp-plugin-bench-") as name:
        job = CaseJob(
            case=case,
            directory=str(write_model(case, Path(name) / "model")),
            folder=name,
            trials=experiment.trials,
            tables=tables,
            times=tuple(needed_times(asked, case)),
            calibration=None if experiment.calibration is None else str(experiment.calibration.resolve()),
            start=start,
            gpus=torch.cuda.device_count(),
        )
        say(f"case {case.name}: {case.processes} processes, {len(case.configurations)} configurations")
        if job.ranks < case.processes:
            say(f"{job.gpus} of {case.processes} GPUs are here: what needs more than one is not run")
        found = run_case(job, _run_rank, say)
    if "memory-access" in tables:
        yield from _with_counters(case, found, say)
    else:
        yield found


def _run_rank(job: CaseJob) -> CaseResult | None:
    from lp_plugin.bench.experiment.worker import run_case_rank  # noqa: PLC0415 - DeepSpeed, only in the ranks

    return run_case_rank(job)


def _with_counters(case: Case, found: CaseResult, say: Callable[[str], None]) -> Iterator[CaseResult]:
    """Hardware counters of the stages that the case wants them of, one process after the other.

    Yields the result with as many as are read; before the last ones it says that some are missing.

    CUDA graphs are counted as the eager passes that they hold, and so is DeepSpeed's ``eval_batch``.
    """
    decodes = case.phase == "decode"
    rows = list(found.rows)
    for place, row in enumerate(found.rows):
        counters = []
        if row.counters:
            yield dataclasses.replace(found, rows=tuple(rows), note=found.note or _COUNTING)
        for there, (start, stop) in zip(row.counters, pairwise(row.boundaries), strict=False):
            say(f"case {case.name}: reading counters of {row.name}, stage {there.stage}")
            spec = CountedStage(
                config=case.config,
                dtype=case.dtype,
                start=start,
                stop=stop,
                tensor_parallel=row.tensor_parallel,
                rows=row.micro_batch,
                tokens=1 if decodes else case.sequence,
                cache_length=case.sequence + case.new_tokens if decodes else 0,
                execution="compiled" if row.execution == "compiled" else "eager",
            )
            read = count_stage(spec, _COUNTED, stage=there.stage)
            kept = {name: getattr(there, name) for name in _FROM_RUN}
            counters.append(dataclasses.replace(read, **kept))
        rows[place] = dataclasses.replace(row, counters=tuple(counters))
    yield dataclasses.replace(found, rows=tuple(rows))


def _unable(case: Case) -> str:
    """Why a case can't run here; empty if it can."""
    if not torch.cuda.is_available() and case.dtype == "float16":
        return "float16 needs a GPU: CPUs compute it too slowly to use"
    return ""
