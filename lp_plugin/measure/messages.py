"""Which messages of several ranks belong together, and when all who take part in one were there.

No trace names a message's peers where a CUDA graph is replayed. Each rank makes its calls in the order in which its
peers make theirs, so the k-th message of a channel is the same one on all its ranks; a channel is a boundary between
two stages, or a group that reduces. A match that no order of events allows is not believed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lp_plugin.measure.intervals import Intervals, make_intervals, union

__all__ = ["Message", "operation_of", "transfers"]

_BETWEEN_TWO = frozenset({"SendRecv", "send", "recv"})
_BROADCASTS = frozenset({"Broadcast", "broadcast"})
"""Along a pipeline; what remains is among the ranks that share layers."""
_CLOCK_NANOSECONDS = 20_000
"""Two processes' clocks may differ by so much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A rank's part in one message, from its call, or kernel, to the end."""

    operation: str
    """Of `operation_of`."""
    lane: str
    """Stream or thread."""
    start: int
    """Nanoseconds since 1970."""
    stop: int
    """Likewise."""


@dataclass(frozen=True, slots=True)
class _Channel:
    """Ranks that exchange messages in one order."""

    operation: str
    """All sends and receives are one operation, ``message``."""
    members: tuple[int, ...]
    """Of a boundary the sender and the receiver, where it is known who sends."""
    directed: bool = False
    """Whether it is."""


def operation_of(name: str) -> str:
    """``AllReduce`` or ``SendRecv`` of a kernel of NCCL's, ``all_reduce``, ``send`` or ``recv`` of Gloo's calls."""
    kernel = re.search(r"nccl\w*?Kernel_([A-Za-z]+)", name)
    return kernel[1] if kernel else name.rpartition(":")[2]


def transfers(
    messages: Mapping[int, Sequence[Message]],
    *,
    tensor_groups: Sequence[Sequence[int]],
    pipelines: Sequence[Sequence[int]],
) -> dict[int, Intervals | None]:
    """When each rank was in a message in which all its peers were, too.

    Args:
        messages: Of each rank, in order of start.
        tensor_groups: Ranks that share layers, and all-reduce together; all, for a rank in none or alone in one.
        pipelines: Ranks that send to each other, in order of stages; the last one may send to the first.

    Returns:
        Disjoint intervals for each rank, or None where a message can't be matched.
    """
    parts: dict[_Channel, dict[int, list[Message]]] = defaultdict(lambda: defaultdict(list))
    unknown: set[int] = set()
    for rank, own in messages.items():
        everyone = tuple(messages)
        lanes = list(dict.fromkeys(message.lane for message in own if message.operation in _BETWEEN_TWO))
        for message in own:
            if message.operation in _BETWEEN_TWO:
                channel = _boundary(message, rank, lanes, pipelines)
            else:
                groups = pipelines if message.operation in _BROADCASTS else tensor_groups
                members = next((tuple(group) for group in groups if rank in group and len(group) > 1), everyone)
                channel = _Channel(message.operation, everyone if message.operation == "barrier" else members)
            if channel is None:
                unknown.add(rank)
            else:
                parts[channel][rank].append(message)
    met: dict[int, list[Intervals]] = defaultdict(list)
    for channel, by_rank in parts.items():
        both = _meetings(channel, [by_rank.get(rank, []) for rank in channel.members])
        for rank in by_rank:
            if both is None:
                unknown.add(rank)
            else:
                met[rank].append(both)
    return {
        rank: None if rank in unknown else union(np.concatenate([make_intervals([]), *met[rank]])) for rank in messages
    }


def _boundary(message: Message, rank: int, lanes: Sequence[str], pipelines: Sequence[Sequence[int]]) -> _Channel | None:
    """Where a message between two ranks goes; None if that can't be told.

    Gloo says whether it sends or receives. NCCL has a stream for each group and pair of ranks: a first stage begins
    with sending on to the next one, any other with receiving from the one before. Two stages may share one stream for
    both directions; or each message has a stream of its own, in CUDA graphs: then two stages' are matched in order.
    """
    stages = next((tuple(stages) for stages in pipelines if rank in stages), ())
    last = len(stages) - 1
    if last < 1:
        return None
    stage = stages.index(rank)
    if message.operation != "SendRecv":
        sender = stage if message.operation == "send" else (stage - 1) % len(stages)
    elif last == 1 and len(lanes) != 2:
        return _Channel("message", stages)
    elif len(lanes) > 2 or (len(lanes) == 1 and 0 < stage < last):
        return None
    else:
        used = (0, last) if stage == 0 else (stage - 1, stage)
        sender = used[lanes.index(message.lane)]
    return _Channel("message", (stages[sender], stages[(sender + 1) % len(stages)]), directed=True)


def _meetings(channel: _Channel, members: Sequence[Sequence[Message]]) -> Intervals | None:
    """Per message the time in which all members were in it; None if they can't be the same messages."""
    if len({len(own) for own in members}) != 1:
        return None
    starts = np.array([[message.start for message in own] for own in members])
    stops = np.array([[message.stop for message in own] for own in members])
    if channel.directed:
        impossible = stops[1] < starts[0] - _CLOCK_NANOSECONDS  # received before it was sent
    elif channel.operation == "message" or channel.operation in _BROADCASTS:
        impossible = np.zeros(starts.shape[1], dtype=bool)
    else:
        impossible = stops.min(axis=0) < starts.max(axis=0) - _CLOCK_NANOSECONDS  # done before all had begun
    if impossible.any():
        return None
    return np.stack([starts.max(axis=0), stops.min(axis=0)], axis=1)
