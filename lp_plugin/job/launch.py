"""Starting the ranks of a job: our own local processes, or those that a launcher has started already."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from lp_plugin.errors import LpPluginError, RankFailedError, RuntimeEnvironmentError
from lp_plugin.job.layout import Layout
from lp_plugin.job.memory import explained
from lp_plugin.job.watch.watch import EXIT_LOST_PEER, announce, await_verdict, lost_peer, report
from lp_plugin.quantity import printable

__all__ = ["join_launcher", "launch_local", "prepare_environment", "run_and_report", "start_job"]

Outcome = TypeVar("Outcome")

EXIT_ERROR = 2
"""A deliberate error, already printed."""
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""By torchrun's library while it runs processes."""
_MOST_PROCESSES_PER_CORE = 16
"""Without GPUs; each takes half a gigabyte before it has done anything."""


class Job(Protocol):
    """What a job tells the launcher; the rest of it is its own."""

    @property
    def layout(self) -> Layout:
        """Its processes."""


AnyJob = TypeVar("AnyJob", bound=Job)


def start_job(
    prepared: Callable[[], AnyJob], run_rank: Callable[[Callable[[], AnyJob] | None], Outcome | None]
) -> Outcome | None:
    """Joins the ranks that a launcher has started, or checks the job and starts its ranks on this host.

    Args:
        prepared: Checks and makes the job; called once, on rank 0.
        run_rank: A function of a module; runs one rank. Takes ``prepared`` on rank 0, None elsewhere.

    Returns:
        What ``run_rank`` returned on rank 0; None on other ranks.

    Raises:
        SystemExit: If the job was interrupted, or a rank ended with an error that it has printed.
        LpPluginError: Any of its kinds.
    """
    if join_launcher():
        prepare_environment(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return run_and_report(run_rank, prepared if os.environ["RANK"] == "0" else None)
    prepare_environment(None)
    job = prepared()
    try:
        return launch_local(job.layout.num_processes, _run_prepared, run_rank, job)
    except KeyboardInterrupt:  # typer would end without a word
        print("interrupted; what is finished is kept: the same command goes on.", file=sys.stderr)  # noqa: T201
        raise SystemExit(130) from None


def _run_prepared(run_rank: Callable[[Callable[[], AnyJob] | None], Outcome | None], job: AnyJob) -> Outcome | None:
    return run_rank(lambda: job)


def prepare_environment(num_local_processes: int | None) -> None:
    """Variables that the frameworks read at import; what the user has set stays.

    Args:
        num_local_processes: Ranks that share this host's cores; None if not known yet.
    """
    if num_local_processes is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, num_local_processes))))
    defaults = {
        "DS_ACCELERATOR": "cuda" if torch.cuda.device_count() else "cpu",
        "TRANSFORMERS_VERBOSITY": "error",
        "KINETO_LOG_LEVEL": "99",  # the profiler reports what it does, and that a CPU is no GPU
        # DeepSpeed's point-to-point calls are unbatched and blocking on purpose
        "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def join_launcher() -> bool:
    """Whether torchrun, deepspeed or SLURM started this process as one rank of several.

    SLURM's variables are translated into torchrun's.

    Raises:
        RuntimeEnvironmentError: If SLURM started several tasks but the first host can't be found out.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))  # set by srun; a batch script alone is one process
    if "SLURM_PROCID" not in os.environ or tasks == 1:
        return False
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = str(tasks)
    own_gpu = torch.cuda.device_count() == 1  # --gpus-per-task=1: every task sees its own as number 0
    os.environ["LOCAL_RANK"] = "0" if own_gpu else os.environ["SLURM_LOCALID"]
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks))  # such as 8(x2) or 8,4
    os.environ.setdefault("LOCAL_WORLD_SIZE", re.split(r"[(,]", per_node)[0])
    os.environ.setdefault("MASTER_PORT", "29500")
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_slurm_host()
    return True


def launch_local(num_processes: int, entry: Callable[..., Any], *arguments: Any) -> Any:
    """Runs ``entry(*arguments)`` in processes on this host, through torchrun's library.

    Args:
        num_processes: Ranks.
        entry: Importable function; wrapped in `run_and_report`.
        arguments: Handed to each process.

    Returns:
        What rank 0 returned.

    Raises:
        SystemExit: With code 2 if a rank ended with a deliberate error, which it has printed.
        RankFailedError: If a rank died otherwise; names it.
        RuntimeEnvironmentError: If there are more processes without GPUs than the host's cores could serve.
    """
    most = _MOST_PROCESSES_PER_CORE * (os.cpu_count() or 1)
    if num_processes > most and not torch.cuda.device_count():
        raise RuntimeEnvironmentError(
            f"{num_processes} processes are too many for the {os.cpu_count()} cores of this host; take at most {most}."
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415

    prepare_environment(num_processes)
    # what they log, we say in one line; the agent's logger has a level of its own
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    is_main = threading.current_thread() is threading.main_thread()  # which alone has handlers
    handlers = {number: signal.getsignal(number) for number in _HANDLED if is_main}
    try:
        with _handed_over(entry, arguments) as place:
            return elastic_launch(config, run_child)(place)[0]
    except ChildFailedError as error:
        raise _explained(error) from None
    except SignalException:  # the launcher has stopped its processes
        raise KeyboardInterrupt from None
    finally:
        for number, handler in handlers.items():  # the launcher's own would raise its SignalException ever after
            signal.signal(number, handler)


@contextlib.contextmanager
def _handed_over(*what: Any) -> Iterator[str]:
    """Where processes of ours find what they are given; nothing is left when this one ends, however it does.

    Not through the pipe by which a process gets its arguments: of more than its 64 kB, what is left waits for ever if
    the process is killed meanwhile, and all that are not started yet with it.
    """
    descriptor = os.memfd_create("lp_plugin")
    with os.fdopen(descriptor, "wb") as file:
        pickle.dump(what, file)
        file.flush()
        yield f"/proc/{os.getpid()}/fd/{descriptor}"


def run_child(place: str) -> Any:
    """Runs one rank in a process of ours, which ends with its parent, even if that is killed.

    Args:
        place: Of the entry and its arguments, by `launch_local` alone.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    entry, arguments = pickle.loads(Path(place).read_bytes())  # noqa: S301 - our own parent's memory
    return run_and_report(entry, *arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(EXIT_LOST_PEER)


def run_and_report(entry: Callable[..., Any], *arguments: Any) -> Any:
    """Runs one rank; an error is printed once per job, by the rank that has it first, and ends the process.

    Without the immediate end the other ranks would wait in a collective for this one.
    """
    try:
        return entry(*arguments)
    except KeyboardInterrupt as error:
        announce(error)
        _end(130)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the other ranks must not hang
        deliberate = error if isinstance(error, LpPluginError) else explained(error)
        if deliberate is not None:
            _tell(str(deliberate))
            _end(EXIT_ERROR)
        if lost_peer(error):
            _end_without_peer(error)
        announce(error)
        traceback.print_exc()
        _end(1)


def _tell(reason: str) -> None:
    """Says why this rank ends, if it is the first of the job that has to."""
    if report("failed", reason):
        print(f"error (rank {os.environ['RANK']}): {printable(reason)}", file=sys.stderr, flush=True)  # noqa: T201


def _end_without_peer(error: BaseException) -> None:
    """Ends a rank that lost its connection; says so only if no other rank has had an error to report."""
    joined = torch.distributed.is_initialized()
    if joined:
        await_verdict()
    what = "lost the connection to another rank" if joined else "can't reach the other ranks"
    reason = f"{what}: {next(iter(str(error).splitlines()), '')}"
    _tell(reason)
    _end(EXIT_LOST_PEER if joined else EXIT_ERROR)


def _end(code: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a progress bar may have hidden the cursor
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _explained(error: Any) -> BaseException:
    """What the launcher's failure means: the rank that died first of itself."""
    failures = error.failures
    deliberate = [rank for rank, failure in failures.items() if failure.exitcode == EXIT_ERROR]
    if deliberate:
        return SystemExit(EXIT_ERROR)
    if any(failure.exitcode == 130 for failure in failures.values()):
        return KeyboardInterrupt()
    rank, first = min(
        failures.items(),
        key=lambda item: (item[1].exitcode == EXIT_LOST_PEER, item[1].exitcode >= 0, item[1].timestamp),
    )
    how = f"was killed by {first.signal_name()}" if first.exitcode < 0 else f"ended with exit code {first.exitcode}"
    return RankFailedError(
        f"rank {rank} {how}; the other ranks were stopped. What is finished is kept: "
        "the same command goes on where this one stopped."
    )


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    if os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)  # noqa: S603, S607
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeEnvironmentError(
            f"SLURM started several hosts ({nodes}), but scontrol can't list them ({error}); "
            "set MASTER_ADDR to the first host's name."
        ) from None
    return listed.stdout.split()[0]
