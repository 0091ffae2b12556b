"""What a rank keeps from one call to the next: its neighbours, and the slots with their caches and graphs."""

from __future__ import annotations

from typing import Any

import torch

from lp_plugin.integrations.deepspeed.generation.choosing import Chooser
from lp_plugin.integrations.deepspeed.generation.lean import LeanPass
from lp_plugin.integrations.deepspeed.generation.ring import Ring, find_widths
from lp_plugin.integrations.deepspeed.generation.sampling import Sampling
from lp_plugin.integrations.deepspeed.generation.slot_state import SlotState

__all__ = ["Letter", "Station"]


class Letter:
    """A few numbers on their way from the device to the host: written in stream order, read later.

    Args:
        like: What will be written has this shape and type.
    """

    def __init__(self, like: torch.Tensor) -> None:
        on_gpu = like.is_cuda
        self._host = torch.empty(like.shape, dtype=like.dtype, pin_memory=on_gpu)
        self._written = torch.cuda.Event() if on_gpu else None

    def write(self, values: torch.Tensor) -> None:
        """Starts the copy; the host goes on at once."""
        self._host.copy_(values, non_blocking=True)
        if self._written is not None:
            self._written.record()

    def read(self) -> list[Any]:
        """What was written last, once it is there."""
        if self._written is not None:
            self._written.synchronize()
        return list(self._host.tolist())


class Station:
    """A rank's part of the ring. Making one is collective over the ranks of the pipeline.

    Args:
        engine: DeepSpeed's ``PipelineEngine`` over an ``HFPipelineModule``.

    Attributes:
        ring: The neighbours.
        stage: The ``DecoderStage``.
        device: Where it is.
        dtype: Of activations.
        widths: Elements per token of what comes in and of what goes out; what the ends don't have is 0.
        slots: Slots made so far.
        letters: Of each slot, for what its turns bring in.
    """

    def __init__(self, engine: Any) -> None:
        self.ring = Ring(engine.grid)
        self.stage = engine.module.stage
        self.device = torch.device(engine.device)
        self.dtype: torch.dtype = engine.module.torch_dtype
        self.widths = find_widths(self.ring, self.stage, self.device, self.dtype)
        self.slots: list[SlotState] = []
        self.letters: list[Letter] = []
        self._kind: tuple[Any, ...] = ()
        self._lean = LeanPass(self.stage.model)

    def prepare(self, sampling: Sampling, *, rows: int, length: int, num_slots: int, compiled: bool) -> None:
        """Makes the slots of a call, unless those of the calls before fit.

        Args:
            sampling: How tokens are chosen.
            rows: Rows of a slot.
            length: Tokens per row that a cache holds.
            num_slots: Slots that will be used.
            compiled: Whether decode passes are compiled, where they are captured.
        """
        kind = (rows, length, sampling.plain, sampling.ends, sampling.padding, sampling.min_new_tokens, compiled)
        if kind != self._kind:
            self.release()
            self._kind = kind
        for slot in self.slots:
            if slot.chooser is not None:
                slot.chooser.use(sampling)
        while len(self.slots) < num_slots:
            slot = self._make_slot(sampling, rows, length, compiled)
            self.slots.append(slot)
            self.letters.append(Letter(slot.received if self.ring.is_first else slot.received[-1:]))

    def breaks(self, slot: int) -> bool:
        """Whether this stage makes values that are not finite of ones that are, as its last decode pass shows.

        Args:
            slot: Whose logits are not numbers.
        """
        state = self.slots[slot]
        takes_finite = self.ring.is_first or bool(state.received.isfinite().all())
        return takes_finite and (self.ring.is_last or not bool(state.made.isfinite().all()))

    def release(self) -> None:
        """Gives the memory of caches and graphs back; the next call makes new ones."""
        self.slots.clear()
        self.letters.clear()

    def _make_slot(self, sampling: Sampling, rows: int, length: int, compiled: bool) -> SlotState:
        captured = self.device.type == "cuda" and self.stage.capturable
        slot = SlotState(
            self.stage,
            rows=rows,
            length=length,
            widths=self.widths,
            is_first=self.ring.is_first,
            chooser=Chooser(sampling, rows, length) if self.ring.is_last else None,
            lean=self._lean,
            compiled=compiled and captured,
            device=self.device,
            dtype=self.dtype,
        )
        if captured:
            slot.capture(self.slots[0].pool if self.slots else None)
        return slot
