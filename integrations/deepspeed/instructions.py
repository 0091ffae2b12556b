"""Own instructions on DeepSpeed's engine, for one schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deepspeed.runtime.pipe.schedule import PipeInstruction

from lp_plugin.integrations.deepspeed.places import doing
from lp_plugin.job.place import at, set_step

__all__ = ["instructions"]


@contextlib.contextmanager
def instructions(engine: Any, table: Mapping[type[PipeInstruction], Callable[..., None]]) -> Iterator[None]:
    """Replaces the engine's instructions, on the instance and for a while.

    Args:
        engine: DeepSpeed's ``PipelineEngine``.
        table: What carries out each kind of instruction; called with the instruction's keywords alone.
    """
    before = engine.__dict__.get("_INSTRUCTION_MAP")
    engine._INSTRUCTION_MAP = {kind: _without_engine(doing(kind), carry_out) for kind, carry_out in table.items()}
    try:
        yield
    finally:
        if before is None:
            del engine._INSTRUCTION_MAP
        else:
            engine._INSTRUCTION_MAP = before


def _without_engine(what: str, carry_out: Callable[..., None]) -> Callable[..., None]:
    """DeepSpeed binds instructions to its engine; the watch is told what the rank begins."""

    def run(engine: Any, **keywords: Any) -> None:
        del engine
        turn = keywords.get("turn")
        if turn is not None and turn.run is not None:
            set_step(turn.run.number)
        at(what, keywords.get("micro_batch") if turn is None else turn.slot)
        carry_out(**keywords)

    return run
