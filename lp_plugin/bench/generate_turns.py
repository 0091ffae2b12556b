"""The contenders' processes: all started at once, each warm and idle until its turn."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from lp_plugin.bench.generate_contenders import Contender, Request

__all__ = ["ContenderFailedError", "Running", "ready_deadline", "started"]

_READY_SECONDS = 420.0
"""To import, load, compile and warm up, while the others do, too."""
_TURN_SECONDS = 180.0
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.01
_ERROR = re.compile(r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception|error \(rank \d+\))\b.*)")


class ContenderFailedError(Exception):
    """A contender's process died or did not answer; the message is its last error."""


class Running:
    """A contender's processes.

    Args:
        contender: Who.
        request: What to do; lies in ``folder/request.json`` as well.
        folder: Where the processes look for their turns.
    """

    def __init__(self, contender: Contender, request: Request, folder: Path) -> None:
        self.contender = contender
        self._ranks = contender.devices(request.stages) if contender.has_ranks else 1
        self._folder = folder / contender.name
        self._folder.mkdir()
        self._turns = 0
        self._log: IO[bytes] = (self._folder / "log.txt").open("wb")
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [*self._launcher(), "lp_plugin.bench.baselines", str(folder), contender.name],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_environment(contender.devices(request.stages)),
            start_new_session=True,
        )

    def _launcher(self) -> list[str]:
        if not self.contender.has_ranks:
            return [sys.executable, "-m"]
        ranks = ["--standalone", f"--nproc-per-node={self._ranks}", "-m"]
        return [sys.executable, "-m", "torch.distributed.run", *ranks]

    def wait_ready(self, deadline: float) -> dict[str, Any]:
        """What rank 0 says of itself, once all ranks are warm.

        Raises:
            ContenderFailedError: If a process ends, or the ``time.monotonic()`` comes first.
        """
        for rank in range(self._ranks):
            self._wait(self._folder / f"ready-{rank}.json", deadline)
        return self._read("ready-0.json")

    def turn(self) -> tuple[float, list[list[int]]]:
        """Lets it generate once; seconds, and the new tokens of each prompt.

        Raises:
            ContenderFailedError: If a process ends or takes longer than three minutes.
        """
        (self._folder / f"turn-{self._turns}").touch()
        name = f"result-{self._turns}.json"
        self._wait(self._folder / name, time.monotonic() + _TURN_SECONDS)
        self._turns += 1
        result = self._read(name)
        return float(result["seconds"]), result["tokens"]

    def ask_to_stop(self) -> None:
        """Lets the processes end by themselves."""
        (self._folder / "stop").touch()

    def stopped(self) -> list[dict[str, list[int]]]:
        """Waits for the end; what each rank counted of its memory, empty unless all have ended by themselves."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        self.kill()
        names = [f"memory-{rank}.json" for rank in range(self._ranks)]
        return [self._read(name) for name in names] if all((self._folder / name).exists() for name in names) else []

    def kill(self) -> None:
        """Ends the processes that have not ended; a launcher ends its own."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()

    def _wait(self, path: Path, deadline: float) -> None:
        while not path.exists():
            if self._process.poll() is not None:
                raise ContenderFailedError(self._last_error() or f"ended with exit code {self._process.returncode}")
            if time.monotonic() > deadline:
                raise ContenderFailedError(f"did not answer in time; {self._last_error() or 'no error was printed'}")
            time.sleep(_POLL_SECONDS)

    def _read(self, name: str) -> Any:
        return json.loads((self._folder / name).read_text(encoding="utf-8"))

    def _last_error(self) -> str:
        """The last line of the log that reads like an error and is no launcher's summary."""
        text = (self._folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        found = [match[1] for line in text.splitlines() if (match := _ERROR.match(line))]
        return next((line for line in reversed(found) if "ChildFailedError" not in line), "")


@contextlib.contextmanager
def started(contenders: Sequence[Contender], request: Request, folder: Path) -> Iterator[list[Running]]:
    """Starts all of them; whatever happens, none outlives the block."""
    request.save(folder / "request.json")
    running: list[Running] = []
    try:
        for contender in contenders:
            running.append(Running(contender, request, folder))
        yield running
    finally:
        for each in running:
            each.kill()


def ready_deadline() -> float:
    """The ``time.monotonic()`` until which contenders may get ready."""
    return time.monotonic() + _READY_SECONDS


def _environment(devices: int) -> dict[str, str]:
    """Of a contender's processes: GPUs that it may use, quiet libraries, nothing of a launcher that we run under."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in launcher}
    visible = inherited.get("CUDA_VISIBLE_DEVICES", ",".join(str(index) for index in range(64)))
    defaults = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // devices)),
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    return defaults | inherited | {"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[:devices])}
