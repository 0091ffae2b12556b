"""Messages from stage to stage: sent while the stages compute, and short ones received meanwhile."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torch.utils.dlpack import from_dlpack, to_dlpack

__all__ = ["Hops"]

_NUM_SENDS = 2
"""On their way before a stage waits for the first of them: what it makes leaves while it computes the next."""


class Hops:
    """This rank's neighbours in its pipeline: those at the same data- and tensor-parallel coordinates.

    Neither call blocks the host on a GPU; streams wait for each other, so that all of it can be captured. NCCL runs
    one after the other what shares a process group: so a rank receives in one group and sends in another. The
    boundaries between stages take DeepSpeed's default group and its group of the pipeline's ranks in turns.

    Args:
        grid: The engine's ``PipelineParallelGrid``.
    """

    def __init__(self, grid: Any) -> None:
        stages, stage = grid.pipe_parallel_size, grid.get_stage_id()
        groups = (None, grid.pp_proc_group)
        self._before = grid.stage_to_global(stage_id=(stage - 1) % stages)
        self._after = grid.stage_to_global(stage_id=(stage + 1) % stages)
        self._group_before, self._group_after = groups[(stage - 1) % 2], groups[stage % 2]
        self._receiving: dict[int, Any] = {}
        """Micro-batch -> the receiving that nobody has waited for."""
        self._sending: dict[int, tuple[Any, torch.Tensor]] = {}
        """Micro-batch -> the sending, and the tensor, whose memory is not to be used again before it has left."""

    def start_receiving(self, micro_batch: int, buffer: torch.Tensor) -> None:
        """Lets the buffer be filled once everything launched so far is done."""
        self._receiving[micro_batch] = distributed.irecv(buffer, self._before, group=self._group_before)

    def await_activation(self, micro_batch: int) -> None:
        """What is launched from now on sees the buffer filled."""
        self._receiving.pop(micro_batch).wait()

    def send(self, micro_batch: int, activation: torch.Tensor) -> None:
        """Starts sending to the next stage; at most two micro-batches are on their way."""
        self._await_sent(micro_batch - _NUM_SENDS)
        work = distributed.isend(_unrecorded(activation), self._after, group=self._group_after)
        self._sending[micro_batch] = (work, activation)

    def finish(self) -> None:
        """What is launched from now on sees everything sent."""
        for micro_batch in tuple(self._sending):
            self._await_sent(micro_batch)

    def _await_sent(self, micro_batch: int) -> None:
        work, _ = self._sending.pop(micro_batch, (None, None))
        if work is not None:
            work.wait()


def _unrecorded(activation: torch.Tensor) -> torch.Tensor:
    """The same memory, which torch's NCCL group does not keep for its own stream: here it is kept until it has left.

    Memory that is kept for another stream is not used again before the end of a capture, so that a CUDA graph would
    take memory for the activations of all its micro-batches.
    """
    return from_dlpack(to_dlpack(activation)) if activation.is_cuda else activation
