"""What the ranks of a case decide together: to go on with a configuration, or to leave it out, all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from lp_plugin.bench.experiment.job import LeftOutError, in_a_line
from lp_plugin.errors import LpPluginError
from lp_plugin.job.ranks import gather
from lp_plugin.measure.layers import give_back_memory
from lp_plugin.quantity import format_bytes

__all__ = ["together"]

Value = TypeVar("Value")

_WANT_OF_MEMORY = "out of memory"
"""Begins the reason that counts: other ranks only say that this one has failed."""


def together(action: Callable[[], Value], *, waits: bool = False) -> Value:
    """Does something on every rank, and finds out whether all could; collective.

    Args:
        action: What. A deliberate error must come before it waits for other ranks, or on all of those that wait.
        waits: Whether ranks may wait for each other in it. One that is out of memory then ends its process, since its
            peers would wait for ever; else all go on without what was to be done.

    Returns:
        What it gave on this rank.

    Raises:
        LeftOutError: If it failed on any rank, for want of memory or with a deliberate error.
        torch.OutOfMemoryError: On this rank, if others may be waiting.
    """
    found: list[Value] = []
    reason = ""
    try:
        found.append(action())
    except LpPluginError as error:
        reason = in_a_line(error)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if waits or not _is_want_of_memory(error):
            raise
        reason = _out_of_memory()
    reasons = gather(reason)
    if any(reasons):
        found.clear()
        give_back_memory()
        raise LeftOutError(max(reasons, key=lambda each: (each.startswith(_WANT_OF_MEMORY), len(each))))
    return found[0]


def _is_want_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _out_of_memory() -> str:
    """With the GPU's figures; the rest of torch's message is advice on fragmentation."""
    if not torch.cuda.is_available():
        return _WANT_OF_MEMORY
    free, total = torch.cuda.mem_get_info()
    return f"{_WANT_OF_MEMORY} beside the other configurations: {format_bytes(free)} of {format_bytes(total)} are free"
