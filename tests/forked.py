"""Ranks of a job as forked processes of a script that has imported everything: started in milliseconds, many times.

No launcher looks after them: what ends the survivors of a rank is the job itself, as on hosts of which only one has
lost a rank.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from ports import free_port

__all__ = ["Ended", "run_ranks"]


@dataclass(kw_only=True)
class Ended:
    """A rank that has ended."""

    rank: int
    pid: int
    code: int = 0
    """Exit code; minus the signal's number if one killed it."""
    at: float = 0.0
    """When it ended, ``time.monotonic()``."""
    hung: bool = False
    """Had not ended in time, and was killed."""
    lines: list[tuple[float, str]] = field(default_factory=list)
    """What it said on its standard error output, each with the time at which it came."""

    @property
    def said(self) -> str:
        """All of it."""
        return "".join(line for _, line in self.lines)


def run_ranks(world: int, entry: Callable[[int], None], *, seconds: float = 60.0) -> list[Ended]:
    """Forks a process for each rank, in a launcher's environment, and waits for all of them.

    Args:
        world: Ranks.
        entry: Runs one; a return ends it with 0, ``SystemExit`` with its code, another exception with 1.
        seconds: Most for all of them.

    Returns:
        The ranks.
    """
    port = free_port()
    ranks = [_fork(rank, world, port, entry) for rank in range(world)]
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for ended, pipe in ranks:
            selector.register(pipe, selectors.EVENT_READ, ended)
        running = {ended.pid: ended for ended, _ in ranks}
        while running or selector.get_map():
            for key, _ in selector.select(0.01):
                data = os.read(key.fd, 1 << 16)
                if data:
                    key.data.lines.append((time.monotonic(), data.decode(errors="replace")))
                else:
                    selector.unregister(key.fd)
                    os.close(key.fd)
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended = running.pop(pid)
                    ended.code, ended.at = os.waitstatus_to_exitcode(status), time.monotonic()
            if time.monotonic() > deadline:
                for pid, ended in running.items():
                    ended.hung = True
                    os.kill(pid, signal.SIGKILL)
    return [ended for ended, _ in ranks]


def _fork(rank: int, world: int, port: int, entry: Callable[[int], None]) -> tuple[Ended, int]:
    """A rank, and the end of the pipe that its standard error output comes through."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return Ended(rank=rank, pid=pid), read
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(write, 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        entry(rank)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - what a script of its own would print
        traceback.print_exc()
    finally:
        os._exit(code)
