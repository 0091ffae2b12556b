"""What one stage does in a call: the instructions of the schedule, carried out on the slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.pipe.schedule import PipeInstruction

from lp_plugin.errors import NotFiniteError, RuntimeEnvironmentError
from lp_plugin.integrations.deepspeed.generation import schedule
from lp_plugin.integrations.deepspeed.generation.choosing import BROKEN
from lp_plugin.integrations.deepspeed.generation.results import Results
from lp_plugin.integrations.deepspeed.generation.slots import Group, Pass, Turn
from lp_plugin.integrations.deepspeed.generation.station import Station
from lp_plugin.job.watch.watch import await_verdict
from lp_plugin.quantity import listed

__all__ = ["Passes", "Work"]

_SHOWN = 8
"""Prompts in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a call is to do; the same on all ranks of the pipeline."""

    prompts: Sequence[Sequence[int]]
    """Token ids of each prompt."""
    seeds: Sequence[int]
    """Of each prompt."""
    indices: Sequence[int]
    """What errors call each prompt."""
    groups: tuple[Group, ...]
    """The prompts, shared out."""
    rows: int
    """Rows of a slot."""


class Passes:
    """One call on one rank.

    Nothing here waits for the device, but for a slot's flag (and on the first stage its tokens) of one turn ago.

    Args:
        station: Slots prepared for this call.
        work: What to do.
        results: Where tokens go that come back to the first stage.
    """

    def __init__(self, station: Station, work: Work, results: Results) -> None:
        self._station = station
        self._work = work
        self._results = results
        self._sending: dict[int, tuple[Any, torch.Tensor]] = {}
        """Slot -> what it sent last; the tensor is not to be reused before the sending has ended."""
        self._prompts: torch.Tensor | None = None
        """The activation of a group's prompts, received for the prefill that follows at once."""
        self._outgoing: torch.Tensor | None = None
        """What the pass just run hands on."""

    def instructions(self) -> dict[type[PipeInstruction], Callable[[Turn], None]]:
        """What carries out each kind of instruction."""
        return {
            schedule.ReceiveTokens: self._receive_tokens,
            schedule.ReceiveActivation: self._receive_activation,
            schedule.Prefill: self._prefill,
            schedule.Decode: self._decode,
            schedule.SendActivation: self._send_activation,
            schedule.SendTokens: self._send_tokens,
        }

    def arrived(self, turn: Turn) -> bool:
        """For `take_turns`: reads what a turn brought in; on the first stage its tokens become results."""
        if turn.returns is None:
            return False
        letter = self._station.letters[turn.slot]
        if self._station.ring.is_first:
            *tokens, flag = letter.read()
            ended = self._ended(flag, turn.slot, turn.returns)
            self._results.add(self._work.groups[turn.returns.group], tokens)
            return ended
        if turn.run is None or turn.run.number == 1:
            return False
        (flag,) = letter.read()
        return self._ended(flag, turn.slot, turn.returns)

    def finish(self) -> None:
        """Waits until everything sent has left."""
        for slot in tuple(self._sending):
            self._wait_until_sent(slot)

    def _receive_tokens(self, turn: Turn) -> None:
        received = self._station.slots[turn.slot].received
        if not self._station.ring.is_last:
            self._station.ring.receive_tokens(received)
        self._station.letters[turn.slot].write(received)

    def _receive_activation(self, turn: Turn) -> None:
        station = self._station
        if _run(turn).number == 1:
            shape = (self._work.rows, self._group(turn).tokens, station.widths[0])
            self._prompts = torch.empty(shape, dtype=station.dtype, device=station.device)
            station.ring.receive_activation(self._prompts)
        else:
            received = station.slots[turn.slot].received
            station.ring.receive_activation(received)
            station.letters[turn.slot].write(received[-1:])

    def _prefill(self, turn: Turn) -> None:
        self._wait_until_sent(turn.slot)
        slot = self._station.slots[turn.slot]
        group = self._group(turn)
        ids, lengths = self._padded(group)
        if slot.chooser is not None:
            seeds = [self._work.seeds[prompt] for prompt in group.prompts]
            slot.chooser.begin(ids, [len(self._work.prompts[prompt]) for prompt in group.prompts], seeds)
        outputs = slot.prefill(ids if self._prompts is None else self._prompts, lengths)
        self._prompts = None
        if slot.chooser is None:
            self._outgoing = outputs.contiguous()
        elif slot.chooser.is_plain:
            slot.chooser.take_likeliest(outputs)
        else:
            slot.chooser.choose(outputs)

    def _decode(self, turn: Turn) -> None:
        self._wait_until_sent(turn.slot)
        slot = self._station.slots[turn.slot]
        logits = slot.decode()
        if slot.chooser is not None and logits is not None:
            slot.chooser.choose(logits)
        self._outgoing = slot.made

    def _send_activation(self, turn: Turn) -> None:
        if self._outgoing is not None:
            self._sending[turn.slot] = (self._station.ring.send_activation(self._outgoing), self._outgoing)
        self._outgoing = None

    def _send_tokens(self, turn: Turn) -> None:
        ring, tokens = self._station.ring, self._station.slots[turn.slot].made
        if not ring.is_first:
            self._sending[turn.slot] = (ring.send_tokens(tokens), tokens)

    def _wait_until_sent(self, slot: int) -> None:
        work, _ = self._sending.pop(slot, (None, None))
        if work is not None:
            work.wait()

    def _ended(self, flag: float, slot: int, done: Pass) -> bool:
        """Whether all rows of a slot have ended, from its flag."""
        if flag < BROKEN:
            return bool(flag)
        prompts = self._work.groups[done.group].prompts
        numbers = listed([self._work.indices[prompt] for prompt in prompts], _SHOWN)
        remedy = "the model overflows in this precision, or its weights hold such values. Try float32 or bfloat16."
        if self._station.breaks(slot):
            raise NotFiniteError(
                f"the output of stage {self._station.ring.stage} is not finite for prompts {numbers}, though its input "
                f"is: {remedy}"
            )
        await_verdict()  # the stage that it is says so
        raise RuntimeEnvironmentError(f"the model's logits are not numbers (nan) for prompts {numbers}: {remedy}")

    def _group(self, turn: Turn) -> Group:
        return self._work.groups[_run(turn).group]

    def _padded(self, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [rows, tokens], padded on the left, and lengths [rows]; rows left over get one token."""
        rows = [[0] * (group.tokens - len(ids)) + list(ids) for ids in (self._work.prompts[p] for p in group.prompts)]
        rows += [[0] * group.tokens] * (self._work.rows - len(rows))
        lengths = [len(self._work.prompts[prompt]) for prompt in group.prompts]
        lengths += [1] * (self._work.rows - len(lengths))
        both = torch.tensor([[length, *row] for length, row in zip(lengths, rows, strict=True)])
        if self._station.device.type == "cuda":
            both = both.pin_memory().to(self._station.device, non_blocking=True)
        return both[:, 1:], both[:, 0]


def _run(turn: Turn) -> Pass:
    if turn.run is None:
        raise RuntimeError(f"slot {turn.slot} has no pass to run in this turn")
    return turn.run
