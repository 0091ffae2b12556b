"""What ends a job before its time, and what ranks know of one another."""

from __future__ import annotations

import platform
import socket
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from lp_plugin._version import __version__

__all__ = ["Kind", "Peer", "Verdict", "own_machine", "own_versions"]

Kind = Literal["died", "hung", "failed", "interrupted", "missing", "other versions"]

_COMPARED = ("torch", "deepspeed", "transformers", "numpy")
"""Packages that have to be the same on all hosts, beside this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A rank as the others know it."""

    rank: int
    """Number in the job."""
    host: str
    """Name of its host."""
    machine: str
    """Host and process namespace: where they are equal, ``pid`` means the same process."""
    pid: int
    """Of its process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why all ranks end."""

    kind: Kind
    """``died``: the process is gone; ``hung``: nothing was heard of it, or it has not moved; ``failed``: it says so."""
    peer: Peer
    """The rank at fault."""
    place: str
    """Where it was, as far as known."""
    text: str = ""
    """What it said, or how long it has been silent."""

    def __str__(self) -> str:
        """One line."""
        who = f"rank {self.peer.rank} on {self.peer.host} ({self.place})"
        if self.kind == "died":
            return f"{who} died."
        if self.kind == "hung":
            return f"{who} hung: {self.text}."
        return f"rank {self.peer.rank} on {self.peer.host}{':' if self.kind == 'failed' else ''} {self.text}"

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> Verdict:
        """Of ``dataclasses.asdict``."""
        return cls(**message | {"peer": Peer(**message["peer"])})


def own_machine() -> str:
    """Names what process numbers are good for."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}"


def own_versions() -> dict[str, str]:
    """Versions that have to be the same in all ranks, by name."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "lp_plugin": __version__}
    for name in _COMPARED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found
