"""Rank 0's part of the watch: hears every rank, tells all of them when the job has to end.

A line of JSON per message. A rank that dies closes its connection, which its host's kernel does at once; a rank that
hangs, or whose host is gone, is silent, or says for too long that it is where it was.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from lp_plugin.job.place import UNTIMED, WAITING, Place, here
from lp_plugin.job.watch.verdict import Peer, Verdict
from lp_plugin.quantity import listed

__all__ = ["BEAT_SECONDS", "LINE_BYTES", "START_SECONDS", "Hub", "encode"]

BEAT_SECONDS: Final = 0.25
"""Between two signs of life, and between two looks at what others have sent."""
LINE_BYTES: Final = 1 << 16
"""Longest message; an error's text is cut to fit."""
_HELLO_SECONDS: Final = 10.0
"""For a connection's first message."""
START_SECONDS: Final = 60.0
"""At least, for all ranks to come: hosts import frameworks at very different speeds."""


def encode(message: dict[str, Any]) -> bytes:
    """A message as it is sent."""
    return json.dumps(message).encode() + b"\n"


@dataclass(slots=True)
class _Rank:
    """A rank that has come."""

    peer: Peer
    writer: asyncio.StreamWriter
    heard: float = field(default_factory=time.monotonic)
    place: Place = field(default_factory=Place)
    seconds_there: float = 0.0
    gone: bool = False
    """Has said goodbye."""


class Hub:
    """Hears the ranks of a job; lives in rank 0's watching thread.

    Args:
        world: Ranks.
        timeout_seconds: How long a rank may be silent, in one place, or not there yet.
        token: Shown by every rank of the job; whoever has none is not listened to.
        versions: That all have to have.
    """

    def __init__(self, world: int, timeout_seconds: float, token: str, versions: dict[str, str]) -> None:
        self._world, self._timeout, self._token, self._versions = world, timeout_seconds, token, versions
        self._ranks: dict[int, _Rank] = {}
        self._verdict: Verdict | None = None
        self._started = time.monotonic()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from hello to goodbye."""
        try:
            rank = await asyncio.wait_for(self._greet(reader, writer), _HELLO_SECONDS)
            if rank is not None:
                await self._hear(rank, reader)
        except (TimeoutError, OSError, ValueError, KeyError, TypeError, asyncio.LimitOverrunError):
            pass  # no rank of ours, or one that is gone
        except asyncio.CancelledError:  # this rank leaves; asyncio would print it
            pass
        finally:
            writer.close()

    async def look(self) -> None:
        """For as long as the job lasts: gives signs of life, and looks for ranks that give none."""
        while True:
            await self._tell_all({"beat": str(here())})
            found = self._missing() or self._silent() or self._stuck()
            if found is not None:
                await self._judge(found)
            await asyncio.sleep(BEAT_SECONDS)

    async def part(self) -> None:
        """Rank 0 leaves: the others are not watched over any more."""
        await self._tell_all({"bye": True})

    @property
    def sockets(self) -> list[Any]:
        """Of all connections."""
        return [rank.writer.get_extra_info("socket") for rank in self._ranks.values()]

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Rank | None:
        hello = json.loads(await reader.readline())
        if not hmac.compare_digest(str(hello["token"]), self._token):
            return None
        peer = Peer(**hello["peer"])
        if not 0 <= peer.rank < self._world or peer.rank in self._ranks:
            return None
        rank = self._ranks[peer.rank] = _Rank(peer, writer)
        different = {name: (have, self._versions.get(name)) for name, have in hello["versions"].items()}
        named = [f"{name} {have} (rank 0: {wanted})" for name, (have, wanted) in different.items() if have != wanted]
        if named:
            text = f"has other versions than rank 0: {', '.join(named)}; install the same everywhere."
            await self._judge(self._about(rank, "other versions", text))
        elif self._verdict is not None:
            await _tell(rank, {"verdict": asdict(self._verdict)})
        elif len(self._ranks) == self._world:
            roster = [asdict(each.peer) for _, each in sorted(self._ranks.items())]
            await self._tell_all({"roster": roster, "timeout": self._timeout})
        return rank

    async def _hear(self, rank: _Rank, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                message = json.loads(line)
                rank.heard = time.monotonic()
                if "place" in message:
                    rank.place, rank.seconds_there = Place(**message["place"]), float(message["seconds"])
                elif "report" in message:
                    await self._report(rank, message["report"], str(message["text"]))
                elif "bye" in message:
                    rank.gone = True
        except (OSError, ValueError, TypeError, KeyError):
            pass  # as if it had gone
        if not rank.gone:
            rank.gone = True
            await self._judge(self._about(rank, "died"))

    async def _report(self, rank: _Rank, kind: Any, text: str) -> None:
        """A rank says that it ends; it is told whether it is the first to."""
        rank.gone = True
        verdict = self._about(rank, "interrupted" if kind == "interrupted" else "failed", text)
        first = self._decides(verdict)
        await _tell(rank, {"first": first})
        if first:
            await self._tell_all({"verdict": asdict(verdict)})

    async def _judge(self, verdict: Verdict) -> None:
        """Tells all ranks, once."""
        if self._decides(verdict):
            await self._tell_all({"verdict": asdict(verdict)})

    def _decides(self, verdict: Verdict) -> bool:
        """Whether this is the job's first verdict, which counts."""
        if self._verdict is not None:
            return False
        self._verdict = verdict
        return True

    async def _tell_all(self, message: dict[str, Any]) -> None:
        ready = [rank for rank in self._ranks.values() if not (rank.gone and "beat" in message)]
        await asyncio.gather(*(_tell(rank, message) for rank in ready))

    def _about(self, rank: _Rank, kind: Any, text: str = "") -> Verdict:
        return Verdict(kind=kind, peer=rank.peer, place=str(rank.place), text=text)

    def _missing(self) -> Verdict | None:
        """Ranks that have not come in time."""
        allowed = max(self._timeout, START_SECONDS)
        if len(self._ranks) == self._world or time.monotonic() - self._started < allowed:
            return None
        absent = [rank for rank in range(self._world) if rank not in self._ranks]
        missing = f"missing are {listed(absent, 8)} of {self._world} ranks"
        text = f"did not come within {allowed:g} s; {missing}: start them all."
        unknown = Peer(rank=absent[0], host="an unknown host", machine="", pid=0)
        return Verdict(kind="missing", peer=unknown, place="start", text=text)

    def _silent(self) -> Verdict | None:
        """A rank that gives no sign of life."""
        now = time.monotonic()
        for rank in self._ranks.values():
            if not rank.gone and now - rank.heard > self._timeout:
                return self._about(rank, "hung", f"no sign of life for {self._timeout:g} s")
        return None

    def _stuck(self) -> Verdict | None:
        """A rank that has not moved: one that computes, or, if all wait for one another, the one that waits longest."""
        if len(self._ranks) < self._world:
            return None
        there = [rank for rank in self._ranks.values() if not rank.gone]
        stuck = [rank for rank in there if rank.place.doing not in UNTIMED and rank.seconds_there > self._timeout]
        working = [rank for rank in stuck if rank.place.doing not in WAITING]
        blamed = working or (stuck if len(stuck) == len(there) else [])
        if not blamed:
            return None
        longest = max(blamed, key=lambda rank: rank.seconds_there)
        what = "has not moved" if working else "waits, as all others do,"
        return self._about(longest, "hung", f"it {what} for {self._timeout:g} s")


async def _tell(rank: _Rank, message: dict[str, Any]) -> None:
    """Sends a message without waiting for one who does not read."""
    try:
        rank.writer.write(encode(message))
        await asyncio.wait_for(rank.writer.drain(), BEAT_SECONDS)
    except (TimeoutError, OSError):
        pass
