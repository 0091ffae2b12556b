"""Generation as a DeepSpeed schedule: its instructions, and the order in which a stage runs them."""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

from lp_plugin.integrations.deepspeed.generation.slots import Turn

__all__ = [
    "Decode",
    "GenerationSchedule",
    "Prefill",
    "ReceiveActivation",
    "ReceiveTokens",
    "SendActivation",
    "SendTokens",
]


class ReceiveTokens(PipeInstruction):
    """The first stage takes in the tokens of the slot's pass before."""


class ReceiveActivation(PipeInstruction):
    """A later stage takes in what the stage before it made of this pass."""


class Prefill(PipeInstruction):
    """A new group takes the slot: its prompts run through the stage."""


class Decode(PipeInstruction):
    """One token per row runs through the stage."""


class SendActivation(PipeInstruction):
    """The stage's result goes to the next stage."""


class SendTokens(PipeInstruction):
    """The last stage's tokens go back to the first."""


class GenerationSchedule(PipeSchedule):
    """One step per turn; every instruction gets the `Turn` it belongs to.

    Args:
        turns: Of `take_turns`; asked for one by one, since later turns depend on how earlier ones ended.
        num_slots: Slots.
        stages: Stages of the pipeline.
        stage_id: This one.
    """

    def __init__(self, turns: Iterator[Turn], num_slots: int, stages: int, stage_id: int) -> None:
        super().__init__(micro_batches=num_slots, stages=stages, stage_id=stage_id)
        self._turns = turns

    def num_pipe_buffers(self) -> int:
        """None of the engine's own: slots keep their buffers."""
        return 0

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yields the instructions of one turn after the other."""
        for turn in self._turns:
            step: list[PipeInstruction] = []
            if self.is_first_stage and turn.returns is not None:
                step.append(ReceiveTokens(turn=turn))
            if turn.run is not None:
                if not self.is_first_stage:
                    step.append(ReceiveActivation(turn=turn))
                step.append(Prefill(turn=turn) if turn.run.number == 1 else Decode(turn=turn))
                step.append(SendTokens(turn=turn) if self.is_last_stage else SendActivation(turn=turn))
            yield step
