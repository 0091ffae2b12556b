"""Ranks that watch over one another and end in every way; prints what each said and when, as JSON.

Of the watch alone: no process group, no model. Called by test_watch.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

from forked import run_ranks

from lp_plugin.errors import WeightsError
from lp_plugin.job.launch import run_and_report
from lp_plugin.job.place import at, set_stage, set_step
from lp_plugin.job.watch import watch as watching

TIMEOUT = 1.5
WORLD = 3


def rank_that(acts: int, what: Callable[[], None], others: str = "receive") -> Callable[[int], None]:
    """A rank that waits for the others in step 7, or, if it is ``acts``, does something instead."""

    def work(rank: int) -> None:
        watching.watch(TIMEOUT)
        set_stage(rank)
        set_step(7)
        at("forward" if rank == acts else others, 3)
        if rank == acts:
            time.sleep(0.3)  # the others know where it is
            print(f"\nACTS {time.monotonic()}", file=sys.stderr, flush=True)
            what()
        else:
            time.sleep(20)
        watching.leave()

    return lambda rank: run_and_report(work, rank)


def fails() -> None:
    """As a broken file makes it."""
    raise WeightsError("no such file")


def breaks() -> None:
    """As a mistake in a script makes it."""
    raise ValueError("a mistake")


def other_versions(rank: int) -> None:
    """Rank 2 is on a host that was forgotten in an upgrade."""
    if rank == 2:
        time.sleep(2)  # the others have come
        watching.own_versions = lambda: {"torch": "1.0"}  # type: ignore[attr-defined]
    run_and_report(lambda: watching.watch(TIMEOUT))


def leaves_early(rank: int) -> None:
    """Ranks that are done go, whichever is first; code of their own before takes longer than a timeout."""
    watching.watch(TIMEOUT)
    time.sleep(TIMEOUT + 0.7 * ((rank + 1) % WORLD + 1))
    watching.leave()


CASES: dict[str, Callable[[int], None]] = {
    **{f"killed {rank}": rank_that(rank, lambda: os.kill(os.getpid(), signal.SIGKILL)) for rank in range(WORLD)},
    **{f"stopped {rank}": rank_that(rank, lambda: os.kill(os.getpid(), signal.SIGSTOP)) for rank in (0, 2)},
    "exited": rank_that(1, lambda: os._exit(0)),
    "stuck": rank_that(1, lambda: time.sleep(20)),
    "all wait": rank_that(3, lambda: None),
    "takes its time": rank_that(1, lambda: (at("load"), time.sleep(2 * TIMEOUT), os._exit(7)), others="agree"),
    "failed": rank_that(1, fails),
    "mistaken": rank_that(1, breaks),
    "terminated": rank_that(1, lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(20))),
    "other versions": other_versions,
    "leaves early": leaves_early,
}

if __name__ == "__main__":
    found = {}
    for name, entry in CASES.items():
        found[name] = [asdict(each) for each in run_ranks(WORLD, entry, seconds=20)]
    print(json.dumps(found))
