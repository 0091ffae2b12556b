"""Ranks of real jobs that are killed, stopped or fail at every place, and what becomes of the others.

    python tests/campaigns/faults.py --output docs/results/faults            # Gloo, 3 ranks, all cases
    python tests/campaigns/faults.py --ranks 2 --every 12 --output gpu       # on 2 GPUs: NCCL

Each case runs a job whose one rank meets a fault at one place, without a launcher's help, then the same command again
without a fault. It holds if all ranks ended, soon, saying who was at fault, nothing was left behind, and the second
run's output has every document, prompt or step exactly once, as in a run without a fault.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fault_jobs import JOBS, Job
from fault_page import write_page
from forked import Ended, run_ranks
from rich.console import Console
from rich.progress import Progress
from whereabouts import follow

TIMEOUT = 3.0
"""``--timeout`` of the jobs: for ranks that hang."""
FAULTS = ("SIGKILL", "SIGSTOP", "exception", "os._exit")
PLACES: dict[str, tuple[str, ...]] = {
    "init": ("init",),
    "load": ("load",),
    "receive": ("receive",),
    "compute": ("forward", "backward", "prefill", "decode"),
    "send": ("send",),
    "drain": ("drain",),
}
"""What `lp_plugin.job.place` calls them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One fault."""

    job: str
    fault: str
    place: str
    rank: int
    after: int = 0
    """Times that the rank passes the place unharmed before."""


class _Fault:
    """Meets a rank on its way to a place."""

    def __init__(self, case: Case) -> None:
        self._case, self._left = case, case.after

    def comes_to(self, doing: str) -> None:
        """The rank begins something."""
        if doing in PLACES[self._case.place]:
            self._left -= 1
            if self._left == -1:
                self._meet()

    def _meet(self) -> None:
        time.sleep(0.3)  # so that the others have heard where it is
        os.write(2, f"INJECTED {time.monotonic()}\n".encode())
        if self._case.fault == "exception":
            raise ValueError("injected")
        if self._case.fault == "os._exit":
            os._exit(3)
        os.kill(os.getpid(), getattr(signal, self._case.fault))


def all_cases(ranks: int, jobs: list[str]) -> Iterator[Case]:
    """Every fault at every place of every job on the first, a middle and the last rank; some places twice."""
    victims = sorted({0, ranks // 2, ranks - 1})
    for job, fault, where, rank in itertools.product(jobs, FAULTS, PLACES, victims):
        if (where, rank) in JOBS[job].impossible(ranks):
            continue
        for after in (0, 3) if where in {"receive", "compute", "send"} else (0,):
            yield Case(job=job, fault=fault, place=where, rank=rank, after=after)


def run_case(case: Case, job: Job, ranks: int, reference: Any) -> dict[str, Any]:
    """What happened, and what is wrong with it (``problems``)."""
    folder, temporary = (Path(tempfile.mkdtemp(prefix="faults-")) for _ in range(2))
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    before = set(Path("/dev/shm").iterdir())  # noqa: S108

    def inject(rank: int) -> None:
        if rank == case.rank:
            follow(_Fault(case).comes_to)
        job.run(folder, TIMEOUT)

    ended = run_ranks(ranks, inject, seconds=60)
    problems, seconds = _judged(case, ended, ranks)
    left = [*(set(Path("/dev/shm").iterdir()) - before), *temporary.iterdir(), *_running({each.pid for each in ended})]  # noqa: S108
    if left:
        problems.append(f"left behind: {left[:5]}")
    os.environ.pop("TMPDIR")
    tempfile.tempdir = None
    again = run_ranks(ranks, lambda _: job.run(folder, TIMEOUT), seconds=90)
    if any(each.code or each.hung for each in again):
        problems.append(f"the second run failed: {[each.code for each in again]} {again[0].said[-300:]}")
    else:
        problems += job.differences(folder, reference)
    shutil.rmtree(folder)
    shutil.rmtree(temporary)
    said = [line for each in ended if each.rank != case.rank for _, line in each.lines if "stops:" in line]
    return dataclasses.asdict(case) | {"seconds": seconds, "said": said[:1], "problems": problems}


def _judged(case: Case, ended: list[Ended], ranks: int) -> tuple[list[str], float | None]:
    """What is wrong with how the ranks ended, and seconds until the others said so."""
    victim = ended[case.rank]
    injected = re.search(r"INJECTED (\S+)", victim.said)
    if injected is None:
        return [f"the fault was not met: {victim.said[-300:]}"], None
    problems = [f"rank {each.rank} hung" for each in ended if each.hung]
    others = [each for each in ended if each.rank != case.rank]
    problems += [f"rank {each.rank} ended with 0" for each in others if each.code == 0]
    expected = {"exception": 1, "os._exit": 3}.get(case.fault, -signal.SIGKILL)
    if victim.code != expected:
        problems.append(f"the victim ended with {victim.code}, not {expected}")
    where = ".*" if case.place == "init" else rf"stage {case.rank}\b.*"
    naming = rf"rank {case.rank} (on \S+ )?\({where}\) (died|hung|failed)"
    if not re.search(naming, "".join(each.said for each in ended)):
        problems.append(f"nobody named it: {[(each.code, each.at, each.said[-200:]) for each in ended]}")
    told = [at for each in ended for at, line in each.lines if re.search(naming, line)]
    seconds = min(told, default=max(each.at for each in ended)) - float(injected[1])
    bound = TIMEOUT + 1 if case.fault == "SIGSTOP" else 2.0
    if seconds > bound:
        problems.append(f"noticed after {seconds:.2f} s, more than {bound:g}")
    return problems, round(seconds, 3)


def _running(sessions: set[int]) -> list[str]:
    """Processes that a rank has started and that are there still, and with them what ports they listen on."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text(encoding="utf-8")
        except OSError:
            continue
        state, _, _, session = text.rsplit(")", 1)[1].split()[:4]
        if int(session) in sessions and state != "Z":
            found.append(text.split(" (")[0])
    return found


def main() -> None:
    """Runs the cases and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--every", type=int, default=1, help="run every so-manieth case only")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json and README.md")
    given = parser.parse_args()
    console = Console(stderr=True)
    cases = list(all_cases(given.ranks, given.jobs))[:: given.every]
    results = []
    references = {name: JOBS[name].reference(given.ranks, TIMEOUT) for name in given.jobs}
    with Progress(console=console) as bar:
        for case in bar.track(cases):
            result = run_case(case, JOBS[case.job], given.ranks, references[case.job])
            results.append(result)
            if result["problems"]:
                console.print(f"{case}: {result['problems']}", style="red", markup=False)
    write_page(given.output, results, ranks=given.ranks, timeout=TIMEOUT, command=sys.argv)
    failed = [result for result in results if result["problems"]]
    console.print(f"{len(results)} injections, {len(failed)} with problems; written to {given.output}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
