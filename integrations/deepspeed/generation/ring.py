"""Messages around the ring of stages: activations forwards, tokens from the last stage back to the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

__all__ = ["Ring", "find_widths"]


class Ring:
    """This rank's neighbours in its pipeline: those at the same data- and tensor-parallel coordinates.

    Shapes are known on both sides, so that nothing but the tensors is sent. The two directions use two process
    groups (DeepSpeed's default one, and its group of the pipeline's ranks): NCCL runs what shares a group and a pair
    of ranks one after the other, and a send that waits for a receive of the other direction would wait for ever.
    No call blocks the host on a GPU; streams wait for each other.

    Args:
        grid: The engine's ``PipelineParallelGrid``.

    Attributes:
        stage: Number of the stage.
        is_first: Whether this rank holds the first stage.
        is_last: Whether it holds the last one; with one stage it is both, and nothing is sent.
    """

    def __init__(self, grid: Any) -> None:
        stages, stage = grid.pipe_parallel_size, grid.get_stage_id()
        self.stage = stage
        self.is_first = stage == 0
        self.is_last = stage == stages - 1
        self._before = grid.stage_to_global(stage_id=(stage - 1) % stages)
        self._after = grid.stage_to_global(stage_id=(stage + 1) % stages)
        self._first = grid.stage_to_global(stage_id=0)
        self._pipeline = grid.pp_proc_group

    def send_activation(self, activation: torch.Tensor) -> Any:
        """Starts sending to the next stage; the returned work must be waited for before the tensor is reused."""
        return distributed.isend(activation, self._after)

    def receive_activation(self, activation: torch.Tensor) -> None:
        """Fills the tensor with what the stage before sends."""
        _wait(distributed.irecv(activation, self._before))

    def send_tokens(self, tokens: torch.Tensor) -> Any:
        """Starts sending to the first stage; the returned work must be waited for before the tensor is reused."""
        return distributed.isend(tokens, self._after, group=self._pipeline)

    def receive_tokens(self, tokens: torch.Tensor) -> None:
        """Fills the tensor with what the last stage sends."""
        _wait(distributed.irecv(tokens, self._before, group=self._pipeline))

    def share(self, tensor: torch.Tensor) -> None:
        """Gives the first stage's tensor to all stages of the pipeline."""
        if not (self.is_first and self.is_last):
            distributed.broadcast(tensor, self._first, group=self._pipeline)


def find_widths(ring: Ring, stage: Any, device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """Elements per token of the activations that come in and go out; what the ends don't have is 0.

    Runs one token through all stages, one after the other: collective over the ranks of the pipeline.

    Args:
        ring: The neighbours.
        stage: The ``DecoderStage``.
        device: Where it is.
        dtype: Of activations.
    """
    came = torch.zeros(1, dtype=torch.long, device=device)
    if not ring.is_first:
        ring.receive_activation(came)
    shape = (1, 1) if ring.is_first else (1, 1, int(came))
    outputs = stage(torch.zeros(shape, dtype=torch.long if ring.is_first else dtype, device=device))
    widths = (int(came), 0 if ring.is_last else int(outputs.shape[-1]))
    if not ring.is_last:
        ring.send_activation(torch.full_like(came, widths[1])).wait()
    return widths


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()
