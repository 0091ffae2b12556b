"""One step through DeepSpeed's engine: micro-batches of one shape in, a result per row on every rank out."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from lp_plugin.integrations.deepspeed.engine import InstructionTimer, StageTimes, ready_for_batch
from lp_plugin.integrations.deepspeed.forward.whole_rows import whole_rows
from lp_plugin.job.documents import TokenizedDocuments
from lp_plugin.score.batches import Step

__all__ = ["StepRunner"]

Fed: TypeAlias = tuple[torch.Tensor | tuple[torch.Tensor, torch.Tensor], torch.Tensor]
"""What the first stage takes, and the labels that the last stage's loss function takes."""


class StepRunner:
    """Runs steps on an engine whose module's ``loss_fn`` makes one result for each row of a micro-batch.

    Args:
        engine: DeepSpeed's pipeline engine.
        timed: Whether to time its instructions.

    Attributes:
        times: What this rank did in the last step; None if not timed.
    """

    def __init__(self, engine: Any, *, timed: bool = False) -> None:
        self._engine = engine
        self._timer = InstructionTimer(engine) if timed else None
        self._shape: tuple[int, int, int | None] | None = None
        self.times: StageTimes | None = None

    def run(self, step: Step, documents: TokenizedDocuments, *, width: int | None = None) -> torch.Tensor:
        """One ``eval_batch``; collective over all ranks of the job.

        Args:
            step: For all replicas together.
            documents: Those of the step, and perhaps others.
            width: None to score: the stages get tokens, the loss function the tokens that follow, and makes a number
                of each row. Else to embed: stages get tokens and mask, the loss function the mask, and makes a vector
                of this width.

        Returns:
            float64 [micro-batches, rows] or [micro-batches, rows, width] on this rank's device, in the step's order.
        """
        engine, grid = self._engine, self._engine.grid
        mine = step.of_replica(grid.data_parallel_id, grid.data_parallel_size)
        self._forget_shape((step.rows, step.length, width))
        fed = iter(self._feed(mine, documents, masked=width is not None))
        if self._timer:
            self._timer.start()
        with whole_rows():  # else the host waits for the device in every pass
            outputs = engine.eval_batch(
                fed, compute_loss=True, reduce_output=None, bcast_loss=False, num_micro_batches=len(mine.micro_batches)
            )
        if self._timer:
            self.times = self._timer.stop()
        shape = (len(step.micro_batches), step.rows, *(() if width is None else (width,)))
        results = torch.zeros(shape, dtype=torch.float64, device=engine.device)
        if engine.is_last_stage() and grid.get_slice_parallel_rank() == 0:
            own = results[grid.data_parallel_id :: grid.data_parallel_size]
            if len(own):
                own.copy_(torch.stack(outputs[: len(own)]))
        torch.distributed.all_reduce(results)
        return results

    def _forget_shape(self, shape: tuple[int, int, int | None]) -> None:
        """Makes the engine forget the last step's shape, which it would assume again, silently."""
        engine = self._engine
        ready_for_batch(engine)
        if self._shape != shape:
            self._shape = shape
            engine.reset_activation_shape()
            engine.set_train_micro_batch_size(shape[0])

    def _feed(self, mine: Step, documents: TokenizedDocuments, *, masked: bool) -> list[Fed]:
        """Inputs and labels on the device already: a copy per micro-batch would wait for the pass before it."""
        engine, numbers = self._engine, range(len(mine.micro_batches))
        if not (engine.is_first_stage() or engine.is_last_stage()):
            return []
        inputs = self._on_device([mine.inputs(documents, number) for number in numbers])
        if not masked:
            return list(
                zip(inputs, self._on_device([mine.labels(documents, number) for number in numbers]), strict=True)
            )
        masks = self._on_device([mine.mask(documents, number) for number in numbers])
        return [((tokens, mask), mask) for tokens, mask in zip(inputs, masks, strict=True)]

    def _on_device(self, arrays: list[NDArray[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(np.stack(arrays)).to(self._engine.device)
