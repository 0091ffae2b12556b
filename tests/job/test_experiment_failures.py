"""Cases whose processes fail, or are interrupted."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_experiment import TINY

from lp_plugin.bench.experiment.command import _interrupted_by_signals, run_experiment
from lp_plugin.bench.experiment.job import (
    CaseInterrupt,
    CaseJob,
    Doing,
    empty_result,
    in_a_line,
    keep_measured,
    note_reason,
    run_case,
    write_model,
)
from lp_plugin.bench.experiment.results import CaseResult, Row, load_results
from lp_plugin.bench.experiment.settings import read_experiment
from lp_plugin.errors import RankFailedError, RuntimeEnvironmentError, WorkloadError
from lp_plugin.measure.counters import CountedStage
from lp_plugin.measured import Counters
from lp_plugin.report import console

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job(tmp_path: Path) -> CaseJob:
    file = tmp_path / "tiny.toml"
    file.write_text(TINY, encoding="utf-8")
    case = read_experiment(file).cases[0]
    directory = write_model(case, tmp_path / "model")
    return CaseJob(case=case, directory=str(directory), folder="", trials=2, tables=frozenset(), times=())


class Processes:
    """In place of `launch_local`: ends as processes do that meet certain configurations."""

    def __init__(self, ends: dict[str | None, BaseException], reason: str = "") -> None:
        self.ends, self.reason = ends, reason
        self.tried: list[dict[str, str]] = []

    def __call__(self, num_processes: int, entry: Any, job: CaseJob) -> CaseResult:
        os.environ["OMP_NUM_THREADS"] = str(num_processes)
        self.tried.append(dict(job.excluded))
        for name, error in self.ends.items():
            if name not in job.excluded:
                Doing(what=f"running {name}", configuration=name).note(job.folder)
                if self.reason:
                    note_reason(job.folder, RuntimeError(self.reason))
                raise error
        return empty_result(job.case, "")


KILLED = RankFailedError("rank 1 was killed by SIGKILL; the other ranks were stopped.")
ENDED = RankFailedError("rank 0 ended with exit code 1; the other ranks were stopped.")


def tried(job: CaseJob, processes: Processes, monkeypatch: pytest.MonkeyPatch) -> tuple[CaseResult, list[str]]:
    monkeypatch.setattr("lp_plugin.job.launch.launch_local", processes)
    said: list[str] = []
    return run_case(job, lambda job: None, said.append), said


def test_a_configuration_that_ends_its_processes_is_left_out(job: CaseJob, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = os.environ.get("OMP_NUM_THREADS")
    processes = Processes({"tp=2": KILLED, "dp=2": KILLED})
    result, said = tried(job, processes, monkeypatch)
    assert not result.reason
    reason = "rank 1 was killed by SIGKILL while running"
    assert processes.tried == [{}, {"tp=2": f"{reason} tp=2"}, {"tp=2": f"{reason} tp=2", "dp=2": f"{reason} dp=2"}]
    assert "starts again" in said[0]
    assert os.environ.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize(
    ("error", "note", "reason"),
    [
        (KILLED, "", "rank 1 was killed by SIGKILL while running None"),
        (KILLED, "socket closed", "rank 1 was killed by SIGKILL while running None"),
        (ENDED, "bad things", "RuntimeError: bad things while running None"),
        (ENDED, "", "no progress in 600 seconds"),
        (SystemExit(2), "too much", "RuntimeError: too much while running None"),
        (RuntimeEnvironmentError("no port."), "", "no port while running None"),
    ],
)
def test_a_case_that_fails_by_itself(
    job: CaseJob, monkeypatch: pytest.MonkeyPatch, error: BaseException, note: str, reason: str
) -> None:
    result, said = tried(job, Processes({None: error}, note), monkeypatch)
    assert result.reason.startswith(reason)
    assert result.rows == ()
    assert reason in said[0]


class Measuring(Processes):
    """Processes that end after some trials."""

    def __init__(self, trials: int, ends: dict[str | None, BaseException]) -> None:
        super().__init__(ends)
        self.seconds = (1.0,) * trials

    def __call__(self, num_processes: int, entry: Any, job: CaseJob) -> CaseResult:
        row = Row(name="1", data_parallel=1, tensor_parallel=1, pipeline_parallel=1, partition="", seconds=self.seconds)
        keep_measured(job, dataclasses.replace(empty_result(job.case, ""), rows=(row,)))
        return super().__call__(num_processes, entry, job)


@pytest.mark.parametrize(("trials", "blamed"), [(2, "tp=2"), (1, None)])
def test_trials_are_kept_if_no_other_try_is_made(
    job: CaseJob, monkeypatch: pytest.MonkeyPatch, trials: int, blamed: str | None
) -> None:
    processes = Measuring(trials, {blamed: KILLED})
    result, said = tried(job, processes, monkeypatch)
    assert len(processes.tried) == 1
    assert not result.reason
    assert [len(row.seconds) for row in result.rows] == [trials]
    assert result.note.endswith(f"nothing is kept: rank 1 was killed by SIGKILL while running {blamed}")
    assert f"ended after {trials} trials, which are kept" in said[0]


def test_a_case_that_ends_in_its_trials_is_tried_again(job: CaseJob, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Measuring(1, {"tp=2": KILLED})
    result, _ = tried(job, processes, monkeypatch)
    assert len(processes.tried) == 2
    assert not result.note


def test_what_came_before_the_trials_is_kept_when_interrupted_alone(
    job: CaseJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CaseInterrupt) as caught:
        tried(job, Measuring(0, {"tp=2": KeyboardInterrupt()}), monkeypatch)
    assert caught.value.measured.note == "interrupted after 0 of 2 trials"
    assert len(caught.value.measured.rows) == 1
    result, said = tried(job, Measuring(0, {None: KILLED}), monkeypatch)
    assert (result.rows, result.note) == ((), "")
    assert result.reason.startswith("rank 1 was killed")
    assert "failed" in said[0]


def test_an_interrupt_before_any_trial_stays_one(job: CaseJob, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        tried(job, Processes({"tp=2": KeyboardInterrupt()}), monkeypatch)
    assert not isinstance(caught.value, CaseInterrupt)


def test_an_interrupted_experiment_keeps_its_trials(tmp_path: Path, main: Main) -> None:
    lines = TINY.partition('[[case]]\nname = "decode"')[0].splitlines()
    lines[lines.index("trials = 2")] = "trials = 50"
    names = next(line for line in lines if line.startswith("configurations"))
    text = "\n".join(lines).replace(names, 'configurations = ["pp=2", "dp=2"]')
    (tmp_path / "tiny.toml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "lp_plugin", "bench", "tiny.toml", "-o", "out"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        any("turn 3 of 50" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; what is measured is in out/results.json" in errors
    (case,) = load_results(tmp_path / "out" / "results.json").cases
    (rounds,) = {len(row.seconds) for row in case.rows}
    assert 2 <= rounds < 50
    assert case.note == f"interrupted after {rounds} of 50 trials"
    code, out, _ = main("bench", "report", tmp_path / "out")
    assert (code, "interrupted after" in out) == (0, True)


def test_nothing_at_all_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lp_plugin.job.launch.launch_local", Processes({None: KILLED}))
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
    experiment = read_experiment(tmp_path / "tiny.toml")
    with pytest.raises(RuntimeEnvironmentError, match=r"nothing ran; the first reason: rank 1 was killed"):
        run_experiment(console(), experiment, folder=tmp_path / "out", tables=("performance",))
    assert [bool(case.reason) for case in load_results(tmp_path / "out" / "results.json").cases] == [True] * 3
    assert (tmp_path / "out" / "report.html").exists()


def test_the_model_directory_names_no_end(job: CaseJob) -> None:
    config = json.loads((Path(job.directory) / "config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] is None
    assert (config["hidden_size"], config["vocab_size"]) == (64, 264)


class Counting(Processes):
    """Processes whose case wants counters of two configurations."""

    def __call__(self, num_processes: int, entry: Any, job: CaseJob) -> CaseResult:
        rows = tuple(
            Row(
                name=name,
                data_parallel=1,
                tensor_parallel=1,
                pipeline_parallel=stages,
                partition="",
                boundaries=tuple(range(stages + 1)),
                seconds=(1.0, 1.0),
                counters=tuple(Counters(stage=stage) for stage in range(stages)),
            )
            for name, stages in (("1", 1), ("pp=2", 2))
        )
        return dataclasses.replace(empty_result(job.case, ""), rows=rows)


def test_interrupted_counters_keep_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def count(spec: CountedStage, module: str, *, stage: int) -> Counters:
        if stage == 1:  # of the second configuration
            os.kill(os.getpid(), signal.SIGTERM)
        return Counters(stage=stage, dram_read_bytes=5.0)

    monkeypatch.setattr("lp_plugin.job.launch.launch_local", Counting({}))
    monkeypatch.setattr("lp_plugin.bench.experiment.command.count_stage", count)
    (tmp_path / "tiny.toml").write_text(TINY.partition('[[case]]\nname = "decode"')[0], encoding="utf-8")
    experiment = read_experiment(tmp_path / "tiny.toml")
    with pytest.raises(SystemExit) as caught:
        run_experiment(console(), experiment, folder=tmp_path / "out", tables=("performance", "memory-access"))
    assert caught.value.code == 130
    assert "what is measured is in" in capsys.readouterr().err
    (case,) = load_results(tmp_path / "out" / "results.json").cases
    assert case.note == "interrupted before all counters were read"
    assert [[each.dram_read_bytes for each in row.counters] for row in case.rows] == [[5.0], [None, None]]
    assert all(row.seconds for row in case.rows)


def test_signals_that_are_ignored_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by nohup
    try:
        with _interrupted_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # what the first one has begun comes to its end
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_in_a_line() -> None:
    assert in_a_line(WorkloadError("too long; shorten it.\na table")) == "too long; shorten it"
    assert in_a_line(ValueError("first\nsecond")) == "ValueError: first"
    assert in_a_line(ValueError()) == "ValueError"
