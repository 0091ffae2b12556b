"""Two hosts on one machine: network, names, processes and mounts of their own, joined by a cable.

Linux namespaces, which root may make; nothing of them outlasts the processes that hold them. Who may not has two
addresses of the loopback instead, and the tests that need more than that are skipped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Host", "find_process", "run_on", "two_hosts", "wait_for_lines"]


@dataclass(frozen=True, kw_only=True)
class Host:
    """One of them."""

    name: str
    """What its processes call it."""
    address: str
    """Where the other one reaches it."""
    enter: tuple[str, ...] = ()
    """What a command begins with, to run there."""

    @property
    def is_real(self) -> bool:
        """Whether it is more than an address of this machine."""
        return bool(self.enter)

    def do(self, *command: object) -> None:
        """Runs a command there, as root."""
        subprocess.run([*self.enter, *map(str, command)], check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """The hosts ``node0`` and ``node1``; two addresses of the loopback if namespaces can't be made.

    Args:
        folder: Of this test's own.
    """
    with contextlib.ExitStack() as stack:
        try:
            hosts = tuple(stack.enter_context(_host(number)) for number in range(2))
            _connect(hosts, folder)
        except (OSError, subprocess.SubprocessError):
            stack.close()
            hosts = tuple(Host(name=f"127.0.0.{number}", address=f"127.0.0.{number}") for number in (1, 2))
        yield hosts[0], hosts[1]


@contextlib.contextmanager
def _host(number: int) -> Iterator[Host]:
    spaces = ("--net", "--uts", "--mount", "--pid")
    holder = subprocess.Popen(
        ["unshare", *spaces, "--fork", "--mount-proc", "--kill-child", "sh", "-c", "echo there; exec sleep infinity"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        if holder.stdout is None or not holder.stdout.readline():
            raise OSError("namespaces can't be made")
        child = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text(encoding="ascii").split()[0]
        enter = ("nsenter", "--target", child, *spaces, "--")
        yield Host(name=f"node{number}", address=f"10.213.77.{number + 1}", enter=enter)
    finally:
        holder.kill()
        holder.communicate()


def _connect(hosts: tuple[Host, ...], folder: Path) -> None:
    """A cable between them, and their names."""
    names = folder / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts))
    pids = [host.enter[2] for host in hosts]
    ends = [f"lp{pid}" for pid in pids]
    _run("ip", "link", "add", ends[0], "netns", pids[0], "type", "veth", "peer", "name", ends[1], "netns", pids[1])
    for host, end in zip(hosts, ends, strict=True):
        host.do("hostname", host.name)
        host.do("mount", "--bind", names, "/etc/hosts")
        host.do("ip", "link", "set", "lo", "up")
        host.do("ip", "link", "set", end, "name", "eth0")
        host.do("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.do("ip", "link", "set", "eth0", "up")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def run_on(
    hosts: tuple[Host, Host],
    command: Callable[[int], list[object]],
    environment: dict[str, str],
    *,
    meanwhile: Callable[[], None] = lambda: None,
    seconds: float = 120,
) -> list[tuple[int, str]]:
    """Runs a command on each host.

    Args:
        hosts: The hosts.
        command: For a host's number.
        environment: Of the processes.
        meanwhile: Called once the commands have been started.
        seconds: Most.

    Returns:
        Exit code and what was said on standard error output, per host.
    """
    started = [
        subprocess.Popen(
            [*host.enter, *map(str, command(number))],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for number, host in enumerate(hosts)
    ]
    try:
        meanwhile()
        until = time.monotonic() + seconds
        said = [process.communicate(timeout=until - time.monotonic())[1] for process in started]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return [(process.returncode, each) for process, each in zip(started, said, strict=True)]


def find_process(variable: str, argument: object, *, seconds: float = 60) -> int:
    """The process that has a variable (``NAME=value``), and an argument in its command line; waited for."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.fsencode(str(argument)) in (folder / "cmdline").read_bytes().split(
                    b"\0"
                ) and variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    return int(folder.name)
        time.sleep(0.05)
    raise TimeoutError(f"no process with {variable} has {argument} in its command line")


def wait_for_lines(file: Path, count: int, *, seconds: float = 60) -> None:
    """Until a file is there and has so many lines."""
    until = time.monotonic() + seconds
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        if time.monotonic() > until:
            raise TimeoutError(f"{file} does not get {count} lines")
        time.sleep(0.002)
