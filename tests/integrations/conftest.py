"""Real processes for the tests: ranks of a job over Gloo, started by a launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from commands import BIN, Start


@pytest.fixture(scope="session")
def start() -> Start:
    """Runs a command to its end and returns what it printed; a bad exit or a hang fails the test with the output."""

    def run(*command: str | Path, seconds: int = 240) -> str:
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        # a session of its own, so that a hung launcher ends together with its ranks
        process = subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
            pytest.fail(f"{command} still ran after {seconds} s:\n{output}\n{errors}")
        if process.returncode != 0:
            pytest.fail(f"{command} ended with {process.returncode}:\n{output}\n{errors}")
        return output

    return run


@pytest.fixture
def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
