"""Joining a launcher's processes, and what a failed rank means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lp_plugin.errors import RankFailedError, RuntimeEnvironmentError
from lp_plugin.job import launch

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("PROCID", "LOCALID", "NTASKS", "STEP_NUM_TASKS", "STEP_TASKS_PER_NODE", "JOB_NODELIST", "JOB_NUM_NODES")
FRAMEWORKS = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "TRANSFORMERS_VERBOSITY")
FRAMEWORKS += ("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING",)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables is set, and all are as before afterwards."""
    for name in (*TORCHRUN, *FRAMEWORKS, *(f"SLURM_{name}" for name in SLURM)):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def set_slurm(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def joined() -> dict[str, str | None]:
    assert launch.join_launcher()
    return {name: os.environ.get(name) for name in TORCHRUN}


def test_no_launcher() -> None:
    assert not launch.join_launcher()
    assert not set(TORCHRUN) & os.environ.keys()


def test_torchrun_and_deepspeed_are_joined_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    values = dict(zip(TORCHRUN, ("1", "2", "1", "2", "node7", "1234"), strict=True))
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    set_slurm(monkeypatch, PROCID="0", LOCALID="0", STEP_NUM_TASKS="8")  # torchrun under srun: torchrun's count
    assert joined() == values


def test_slurm_tasks_of_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    set_slurm(monkeypatch, PROCID="1", LOCALID="1", STEP_NUM_TASKS="4", JOB_NODELIST="node3", JOB_NUM_NODES="1")
    assert joined() == {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


def test_slurm_tasks_of_several_hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames node[3-4]" ] && printf "node3\\nnode4\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    set_slurm(monkeypatch, PROCID="5", LOCALID="1", STEP_NUM_TASKS="8", STEP_TASKS_PER_NODE="4(x2)")
    set_slurm(monkeypatch, JOB_NODELIST="node[3-4]", JOB_NUM_NODES="2")
    monkeypatch.setenv("MASTER_PORT", "1234")
    found = joined()
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("node3", "1234")
    assert (found["RANK"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("5", "1", "4")


def test_slurm_hosts_that_cannot_be_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    set_slurm(monkeypatch, PROCID="5", LOCALID="1", STEP_NUM_TASKS="8")
    set_slurm(monkeypatch, JOB_NODELIST="node[3-4]", JOB_NUM_NODES="2")
    with pytest.raises(RuntimeEnvironmentError, match=r"node\[3-4\].*set MASTER_ADDR"):
        launch.join_launcher()
    monkeypatch.setenv("MASTER_ADDR", "node3")
    assert joined()["MASTER_ADDR"] == "node3"


@pytest.mark.parametrize(
    "values",
    [
        {"PROCID": "0", "LOCALID": "0", "STEP_NUM_TASKS": "1"},  # srun of one task
        {"PROCID": "0", "LOCALID": "0", "NTASKS": "4"},  # a batch script, which runs once, not four times
        {"NTASKS": "4"},  # a shell inside an allocation
    ],
)
def test_a_single_slurm_process_starts_its_own(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    set_slurm(monkeypatch, **values)
    assert not launch.join_launcher()


def test_environment_shares_the_cores_and_keeps_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    launch.prepare_environment(None)
    assert "OMP_NUM_THREADS" not in os.environ  # the plan will tell how many processes share them
    launch.prepare_environment(5)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    launch.prepare_environment(3)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert all(name in os.environ for name in FRAMEWORKS)


@pytest.mark.parametrize("processes", [-1, 0, 13])
def test_every_process_has_a_core(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    launch.prepare_environment(processes)
    assert int(os.environ["OMP_NUM_THREADS"]) >= 1


# --- failures ----------------------------------------------------------------------------------------------------


def failed(**exit_codes: int) -> SimpleNamespace:
    """torch's ChildFailedError: rank -> exit code, in the order in which they ended."""
    failures = {
        int(name.removeprefix("rank")): SimpleNamespace(exitcode=code, timestamp=at, signal_name=lambda: "SIGKILL")
        for at, (name, code) in enumerate(exit_codes.items())
    }
    return SimpleNamespace(failures=failures)


@pytest.mark.parametrize(
    ("exit_codes", "message"),
    [
        ({"rank0": 75, "rank2": -9, "rank1": 75}, "rank 2 was killed by SIGKILL"),
        ({"rank1": 75, "rank0": 1}, "rank 0 ended with exit code 1"),
        ({"rank1": -9, "rank0": 1}, "rank 1 was killed by SIGKILL"),
        ({"rank1": 1, "rank0": -9}, "rank 0 was killed by SIGKILL"),
    ],
)
def test_the_rank_that_died_of_itself_is_named(exit_codes: dict[str, int], message: str) -> None:
    error = launch._explained(failed(**exit_codes))
    assert isinstance(error, RankFailedError)
    assert str(error).startswith(message)
    assert "goes on where this one stopped" in str(error)


def test_a_deliberate_error_has_been_printed_already() -> None:
    error = launch._explained(failed(rank1=75, rank0=2))
    assert isinstance(error, SystemExit)
    assert error.code == 2


def test_an_interrupt_stays_one() -> None:
    assert isinstance(launch._explained(failed(rank0=130, rank1=75)), KeyboardInterrupt)


@pytest.fixture
def one_rank() -> str:
    """A script's beginning; what `run_and_report` does ends a process."""
    return "import os; os.environ['RANK'] = '3'\nfrom lp_plugin.job.launch import *\nfrom lp_plugin.errors import *\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("WeightsError('no such file')", 2, "error (rank 3): no such file\n"),
        (
            "RuntimeError('TCP client: timed out')",
            2,
            "error (rank 3): can't reach the other ranks: TCP client: timed out\n",
        ),
        ("KeyboardInterrupt()", 130, ""),
        ("ValueError('our own mistake')", 1, "ValueError: our own mistake\n"),
    ],
)
def test_how_a_rank_ends(one_rank: str, error: str, code: int, said: str) -> None:
    script = f"{one_rank}def entry(): raise {error}\nrun_and_report(entry)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == code
    assert ended.stderr.endswith(said)
    assert ("Traceback" in ended.stderr) == (code == 1)
    assert bool(ended.stderr) == bool(said)


def test_a_rank_that_lost_its_connection_says_so(one_rank: str) -> None:
    """Where no watch names the other one."""
    script = f"""{one_rank}
import torch
def entry():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    raise RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer")
run_and_report(entry)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 75
    assert ended.stderr.startswith("error (rank 3): lost the connection to another rank: [../gloo")
    assert len(ended.stderr.splitlines()) == 1


ORPHAN = """
import multiprocessing, os, pathlib, sys, time
from lp_plugin.job.launch import _handed_over, run_child

def wait(mark):
    mark.touch()
    time.sleep(1000)

if __name__ == "__main__":
    mark = pathlib.Path(sys.argv[1])
    with _handed_over(wait, (mark,)) as place:
        child = multiprocessing.get_context("spawn").Process(target=run_child, args=(place,))
        child.start()
        while not mark.exists():
            time.sleep(0.05)
        print(child.pid, flush=True)
        os.kill(os.getpid(), 9)
"""


def test_ranks_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN, encoding="utf-8")
    # the child holds the pipe, too: output ends when both have ended
    done = subprocess.run([sys.executable, script, tmp_path / "mark"], stdout=subprocess.PIPE, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout


KILLED_AT_START = """
import os, sys
from lp_plugin.job.launch import launch_local

class Deadly:
    def __reduce__(self):  # ends a process that is given this before it runs
        return (os._exit, (9,))

def show(*_):
    print("never", flush=True)

if __name__ == "__main__":
    launch_local(3, show, Deadly(), b"x" * 10_000_000)
"""


def test_a_rank_that_dies_while_others_are_started_hangs_nothing(tmp_path: Path) -> None:
    """It is given more than a pipe holds, and is gone before it has taken it."""
    script = tmp_path / "deadly.py"
    script.write_text(KILLED_AT_START, encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "RankFailedError: rank " in done.stderr
    assert "ended with exit code 9" in done.stderr
    assert "never" not in done.stdout


def test_more_processes_than_cores_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeEnvironmentError, match=r"100000 processes are too many .* take at most"):
        launch.launch_local(100_000, print)
