"""Where a rank is: its stage, the step, and what it does there.

Told by the code that runs a stage, read by the thread that watches over the job (`lp_plugin.job.watch`). One process
is one rank, so there is one place per process.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

__all__ = ["Place", "at", "here", "seconds_here", "set_stage", "set_step"]

WAITING = frozenset({"agree", "drain", "init", "receive", "reduce", "send", "start"})
"""What a rank does while it waits for others; not its fault if it takes long."""
UNTIMED = frozenset({"", "load", "prepare", "time layers"})
"""What may take as long as it takes: reading files, tokenizing, a script's own code between steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank's place."""

    stage: int | None = None
    """Stage of the pipeline; None before it is known."""
    step: int | None = None
    """Step of the job, from 0; None outside of steps."""
    doing: str = ""
    """Such as ``forward`` or ``receive``; empty in a script's own code."""
    micro_batch: int | None = None
    """Micro-batch of the step, from 0; None if it is not about one."""

    def __str__(self) -> str:
        """Such as ``stage 1, step 17, forward of micro-batch 3``."""
        parts = [] if self.stage is None else [f"stage {self.stage}"]
        if self.step is not None:
            parts.append(f"step {self.step}")
        what = self.doing or "its own code"
        parts.append(what if self.micro_batch is None else f"{what} of micro-batch {self.micro_batch}")
        return ", ".join(parts)


class _Whereabouts:
    """The process's place; each change is one assignment, so that a reading thread never sees half of one."""

    def __init__(self) -> None:
        self.stage: int | None = None
        self.step: int | None = None
        self.now: tuple[int | None, int | None, str, int | None, float] = (None, None, "", None, time.monotonic())


_whereabouts = _Whereabouts()


def set_stage(stage: int) -> None:
    """From now on the process holds this stage."""
    _whereabouts.stage = stage


def set_step(step: int | None) -> None:
    """A step begins; None: the steps are over."""
    _whereabouts.step = step


def at(doing: str, micro_batch: int | None = None) -> None:
    """The process begins something; called for every instruction, so it does next to nothing."""
    mine = _whereabouts
    mine.now = (mine.stage, mine.step, doing, micro_batch, time.monotonic())


def here() -> Place:
    """Where the process is."""
    stage, step, doing, micro_batch, _ = _whereabouts.now
    return Place(stage=stage, step=step, doing=doing, micro_batch=micro_batch)


def seconds_here() -> float:
    """Since the process began what it does."""
    return time.monotonic() - _whereabouts.now[-1]
