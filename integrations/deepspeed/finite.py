"""Whether what crosses a boundary between stages is finite: an optional check, named stage and micro-batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule

from lp_plugin.errors import NotFiniteError
from lp_plugin.job.place import here

__all__ = ["FiniteCheck"]


_FIRST_ROOM = 64
"""Passes that there is room for at first."""


class FiniteCheck:
    """Watches what an engine's passes take and give.

    One reduction over each activation (and gradient) on its device, nothing else: the device is waited for in `verify`
    alone, at the end of a batch, where DeepSpeed hands on the loss. With dynamic loss scaling gradients may overflow,
    and are not looked at.

    Args:
        engine: DeepSpeed's ``PipelineEngine``; its instructions are wrapped, on the instance.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._passes: list[tuple[str, int | None]] = []
        """Of this batch: what each made, and of which micro-batch."""
        self._largest = torch.zeros((_FIRST_ROOM, 2), device=engine.device)
        """Largest magnitudes that each took and made: not finite if any of its values is not."""
        table = dict(engine._INSTRUCTION_MAP)
        table[schedule.ForwardPass] = self._around(table[schedule.ForwardPass], "output", _forward_values)
        if not engine.fp16_enabled():
            table[schedule.BackwardPass] = self._around(table[schedule.BackwardPass], "gradient", _backward_values)
        engine._INSTRUCTION_MAP = table

    def verify(self) -> None:
        """Looks at what has been noted since the last call.

        Raises:
            NotFiniteError: If a pass of this stage made values that are not finite of ones that were; says which.
        """
        passes, self._passes = self._passes, []
        found = self._largest[: len(passes)].tolist()
        self._largest.zero_()
        for (what, micro_batch), (before, after) in zip(passes, found, strict=True):
            if math.isfinite(before) and not math.isfinite(after):
                raise NotFiniteError(
                    f"the {what} of stage {self._engine.stage_id} for micro-batch {micro_batch} of step "
                    f"{here().step} is not finite ({after}), though its input is: the model overflows in this "
                    "precision, or its weights hold such values. Try float32 or bfloat16, or a lower learning rate."
                )

    def _around(
        self, carry_out: Callable[..., None], what: str, values: Callable[[Any, int, bool], Any]
    ) -> Callable[..., None]:
        @functools.wraps(carry_out)
        def run(engine: Any, buffer_id: int) -> None:
            number = len(self._passes)
            if number == len(self._largest):
                self._largest = torch.cat([self._largest, torch.zeros_like(self._largest)])
            _note(values(engine, buffer_id, False), self._largest[number, 0])
            carry_out(engine, buffer_id=buffer_id)
            _note(values(engine, buffer_id, True), self._largest[number, 1])
            self._passes.append((what, here().micro_batch))  # which the instruction has just told

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


def _note(value: Any, largest: torch.Tensor) -> None:
    """Writes the largest magnitude of all floating-point values, if there are any."""
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    floating = [
        each for each in tensors if isinstance(each, torch.Tensor) and each.is_floating_point() and each.numel()
    ]
    with torch.no_grad():
        for number, each in enumerate(floating):
            if number == 0 and each.dtype != torch.float64:
                torch.linalg.vector_norm(each.detach(), math.inf, dtype=torch.float32, out=largest)
            else:
                norm = torch.linalg.vector_norm(each.detach(), math.inf).float()
                largest.copy_(torch.maximum(largest, norm))
