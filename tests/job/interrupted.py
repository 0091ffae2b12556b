"""A job that is started, stopped and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

__all__ = ["Interrupted", "alive", "children"]


class Interrupted:
    """A command whose finished results are counted in its journal.

    Args:
        command: With all its arguments.
        output: Where it writes its results.
        environment: Of its processes.
    """

    def __init__(self, command: list[str], output: Path, environment: dict[str, str]) -> None:
        self._command, self._environment = command, environment
        self.output = output
        self.partial = output.with_name(f"{output.name}.partial")
        self._started: list[subprocess.Popen[str]] = []

    def start(self) -> subprocess.Popen[str]:
        """In a session of its own, as a shell would start it."""
        process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def journaled(self) -> list[dict[str, Any]]:
        """Results that are on disk."""
        if not self.partial.exists():
            return []
        lines = self.partial.read_text(encoding="utf-8").split("\n")[1:-1]
        return [json.loads(line) for line in lines]

    def wait_for_more(self, process: subprocess.Popen[str]) -> None:
        """Until further results are on disk."""
        before = len(self.journaled())
        deadline = time.monotonic() + 100
        while len(self.journaled()) <= before:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self, process: subprocess.Popen[str]) -> str:
        """What it said, once it and its ranks have ended, which must be soon."""
        ranks = children(process.pid)
        start = time.monotonic()
        _, stderr = process.communicate(timeout=15)
        while any(map(alive, ranks)):
            assert time.monotonic() - start < 15, "ranks are still running"
            time.sleep(0.05)
        return stderr

    def stop(self) -> None:
        """Ends whatever still runs."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def children(pid: int) -> list[int]:
    """The ranks' processes, multiprocessing's own helper left out."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [int(child) for child in listed if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    """Whether a process still runs."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
