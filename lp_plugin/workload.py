"""What is asked of the model: how many sequences, how long, in which phase."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal, get_args

from lp_plugin.errors import WorkloadError
from lp_plugin.quantity import shown

__all__ = ["Phase", "Workload", "micro_batch_candidates"]

Phase = Literal["prefill", "decode", "train"]

_LARGEST = 10**9  # sequences, tokens or replicas: more is a slip of the keyboard


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A batch of sequences in one phase.

    ``prefill`` reads whole sequences and keeps no KV cache (scoring, embedding, reranking); ``decode`` makes
    one new token for every sequence, whose whole context lies in the KV cache; ``train`` is forward and
    backward with gradients and Adam states held.

    Example:
        >>> Workload(phase="prefill", batch=1024, sequence=10_000).total_tokens
        10240000
    """

    phase: Phase = "prefill"
    """What a micro-batch does; decides compute, memory traffic and what stays in memory."""

    batch: int
    """Sequences in the whole batch."""

    sequence: int
    """Tokens of one sequence (prefill, train), or of its context (decode)."""

    micro_batch: int | None = None
    """Sequences per micro-batch; None lets the planner choose."""

    checkpointing: bool = False
    """Training: keep only each layer's input for the backward pass and compute its inside again."""

    zero_stage: int = 0
    """Training: 1 spreads the Adam states over ``data_parallel`` replicas (ZeRO stage 1); 0 does not."""

    data_parallel: int = 1
    """Training: replicas of the whole pipeline, each with a batch of its own."""

    float32_gradients: bool = False
    """Training in bfloat16 with ZeRO stage 1: gradients are also summed up in float32."""

    def __post_init__(self) -> None:
        if not isinstance(self.phase, str) or self.phase not in get_args(Phase):
            raise WorkloadError(f"phase is {shown(self.phase)}; it must be one of {', '.join(get_args(Phase))}.")
        for name in ("batch", "sequence", "micro_batch", "data_parallel"):
            value = getattr(self, name)
            if name == "micro_batch" and value is None:
                continue
            if not _is_whole(value) or not 1 <= value <= _LARGEST:
                raise WorkloadError(f"{name} is {shown(value)}; it must be a whole number of 1 to {_LARGEST:,}.")
        if not _is_whole(self.zero_stage) or self.zero_stage not in {0, 1}:
            raise WorkloadError(f"zero_stage is {shown(self.zero_stage)}; a pipeline takes 0 or 1.")
        for name in ("checkpointing", "float32_gradients"):
            if not isinstance(getattr(self, name), bool):
                raise WorkloadError(f"{name} is {shown(getattr(self, name))}; it must be True or False.")
        options = (self.checkpointing, self.zero_stage, self.data_parallel > 1, self.float32_gradients)
        if self.phase != "train" and any(options):
            raise WorkloadError(
                "checkpointing, zero_stage, data_parallel and float32_gradients belong to training, but the phase is "
                f"{self.phase}; leave them out, or plan for train."
            )
        if self.micro_batch is not None and self.micro_batch > self.batch:
            raise WorkloadError(
                f"micro_batch is {self.micro_batch}, more than the batch of {self.batch}; "
                "lower it, or leave it out and the planner chooses."
            )

    @property
    def tokens_per_sequence(self) -> int:
        """Tokens computed per sequence and pass: the sequence, or one when decoding."""
        return 1 if self.phase == "decode" else self.sequence

    @property
    def total_tokens(self) -> int:
        """Tokens computed in one pass over the whole batch."""
        return self.batch * self.tokens_per_sequence

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches in the batch, the last one possibly smaller."""
        return -(-self.batch // self.chosen_micro_batch)

    @property
    def chosen_micro_batch(self) -> int:
        """The micro-batch in sequences.

        Raises:
            WorkloadError: If it has been left to the planner and the planner has not run yet.
        """
        if self.micro_batch is None:
            raise WorkloadError("micro_batch is not chosen yet; give it, or let make_plan() choose.")
        return self.micro_batch

    def with_micro_batch(self, micro_batch: int) -> Workload:
        """The same workload cut into micro-batches of ``micro_batch`` sequences."""
        return dataclasses.replace(self, micro_batch=micro_batch)

    @property
    def digest(self) -> str:
        """SHA-256 of all fields, in hexadecimal."""
        fields = dataclasses.asdict(self)
        if not self.float32_gradients:
            del fields["float32_gradients"]  # younger than plan files
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def micro_batch_candidates(workload: Workload) -> list[int]:
    """Micro-batch sizes worth planning, smallest first: powers of two up to the batch, and the batch itself.

    Only the given one if the workload has chosen.
    """
    if workload.micro_batch is not None:
        return [workload.micro_batch]
    powers = [1 << exponent for exponent in range(workload.batch.bit_length())]
    return sorted({*powers, workload.batch})


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
