"""Whether what crosses a boundary between stages is finite: an optional check, named stage and micro-batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule

from lp_plugin.errors import NotFiniteError
from lp_plugin.job.place import here

__all__ = ["FiniteCheck"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Noted:
    """The largest magnitudes of a pass's input and output: not finite if any of their values is not."""

    what: str
    micro_batch: int
    before: torch.Tensor | None
    after: torch.Tensor


class FiniteCheck:
    """Watches what an engine's passes take and give.

    One reduction over each activation (and gradient) on its device; nothing waits for the device until `verify`, which
    reads all at once: before the optimizer's step, and after every other schedule. With dynamic loss scaling gradients
    may overflow, and are not looked at.

    Args:
        engine: DeepSpeed's ``PipelineEngine``; its instructions are wrapped, on the instance.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._noted: list[_Noted] = []
        table = dict(engine._INSTRUCTION_MAP)
        table[schedule.ForwardPass] = self._around(table[schedule.ForwardPass], "output", _forward_values)
        if not engine.fp16_enabled():
            table[schedule.BackwardPass] = self._around(table[schedule.BackwardPass], "gradient", _backward_values)
        table[schedule.OptimizerStep] = self._before(table[schedule.OptimizerStep])
        engine._INSTRUCTION_MAP = table

    def verify(self) -> None:
        """Looks at what has been noted since the last call.

        Raises:
            NotFiniteError: If a pass of this stage made values that are not finite of ones that were; says which.
        """
        noted, self._noted = self._noted, []
        if not noted:
            return
        nothing = torch.zeros((), device=self._engine.device)
        pairs = [(nothing if each.before is None else each.before, each.after) for each in noted]
        found = torch.stack([value.float() for pair in pairs for value in pair]).cpu().view(-1, 2).tolist()
        for each, (before, after) in zip(noted, found, strict=True):
            if math.isfinite(before) and not math.isfinite(after):
                raise NotFiniteError(
                    f"the {each.what} of stage {self._engine.stage_id} for micro-batch {each.micro_batch} of step "
                    f"{here().step} is not finite ({after}), though its input is: the model overflows in this "
                    "precision, or its weights hold such values. Try float32 or bfloat16, or a lower learning rate."
                )

    def _around(
        self, carry_out: Callable[..., None], what: str, values: Callable[[Any, int, bool], Any]
    ) -> Callable[..., None]:
        @functools.wraps(carry_out)
        def run(engine: Any, buffer_id: int) -> None:
            with torch.no_grad():
                before = _largest(values(engine, buffer_id, False))
            carry_out(engine, buffer_id=buffer_id)
            with torch.no_grad():
                after = _largest(values(engine, buffer_id, True))
            if after is not None:
                number = sum(each.what == what for each in self._noted)
                self._noted.append(_Noted(what=what, micro_batch=number, before=before, after=after))

        return run

    def _before(self, carry_out: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(carry_out)
        def run(engine: Any, **keywords: Any) -> None:
            self.verify()
            carry_out(engine, **keywords)

        return run


def _forward_values(engine: Any, buffer_id: int, after: bool) -> Any:
    """A stage's input; its output, or, of the last stage, the loss."""
    if not after:
        return engine.pipe_buffers["inputs"][buffer_id]
    return engine.loss if engine.is_last_stage() else engine.pipe_buffers["outputs"][buffer_id]


def _backward_values(engine: Any, buffer_id: int, after: bool) -> Any:
    """The gradient that came from the next stage; the one that goes to the stage before."""
    if not after:
        return None if engine.is_last_stage() else engine.grad_layer
    inputs = engine.pipe_buffers["inputs"][buffer_id]
    return [each.grad for each in (inputs if isinstance(inputs, tuple) else (inputs,)) if each is not None]


def _largest(value: Any) -> torch.Tensor | None:
    """Largest magnitude of all floating-point values, on their device; None if there are none."""
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    found = [
        torch.linalg.vector_norm(each.detach(), math.inf)
        for each in tensors
        if isinstance(each, torch.Tensor) and each.is_floating_point() and each.numel()
    ]
    return torch.stack(found).amax() if len(found) > 1 else found[0] if found else None
