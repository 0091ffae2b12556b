"""How the ranks of a job find rank 0's hub: through the launcher's key-value store."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch

from lp_plugin.errors import RuntimeEnvironmentError
from lp_plugin.job.watch.hub import START_SECONDS
from lp_plugin.job.watch.verdict import Peer

__all__ = ["Meeting", "meet"]

_KEY = "lp_plugin/watch"
_OF_RANKS = ("lp_plugin/", "default_pg/")
"""What keys begin with that ranks set: this package's, and torch's process groups'."""
_AGAIN_SECONDS = 0.1
"""Between two attempts to reach rank 0."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """A rank that has found rank 0."""

    hub: Peer
    """Rank 0."""
    token: str
    """Of the job's ranks alone."""
    connection: socket.socket
    """To the hub."""
    listening: socket.socket | None
    """Where the hub takes connections; rank 0's."""
    store: Any
    """The launcher's; rank 0 may hold it for all."""


def meet(own: Peer, world: int, timeout_seconds: float) -> Meeting:
    """Waits for rank 0 and connects to it; MASTER_ADDR and MASTER_PORT are set.

    torchrun keeps its store when it starts ranks again, with all that the ranks before have left there: rank 0 clears
    that away, and the others may have to look twice.

    Args:
        own: This rank.
        world: Ranks of the job.
        timeout_seconds: To wait at least, if it is more than a minute.

    Raises:
        RuntimeEnvironmentError: If rank 0 is not there in time, or can't be reached.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    allowed = max(timeout_seconds, START_SECONDS)
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = torch.distributed.TCPStore(
            address,
            port,
            world,
            is_master=own.rank == 0 and not kept,
            timeout=timedelta(seconds=allowed),
            wait_for_workers=False,
            multi_tenant=True,
        )
        if own.rank == 0:
            return _receive(own, address, store)
        return _find(address, store, again=kept)
    except (RuntimeError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise RuntimeEnvironmentError(
            f"rank {own.rank} on {own.host} can't reach rank 0 at {address}:{port} within "
            f"{allowed:g} s: {reason}; check that all ranks were started, and MASTER_ADDR."
        ) from None


def _receive(own: Peer, address: str, store: Any) -> Meeting:
    """Rank 0's side."""
    for key in store.list_keys():
        if key.startswith(_OF_RANKS):
            store.delete_key(key)
    listening, token = _listen(address), secrets.token_hex(16)
    port = int(listening.getsockname()[1])
    store.set(_KEY, json.dumps({"port": port, "token": token, "hub": asdict(own)}))
    connection = socket.create_connection((address, port))
    return Meeting(hub=own, token=token, connection=connection, listening=listening, store=store)


def _find(address: str, store: Any, *, again: bool) -> Meeting:
    """Every other rank's; ``again`` if what is found may be of an earlier start, whose port is closed."""
    until = time.monotonic() + START_SECONDS
    while True:
        found = json.loads(store.get(_KEY))
        port = int(found["port"])
        try:
            connection = socket.create_connection((address, port), timeout=START_SECONDS)
        except OSError as error:
            if not again or time.monotonic() > until:
                raise OSError(f"its port {port} does not answer ({error.strerror or error})") from None
            time.sleep(_AGAIN_SECONDS)
            continue
        hub = Peer(**found["hub"])
        return Meeting(hub=hub, token=str(found["token"]), connection=connection, listening=None, store=store)


def _listen(address: str) -> socket.socket:
    """A port of rank 0's own address; of all addresses if that is another machine's name for it."""
    for host in (address, ""):
        with contextlib.suppress(OSError):
            family = socket.getaddrinfo(host or "0.0.0.0", None)[0][0]  # noqa: S104
            return socket.create_server((host, 0), family=family)
    raise OSError("no port to listen on")
