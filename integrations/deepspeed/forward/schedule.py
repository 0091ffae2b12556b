"""Forward passes as a DeepSpeed schedule: its instructions, and the order in which a stage runs them."""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

__all__ = ["AwaitActivation", "Forward", "ForwardSchedule", "SendActivation", "StartReceiving", "graph_parts"]

_GROWTH, _LONGEST_PART = 4, 32


class StartReceiving(PipeInstruction):
    """A buffer is ready for what the stage before makes of a micro-batch; nothing waits for it yet."""


class AwaitActivation(PipeInstruction):
    """What follows needs the micro-batch's activation."""


class Forward(PipeInstruction):
    """The micro-batch runs through the stage."""


class SendActivation(PipeInstruction):
    """The stage's result starts on its way to the next stage."""


class ForwardSchedule(PipeSchedule):
    """One step per micro-batch; every instruction gets its number.

    Args:
        micro_batches: In all.
        stages: Of the pipeline.
        stage_id: This one.
        receives_beside: Whether the next micro-batch comes in while this one computes; else it comes afterwards.
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int, *, receives_beside: bool) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self._ahead = 1 if receives_beside else 0

    def num_pipe_buffers(self) -> int:
        """None of the engine's own."""
        return 0

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yields the instructions of one micro-batch after the other."""
        for number in range(self.micro_batches):
            step: list[PipeInstruction] = []
            if not self.is_first_stage:
                last = number + self._ahead
                coming = range(last + 1) if number == 0 else (last,)
                step += [StartReceiving(micro_batch=each) for each in coming if each < self.micro_batches]
                step.append(AwaitActivation(micro_batch=number))
            step.append(Forward(micro_batch=number))
            if not self.is_last_stage:
                step.append(SendActivation(micro_batch=number))
            yield step


def graph_parts(num_micro_batches: int) -> tuple[int, ...]:
    """Micro-batches of each CUDA graph that a run replays, one after the other.

    The host needs time to launch a graph, for each of its kernels about a seventh of what a small kernel takes, and the
    device waits for the first one. So it begins with a single micro-batch; each further part is launched while the
    device is busy with the one before, and may be longer. Few long parts are better, since each begins with a message
    that nothing hides (25 us between two parts on H200s), but take more memory; parts of 128 gained nothing there.

    Example:
        >>> graph_parts(64)
        (1, 4, 16, 32, 11)
    """
    parts: list[int] = []
    length = 1
    while left := num_micro_batches - sum(parts):
        parts.append(min(length, left))
        length = min(_GROWTH * length, _LONGEST_PART)
    return tuple(parts)
