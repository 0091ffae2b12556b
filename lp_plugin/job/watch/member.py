"""Every rank's part of the watch: gives signs of life to the hub, and hears from it when the job has to end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

from lp_plugin.job.place import here, seconds_here
from lp_plugin.job.watch.hub import BEAT_SECONDS, LINE_BYTES, encode
from lp_plugin.job.watch.meeting import Meeting
from lp_plugin.job.watch.verdict import Peer, Verdict

__all__ = ["Member"]

_ROSTER_BYTES = 1 << 24
"""Longest message of the hub: all ranks of a large job."""


class Member:
    """A rank's connection to the hub.

    Args:
        peer: This rank.
        met: Rank 0, and the connection to it.
        versions: Of this rank's packages.
        timeout_seconds: How long the hub may be silent.
        on_verdict: Called when the job has to end; it does not return if this process does.
        on_roster: Called with all ranks once all have come.
    """

    def __init__(
        self,
        peer: Peer,
        met: Meeting,
        versions: dict[str, str],
        timeout_seconds: float,
        *,
        on_verdict: Callable[[Verdict], None],
        on_roster: Callable[[tuple[Peer, ...]], None],
    ) -> None:
        self._peer, self._met, self._versions = peer, met, versions
        self._timeout = timeout_seconds
        self._on_verdict, self._on_roster = on_verdict, on_roster
        self._writer: asyncio.StreamWriter | None = None
        self._parts = False
        self._heard = time.monotonic()
        self._hubs_place = "start"
        self._first: asyncio.Future[bool] | None = None

    async def run(self) -> None:
        """From hello to goodbye; returns when the hub has left, or this rank has."""
        reader, self._writer = await asyncio.open_connection(sock=self._met.connection, limit=_ROSTER_BYTES)
        hello = {"token": self._met.token, "peer": asdict(self._peer), "versions": self._versions}
        self._writer.write(encode(hello))
        beats = asyncio.create_task(self._beat())
        try:
            if not await self._hear(reader):
                self._lost("died", "")
        finally:
            beats.cancel()

    @property
    def sockets(self) -> list[Any]:
        """Of its connection."""
        return [] if self._writer is None else [self._writer.get_extra_info("socket")]

    async def report(self, kind: str, text: str) -> bool:
        """Tells the hub that this rank ends; whether it is the first one of the job that does."""
        if self._writer is None:
            return True
        self._first = asyncio.get_running_loop().create_future()
        cut = text.encode()[: LINE_BYTES // 8].decode(errors="ignore")  # JSON may make six bytes of one
        self._writer.write(encode({"report": kind, "text": cut}))
        await self._writer.drain()
        return await self._first

    async def part(self) -> None:
        """Says goodbye."""
        if self._writer is not None:
            self._parts = True
            self._writer.write(encode({"bye": True}))
            with contextlib.suppress(OSError):
                await self._writer.drain()
            self._writer.close()

    async def _hear(self, reader: asyncio.StreamReader) -> bool:
        """Takes messages; whether the connection ended with a goodbye."""
        try:
            while line := await reader.readline():
                self._heard = time.monotonic()
                message = json.loads(line)
                if "beat" in message:
                    self._hubs_place = str(message["beat"])
                elif "roster" in message:
                    self._timeout = float(message["timeout"])
                    self._on_roster(tuple(Peer(**each) for each in message["roster"]))
                elif "first" in message and self._first is not None:
                    self._first.set_result(bool(message["first"]))
                elif "verdict" in message:
                    self._on_verdict(Verdict.from_json(message["verdict"]))
                elif "bye" in message:
                    return True
        except OSError:
            pass  # as if it had gone
        return self._parts

    async def _beat(self) -> None:
        """Gives signs of life, and looks for the hub's."""
        while self._writer is not None:
            self._writer.write(encode({"place": asdict(here()), "seconds": seconds_here()}))
            await asyncio.sleep(BEAT_SECONDS)
            if time.monotonic() - self._heard > self._timeout:
                self._lost("hung", f"no sign of life for {self._timeout:g} s")

    def _lost(self, kind: Literal["died", "hung"], text: str) -> None:
        """Rank 0 is gone."""
        self._on_verdict(Verdict(kind=kind, peer=self._met.hub, place=self._hubs_place, text=text))
