"""Cases run in forked processes: what each came to, its time and its memory, whatever it does to its process."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

__all__ = ["LIMIT_BYTES", "LIMIT_SECONDS", "Ended", "run_each"]

LIMIT_SECONDS = 1.0
"""A case that takes longer has failed."""
LIMIT_BYTES = 200 * 10**6
"""A case that takes more memory, beyond what its process had before, has failed."""
_PATIENCE_SECONDS = 10.0
"""After which a case is killed."""
_DATA_BYTES = 2 * 2**30
"""Memory beyond what the process had: protects the machine, and gives a MemoryError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one case ended."""

    outcome: str
    """What the case returned; ``killed`` or ``died`` if it returned nothing."""
    text: str = ""
    """What it had to say."""
    seconds: float = 0.0
    """Wall clock, without waiting for a processor that others had."""
    peak_bytes: int = 0
    """Resident memory at its largest, beyond what the process had before."""


def run_each(cases: Sequence[Callable[[], tuple[str, str]]]) -> list[Ended]:
    """Runs cases one after the other in a forked process, and the rest in another one if a case ends it.

    Args:
        cases: Each returns its outcome and what it has to say.

    Returns:
        One for each, in order.
    """
    ended: list[Ended] = []
    while len(ended) < len(cases):
        ended += _run_some(cases[len(ended) :])
    return ended


def _run_some(cases: Sequence[Callable[[], tuple[str, str]]]) -> list[Ended]:
    """At least one of the cases: all, or those up to the one that ended the process."""
    reader, writer = os.pipe()
    nothing, never = os.pipe()  # standard input that waits for ever, so that a question is found out
    process = os.fork()
    if not process:
        os.close(reader)
        os.dup2(nothing, 0)
        _child(cases, writer)
    os.close(writer)
    os.close(nothing)
    ended: list[Ended] = []
    with os.fdopen(reader, "rb") as lines:
        outcome = "died"
        while len(ended) < len(cases):
            if not select.select([lines], [], [], _PATIENCE_SECONDS)[0]:
                os.kill(process, signal.SIGKILL)
                outcome = "killed"
                break
            line = _line(lines)
            if not line:
                break
            ended.append(Ended(**json.loads(line)))
    os.close(never)
    _, status = os.waitpid(process, 0)
    if len(ended) < len(cases):
        ended.append(Ended(outcome=outcome, text=f"wait status {status}", seconds=_PATIENCE_SECONDS))
    return ended


def _line(lines: IO[bytes]) -> bytes:
    """The next line, unbuffered: what is left in a buffer, select does not see."""
    found = b""
    while not found.endswith(b"\n"):
        byte = os.read(lines.fileno(), 1)
        if not byte:
            return b""
        found += byte
    return found


def _child(cases: Sequence[Callable[[], tuple[str, str]]], writer: int) -> None:
    """Never returns."""
    resource.setrlimit(resource.RLIMIT_DATA, (_memory("VmData") + _DATA_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        for case in cases:
            before = _memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins again
            start = time.perf_counter() - _waited_seconds()
            outcome, text = case()
            seconds = time.perf_counter() - _waited_seconds() - start
            peak = max(_memory("VmHWM") - before, 0)
            line = json.dumps(asdict(Ended(outcome=outcome, text=text[:4000], seconds=seconds, peak_bytes=peak)))
            os.write(writer, line.encode() + b"\n")
    finally:
        os._exit(0)


def _waited_seconds() -> float:
    """That this process was ready to run and did not."""
    return int(Path("/proc/self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9


def _memory(name: str) -> int:
    """A figure of this process, in bytes."""
    with Path("/proc/self/status").open(encoding="utf-8") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextlib.contextmanager
def captured(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Standard output and error of this process, from all of its parts, in files; a test's own streams are let be."""
    paths = folder / "stdout", folder / "stderr"
    saved, streams = (os.dup(1), os.dup(2)), (sys.stdin, sys.stdout, sys.stderr)
    for number, path in enumerate(paths, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    try:
        yield paths
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = streams
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
