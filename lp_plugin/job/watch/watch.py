"""Starting the watch over a job, and ending a rank when it says so."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from types import FrameType
from typing import Any, TypeVar

from lp_plugin.job.place import at, here
from lp_plugin.job.watch.hub import LINE_BYTES, Hub
from lp_plugin.job.watch.meeting import meet
from lp_plugin.job.watch.member import Member
from lp_plugin.job.watch.verdict import Peer, Verdict, own_machine, own_versions

__all__ = [
    "EXIT_LOST_PEER",
    "announce",
    "await_verdict",
    "leave",
    "lost_peer",
    "report",
    "watch",
]

EXIT_LOST_PEER = 75
"""Exit code of a rank that ends because another one has to."""
_FIRST_SECONDS = 0.5
"""Before a rank ends because of another: a launcher, which looks every 0.1 seconds, must see that one first."""
_TERM_SECONDS = 1.0
"""After SIGTERM, which launchers send when a rank has died: for the verdict to come."""
_REPORT_SECONDS = 2.0
"""For the hub's answer to a rank that fails."""
_VERDICT_SECONDS = 2.0
"""For the verdict on the rank that a connection was lost to."""
_PEER_GONE = ("connection closed", "connection reset", "socket", "gloo", "nccl", "broken pipe", "timed out")

_Answer = TypeVar("_Answer")

_watch: Watch | None = None


def watch(timeout_seconds: float) -> None:
    """From now on, the job's ranks watch over one another; collective, and nothing for a process alone.

    A rank that dies or hangs, or ends by an exception that nobody handles, ends all: each says where that one was, once
    per host, and exits with code 75. Nothing happens to those that go on when one ends as it should.

    Raises:
        RuntimeEnvironmentError: If ranks do not come in time, or have other versions.
    """
    global _watch  # noqa: PLW0603 - one process is one rank
    if _watch is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _watch = Watch(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_seconds)
        _watch.start()
        atexit.register(leave)
        sys.excepthook = functools.partial(_unhandled, sys.excepthook)


def leave() -> None:
    """This rank is done, and does not watch any more."""
    global _watch  # noqa: PLW0603
    if _watch is not None:
        _watch.part()
        _watch = None
        atexit.unregister(leave)


def report(kind: str, text: str) -> bool:
    """Tells the other ranks that this one ends, so that they end, too.

    Args:
        kind: ``failed`` or ``interrupted``.
        text: Why.

    Returns:
        Whether this is the first rank that has to tell; True if there is no watch.
    """
    return _watch is None or _watch.report(kind, text)


def announce(error: BaseException) -> None:
    """Tells the other ranks of an error that ends this one, and, if it is the first, says where it was.

    If the error is that the connection to another rank is lost, the watch has two seconds to end this process, naming
    that rank.
    """
    if isinstance(error, KeyboardInterrupt):
        report("interrupted", "interrupted")
        return
    if lost_peer(error):
        await_verdict()
    place = here()
    if report("failed", f"{type(error).__name__}: {error} ({place})"):
        print(f"rank {os.environ.get('RANK', '0')} ({place}) failed:", file=sys.stderr, flush=True)  # noqa: T201


def lost_peer(error: BaseException) -> bool:
    """Whether an error is that another rank's connection has ended."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _PEER_GONE)


def await_verdict() -> None:
    """Gives the watch time to end this process, whose connection to another rank is lost; returns if it does not."""
    if _watch is not None:
        time.sleep(_VERDICT_SECONDS)


def _unhandled(before: Callable[..., Any], kind: type[BaseException], error: BaseException, trace: Any) -> None:
    announce(error)
    before(kind, error, trace)


class Watch:
    """The watching thread of one rank.

    Args:
        rank: Of this process.
        world: Ranks of the job.
        timeout_seconds: For ranks that hang; rank 0's counts.
    """

    def __init__(self, rank: int, world: int, timeout_seconds: float) -> None:
        self._world, self._timeout = world, timeout_seconds
        self._peer = Peer(rank=rank, host=socket.gethostname(), machine=own_machine(), pid=os.getpid())
        self._roster: tuple[Peer, ...] = ()
        self._verdict: Verdict | None = None
        self._ready = threading.Event()
        self._hub: Hub | None = None
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def start(self) -> None:
        """Returns when all ranks have come.

        Raises:
            RuntimeEnvironmentError: If they don't.
        """
        at("start")
        versions = own_versions()
        self._met = meet(self._peer, self._world, self._timeout)
        if self._met.listening is not None:
            self._hub = Hub(self._world, self._timeout, self._met.token, versions)
        self._member = Member(
            self._peer, self._met, versions, self._timeout, on_verdict=self._end, on_roster=self._everyone_is_there
        )
        self._term, self._woken = socket.socketpair()
        if threading.current_thread() is threading.main_thread():
            self._woken.setblocking(False)
            signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, _terminated)  # or set_wakeup_fd hears nothing of it
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        os.register_at_fork(after_in_child=self._forget)
        self._ready.wait()  # the watch itself ends the process if ranks don't come
        at("")

    def part(self) -> None:
        """Says goodbye; the other ranks go on without this one."""
        self._ask(self._say_goodbye(), None)
        self._thread.join(_REPORT_SECONDS)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
            if signal.getsignal(signal.SIGTERM) is _terminated:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def report(self, kind: str, text: str) -> bool:
        """See `report`."""
        return self._ask(self._report(kind, text), True)

    async def _report(self, kind: str, text: str) -> bool:
        try:
            return await self._member.report(kind, text)
        except OSError:  # rank 0 has ended: it had a reason of its own
            return False

    def _ask(self, question: Coroutine[Any, Any, _Answer], otherwise: _Answer) -> _Answer:
        """The watching thread's answer, if it still gives one."""
        try:
            told = asyncio.run_coroutine_threadsafe(question, self._loop)
        except RuntimeError:  # the hub has left, and the thread ended
            question.close()
            return otherwise
        until = time.monotonic() + _REPORT_SECONDS
        while self._thread.is_alive() and time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                try:
                    return told.result(0.05)
                except CancelledError:  # the hub has left
                    break
        return otherwise

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            runner.run(self._watch())

    async def _watch(self) -> None:
        self._tasks = [asyncio.create_task(self._hear_signals()), asyncio.create_task(self._end_with_agent())]
        if self._hub is not None:
            await asyncio.start_server(self._hub.serve, sock=self._met.listening, limit=LINE_BYTES)
            self._tasks.append(asyncio.create_task(self._hub.look()))
        await self._member.run()

    async def _say_goodbye(self) -> None:
        if self._hub is not None:
            await self._hub.part()
        await self._member.part()

    def _everyone_is_there(self, roster: tuple[Peer, ...]) -> None:
        self._roster = roster
        self._ready.set()

    async def _hear_signals(self) -> None:
        """A launcher sends SIGTERM when a rank has died; the main thread may be where Python can't reach it."""
        self._term.setblocking(False)
        while signal.SIGTERM not in await self._loop.sock_recv(self._term, 64):
            pass
        await asyncio.sleep(_TERM_SECONDS)  # a verdict would end the process meanwhile
        if signal.getsignal(signal.SIGTERM) is _terminated:
            os._exit(128 + signal.SIGTERM)

    async def _end_with_agent(self) -> None:
        """A torchrun that was killed can't end its ranks."""
        while self._agent is None or os.getppid() == self._agent:
            await asyncio.sleep(1.0)
        os._exit(EXIT_LOST_PEER)

    def _end(self, verdict: Verdict) -> None:
        """Ends this process, unless it is about to itself; kills a rank of this host that hangs."""
        if self._verdict is not None:
            return
        self._verdict = verdict
        mine = verdict.peer.rank == self._peer.rank
        if mine and verdict.kind in {"failed", "interrupted"}:
            return
        if verdict.kind == "hung" and not mine:
            self._kill(verdict.peer)
        if verdict.kind != "interrupted" and self._speaks(verdict):
            print(f"rank {self._peer.rank} stops: {verdict}", file=sys.stderr, flush=True)  # noqa: T201
        if signal.SIGTERM not in _received:
            time.sleep(_FIRST_SECONDS)
        os._exit(EXIT_LOST_PEER)

    def _forget(self) -> None:
        """In a forked process, such as a data loader's: an open connection there would hide this rank's end."""
        signal.set_wakeup_fd(-1)
        for each in (*self._member.sockets, *(self._hub.sockets if self._hub else ()), self._term, self._woken):
            with contextlib.suppress(OSError, AttributeError):
                os.close(each.fileno())

    def _speaks(self, verdict: Verdict) -> bool:
        """Whether this rank says why: the first one of each host; a rank that fails has said so on its own host."""
        if not self._roster:
            return True
        local = [peer.rank for peer in self._roster if peer.machine == self._peer.machine]
        if verdict.kind == "failed" and verdict.peer.rank in local:
            return False
        others = [rank for rank in local if rank != verdict.peer.rank]
        return self._peer.rank == min(others or local)

    def _kill(self, peer: Peer) -> None:
        """No launcher ends a stopped process soon."""
        if peer.machine == self._peer.machine:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(peer.pid, signal.SIGKILL)


_received: set[int] = set()


def _terminated(number: int, frame: FrameType | None) -> None:
    del frame
    _received.add(number)
