"""Tells the watch where a rank is: every instruction of DeepSpeed's engine, and of our own schedules on it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.engine import PipelineEngine

from lp_plugin.integrations.deepspeed.config import Settings
from lp_plugin.integrations.deepspeed.finite import FiniteCheck
from lp_plugin.job.place import at, set_stage, set_step

__all__ = ["doing", "install"]

_DOING = {
    "AwaitActivation": "receive",
    "BackwardPass": "backward",
    "Decode": "decode",
    "Forward": "forward",
    "ForwardPass": "forward",
    "LoadMicroBatch": "next batch",
    "OptimizerStep": "optimizer",
    "Prefill": "prefill",
    "ReceiveActivation": "receive",
    "ReceiveTokens": "receive",
    "RecvActivation": "receive",
    "RecvGrad": "receive",
    "ReduceGrads": "reduce",
    "ReduceTiedGrads": "reduce",
    "SendActivation": "send",
    "SendGrad": "send",
    "SendTokens": "send",
    "StartReceiving": "receive",
}


def doing(instruction: type[Any]) -> str:
    """What `lp_plugin.job.place` calls an instruction."""
    return _DOING.get(instruction.__name__, instruction.__name__)


def install(settings_of: Callable[[PipelineModule], Settings]) -> None:
    """Makes all pipeline engines tell, and check what they are asked to; a second call changes nothing.

    Args:
        settings_of: The settings that apply to a module.
    """
    run_schedule = PipelineEngine._exec_schedule
    if hasattr(run_schedule, "of_lp_plugin"):
        return

    @functools.wraps(run_schedule)
    def _exec_schedule(self: PipelineEngine, pipe_schedule: Any) -> None:
        set_stage(self.stage_id)
        if self.module.training:
            set_step(self.global_steps)
        self.lp_counts = Counter()
        if "lp_finite" not in self.__dict__:
            self.lp_finite = FiniteCheck(self) if settings_of(self.module).section.check_finite else None
        run_schedule(self, pipe_schedule)
        at("")
        if self.lp_finite is not None:
            self.lp_finite.verify()

    _exec_schedule.of_lp_plugin = True  # type: ignore[attr-defined]
    PipelineEngine._exec_schedule = _exec_schedule
    PipelineEngine._INSTRUCTION_MAP = {
        kind: _telling(kind, carry_out) for kind, carry_out in PipelineEngine._INSTRUCTION_MAP.items()
    }


def _telling(kind: type[Any], carry_out: Callable[..., None]) -> Callable[..., None]:
    """An instruction that says so first; the engine counts buffers, so micro-batches are counted here."""
    what = doing(kind)

    @functools.wraps(carry_out)
    def run(self: PipelineEngine, *args: Any, **keywords: Any) -> None:
        counts = self.__dict__.setdefault("lp_counts", Counter())
        at(what, counts[kind] if "buffer_id" in keywords else None)
        counts[kind] += 1
        carry_out(self, *args, **keywords)

    return run
