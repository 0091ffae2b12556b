"""The most memory that a part of a program holds at once, as the allocator knows it."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch._C._profiler import _EventType

__all__ = ["PeakMemory"]

_MARK = "lp_plugin: the part that counts"


class PeakMemory:
    """Counts tensors' bytes inside, on this process's GPU if there is one, else on the CPU.

    On a GPU it is the caching allocator's own count, and what was there before is part of it. On the CPU, where
    nobody counts, the profiler records every allocation: what is to be counted has to be made inside.

    Example::

        with PeakMemory() as peak:
            engine = ...
            engine.train_batch(batches)
            peak.start()
            engine.train_batch(batches)
        print(peak.num_bytes)
    """

    def __init__(self) -> None:
        self._profile: Any = None
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """The most bytes at once, from `start` (if it was called) to the end."""
        return self._num_bytes

    def start(self) -> None:
        """Forgets the peak so far: what is held now, and what comes, counts."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            with torch.profiler.record_function(_MARK):
                pass

    def __enter__(self) -> Self:
        if torch.cuda.is_available():
            self.start()
        else:
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            )
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is None:
            torch.cuda.synchronize()
            self._num_bytes = torch.cuda.max_memory_allocated()
            return
        self._profile.__exit__(kind, error, trace)
        if error is None:
            self._num_bytes = _largest_sum(self._profile.profiler.kineto_results.experimental_event_tree())
        self._profile = None


def _largest_sum(roots: list[Any]) -> int:
    """Of the bytes that were allocated and not yet freed, at any time after the last mark.

    What is freed without having been allocated inside is of before, and passed over.
    """
    changes, since, nodes = [], 0, list(roots)
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children)
        if node.tag == _EventType.Allocation:
            changes.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
        elif node.name == _MARK:
            since = max(since, node.start_time_ns)
    alive: dict[int, int] = {}
    held = most = 0
    for nanoseconds, address, num_bytes in sorted(changes, key=lambda change: change[0]):
        held -= alive.pop(address, 0)
        if num_bytes > 0:
            alive[address] = num_bytes
            held += num_bytes
        if nanoseconds >= since:
            most = max(most, held)
    return most
