"""One case as its processes get it, and how the parent sees it through, whatever becomes of them."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lp_plugin.bench.experiment.results import CaseResult, Results, load_results, save_results
from lp_plugin.bench.experiment.settings import Case, Configuration, WantedTimes
from lp_plugin.errors import LpPluginError, RankFailedError
from lp_plugin.files import write_atomically
from lp_plugin.job import launch

__all__ = [
    "STALLED_SECONDS",
    "CaseInterrupt",
    "CaseJob",
    "Doing",
    "LeftOutError",
    "case_fields",
    "empty_result",
    "in_a_line",
    "keep_measured",
    "note_reason",
    "run_case",
    "write_model",
]

STALLED_SECONDS = 600
"""A process that finishes no step in this time is ended."""

_MOST_RESTARTS = 4
"""Of a case; configurations that end their processes one after the other have a common cause."""
_DOING, _REASON, _MEASURED = "doing.json", "reason.txt", "measured.json"


class LeftOutError(Exception):
    """A configuration can't be run here; raised on every rank, the message says why."""


class CaseInterrupt(KeyboardInterrupt):
    """The user, or the machine, wants an end in the middle of a case that has measured something.

    Args:
        measured: What there is.
    """

    def __init__(self, measured: CaseResult) -> None:
        super().__init__()
        self.measured = measured


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseJob:
    """What the processes of a case are told."""

    case: Case
    """What to measure."""
    directory: str
    """Of the model's ``config.json``."""
    folder: str
    """For notes to the parent."""
    trials: int
    """Turns of each configuration."""
    tables: frozenset[str]
    """Wanted; only what they need is measured."""
    times: tuple[WantedTimes, ...]
    """Layers that are timed."""
    calibration: str | None = None
    """Cluster file for predictions."""
    excluded: Mapping[str, str] = field(default_factory=dict)
    """Name of a configuration -> why it is not tried (again)."""
    gpus: int = 0
    """That this host shows; 0 if processes share its CPUs, which any number of them can."""
    start: float = 0.0
    """``time.time()`` when the experiment began."""

    @property
    def ranks(self) -> int:
        """Processes that run: as many as the case asks for, or a single one if there are too few GPUs."""
        return 1 if 0 < self.gpus < self.case.processes else self.case.processes

    def shortage(self, configuration: Configuration) -> str:
        """Why a configuration can't be run by so many processes; empty if it can."""
        needed = configuration.strategy.num_devices
        return f"needs {needed} GPUs; this host shows {self.gpus}" if needed > self.ranks else ""

    @property
    def has_rows(self) -> bool:
        """Whether configurations are built at all."""
        return bool(self.tables & {"performance", "consistency", "time-split", "memory-access"})

    @property
    def has_trials(self) -> bool:
        """Whether they take turns."""
        return bool(self.tables & {"performance", "consistency"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Doing:
    """What the processes of a case were last busy with."""

    what: str = "starting"
    """In words."""
    configuration: str | None = None
    """Whose turn it was."""

    def note(self, folder: str) -> None:
        """Leaves it where the parent finds it."""
        write_atomically(Path(folder) / _DOING, json.dumps(dataclasses.asdict(self)))

    @classmethod
    def noted(cls, folder: str) -> Doing:
        """What was left last."""
        path = Path(folder) / _DOING
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()


def note_reason(folder: str, error: BaseException) -> None:
    """Leaves an error for the parent; of several processes the first one's stays."""
    try:
        with (Path(folder) / _REASON).open("x", encoding="utf-8") as file:
            file.write(in_a_line(error))
    except FileExistsError:
        return


def keep_measured(job: CaseJob, found: CaseResult) -> None:
    """Leaves what is measured so far for the parent, in case the processes don't come to their end."""
    kept = Results(command="", experiment="", title="", trials=job.trials, cases=(found,))
    save_results(kept, Path(job.folder) / _MEASURED)


def _measured(folder: str) -> CaseResult | None:
    """What `keep_measured` has left; None if it did not come to that."""
    path = Path(folder) / _MEASURED
    return load_results(path).cases[0] if path.exists() else None


def _rounds(measured: CaseResult) -> int:
    """Trials of each configuration; rounds are kept whole."""
    return max((len(row.seconds) for row in measured.rows), default=0)


def run_case(job: CaseJob, entry: Callable[[CaseJob], CaseResult | None], say: Callable[[str], None]) -> CaseResult:
    """Runs a case in processes of its own; a configuration that ends them is left out of another try.

    Once the trials are done there is no other try: what they have given is kept, and so it is where no other try could
    help, or none is wanted.

    Args:
        job: What to do.
        entry: A function of a module; runs one rank, and returns the result on rank 0.
        say: Takes lines on the progress.

    Returns:
        The result; with a note if the processes failed after the trials; without rows, and with a reason, if they
        failed before with no configuration to blame.

    Raises:
        CaseInterrupt: If it was interrupted when there was something to keep: its configurations were built.
    """
    while True:
        with tempfile.TemporaryDirectory(prefix="lp-plugin-bench-") as folder:
            tried = dataclasses.replace(job, folder=folder)
            try:
                return _in_processes(tried, entry)
            except (LpPluginError, SystemExit) as error:
                doing = Doing.noted(folder)
                reason = f"{_why(error, folder)} while {doing.what}"
                measured = _measured(folder)
            except KeyboardInterrupt:
                measured = _measured(folder)
                if measured is None:
                    raise
                note = f"interrupted after {_rounds(measured)} of {job.trials} trials"
                raise CaseInterrupt(dataclasses.replace(measured, note=note)) from None
        blamed = doing.configuration
        no_other_try = blamed is None or blamed in job.excluded or len(job.excluded) == _MOST_RESTARTS
        rounds = 0 if measured is None else _rounds(measured)
        if measured is not None and (rounds == job.trials or (rounds and no_other_try)):
            say(f"case {job.case.name} ended after {rounds} trials, which are kept: {reason}")
            note = f"ended after {rounds} trials, of what comes later nothing is kept: {reason}"
            return dataclasses.replace(measured, note=note)
        if blamed is None or no_other_try:
            say(f"case {job.case.name} failed: {reason}")
            return empty_result(job.case, reason)
        say(f"{blamed} is left out, and the case starts again: {reason}")
        job = dataclasses.replace(job, excluded={**job.excluded, blamed: reason})


def _in_processes(job: CaseJob, entry: Callable[[CaseJob], CaseResult | None]) -> CaseResult:
    before = dict(os.environ)  # the launcher settles threads for this number of processes
    try:
        result: CaseResult = launch.launch_local(job.ranks, entry, job)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return result


def _why(error: BaseException, folder: str) -> str:
    """The first process's error, in a line."""
    path = Path(folder) / _REASON
    if isinstance(error, RankFailedError) and "was killed" in str(error):
        return str(error).partition(";")[0]
    if path.exists():
        return path.read_text(encoding="utf-8")
    if isinstance(error, RankFailedError):
        return f"no progress in {STALLED_SECONDS} seconds, or a process ended without a word,"
    return in_a_line(error)


def in_a_line(error: BaseException) -> str:
    """A reason for a table: the first line of a message that we wrote; of others with the kind of error."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, LpPluginError | LeftOutError):
        return first.rstrip(".")
    return f"{type(error).__name__}: {first}".rstrip(": .")[:400]


def empty_result(case: Case, reason: str) -> CaseResult:
    """A case that did not run, and why."""
    return CaseResult(**case_fields(case), reason=reason)


def case_fields(case: Case) -> dict[str, Any]:
    """What a result repeats of its case."""
    return {
        "name": case.name,
        "model": dict(case.config),
        "dtype": case.dtype,
        "phase": case.phase,
        "processes": case.processes,
        "batch": case.batch,
        "micro_batch": case.micro_batch,
        "sequence": case.sequence,
        "new_tokens": case.new_tokens,
        "tokens": case.tokens,
        "baseline": case.baseline,
    }


def write_model(case: Case, folder: Path) -> Path:
    """A model directory with nothing but the configuration, in which no token ends a sequence."""
    folder.mkdir()
    config = dict(case.config) | {"eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
