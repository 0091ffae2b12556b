"""Own instructions on DeepSpeed's engine, for one schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deepspeed.runtime.pipe.schedule import PipeInstruction

__all__ = ["instructions"]


@contextlib.contextmanager
def instructions(engine: Any, table: Mapping[type[PipeInstruction], Callable[..., None]]) -> Iterator[None]:
    """Replaces the engine's instructions, on the instance and for a while.

    Args:
        engine: DeepSpeed's ``PipelineEngine``.
        table: What carries out each kind of instruction; called with the instruction's keywords alone.
    """
    before = engine.__dict__.get("_INSTRUCTION_MAP")
    engine._INSTRUCTION_MAP = {kind: _without_engine(carry_out) for kind, carry_out in table.items()}
    try:
        yield
    finally:
        if before is None:
            del engine._INSTRUCTION_MAP
        else:
            engine._INSTRUCTION_MAP = before


def _without_engine(carry_out: Callable[..., None]) -> Callable[..., None]:
    """DeepSpeed binds instructions to its engine."""

    def run(engine: Any, **keywords: Any) -> None:
        del engine
        carry_out(**keywords)

    return run
