"""Which prompts sit in which slot, and whose turn it is: the bookkeeping that all ranks do alike; no tensors.

A slot is a micro-batch that circles the ring of stages, with a KV cache of its own on every stage. The prompts that
share it from prefill until all of them are done are a group; then the slot takes the next group. Slots take turns
0, 1, ..., M - 1, 0, 1, ...; in a turn, a stage makes one pass of the slot: the prefill, then a decode pass per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Group", "Pass", "Turn", "make_groups", "take_turns"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Prompts that occupy a slot together."""

    prompts: tuple[int, ...]
    """Their positions in the call's list; at most as many as a slot has rows."""
    tokens: int
    """Tokens of the longest; the others are padded on the left to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One way of a group through all stages; it ends with one new token per row."""

    group: int
    """Number of the group."""
    number: int
    """Tokens per row that are made when it ends: 1 after the prefill, then one more per decode pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a slot does when it is its turn."""

    slot: int
    """Number of the slot."""
    run: Pass | None
    """The pass that each stage makes; None if no group is left, so that the slot only hands in its last tokens."""
    returns: Pass | None
    """The slot's pass before, whose tokens now come back to the first stage; None in the slot's first turn."""


def make_groups(lengths: Sequence[int], rows: int) -> tuple[Group, ...]:
    """Cuts the prompts, longest first, into groups, so that prompts of about the same length are padded together.

    Args:
        lengths: Tokens of each prompt.
        rows: Prompts per group; the last group may have fewer.
    """
    order = sorted(range(len(lengths)), key=lambda prompt: -lengths[prompt])
    runs = [tuple(order[start : start + rows]) for start in range(0, len(order), rows)]
    return tuple(Group(prompts=run, tokens=lengths[run[0]]) for run in runs)


def take_turns(num_groups: int, num_slots: int, max_passes: int, arrived: Callable[[Turn], bool]) -> Iterator[Turn]:
    """All turns of a call, in the order that every stage runs them.

    A group leaves its slot after ``max_passes`` passes, or once it is known that all its rows had ended before its
    latest pass. That is known one turn late: what a turn brings to a stage is read before the slot's next turn, when
    the device has long gone on, so that nobody waits for it. An early end so costs one pass whose tokens are dropped.

    Args:
        num_groups: Groups to work off, in order.
        num_slots: Slots; no more are used than there are groups.
        max_passes: Passes of a group, the prefill among them.
        arrived: Called once per turn, just before the slot's next one is decided: whether all rows had ended with
            ``turn.returns``. Must be the same on all ranks; its value matters for turns with ``number > 1`` only.

    Yields:
        Turns; the next one is decided when it is asked for.
    """
    waiting = deque(range(num_groups))
    ring = deque(
        Turn(slot=slot, run=Pass(group=waiting.popleft(), number=1), returns=None)
        for slot in range(min(num_slots, num_groups))
    )
    yield from tuple(ring)
    while ring:
        last = ring.popleft()
        ended = arrived(last)
        if last.run is None:
            continue
        run: Pass | None = None
        if last.run.number < max_passes and not (ended and last.run.number > 1):
            run = Pass(group=last.run.group, number=last.run.number + 1)
        elif waiting:
            run = Pass(group=waiting.popleft(), number=1)
        ring.append(Turn(slot=last.slot, run=run, returns=last.run))
        yield ring[-1]
