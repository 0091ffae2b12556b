"""Ports for processes that tests start."""

import contextlib
import random
import socket


def free_port() -> int:
    """A port that nothing listens on, and that no connection made meanwhile gets: the system's own lie above."""
    for port in random.SystemRandom().sample(range(20_000, 29_000), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
    raise OSError("100 ports are all in use")
