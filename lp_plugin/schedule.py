"""Stage seconds -> makespan, bubble, throughput and timeline of a pipeline.

The forward schedule is a flow shop: every micro-batch passes the stages in order, a stage works on one
micro-batch at a time, in order. With constant stage times its makespan is
``sum(stage_seconds) + (num_micro_batches - 1) * max(stage_seconds)``. Hops that run beside compute make each link
a machine of its own between two stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lp_plugin.errors import WorkloadError

__all__ = [
    "Interval",
    "bubble_bound",
    "bubble_fraction",
    "forward_timeline",
    "makespan_seconds",
    "overlapped_seconds",
    "received_beside",
    "ring_seconds",
]


_BESIDE_BYTES = 2**20
"""Longest message that our forward pipeline receives beside compute on GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """One micro-batch on one stage."""

    stage: int
    """Position in the pipeline."""
    micro_batch: int
    """Position in the batch."""
    start_seconds: float
    """From the start of the batch."""
    stop_seconds: float
    """From the start of the batch."""
    kind: str = "forward"
    """``forward``, ``send`` or ``recv``."""


def makespan_seconds(stage_seconds: Sequence[float], num_micro_batches: int) -> float:
    """Seconds from the first micro-batch's start to the last one's end."""
    return sum(stage_seconds) + (num_micro_batches - 1) * max(stage_seconds)


def ring_seconds(stage_seconds: Sequence[float], num_micro_batches: int) -> float:
    """Seconds of one decode step when micro-batches go around the ring without draining it.

    A micro-batch's next token waits for its own trip through all stages; a stage waits for all micro-batches.
    """
    return max(sum(stage_seconds), num_micro_batches * max(stage_seconds))


def overlapped_seconds(stage_seconds: Sequence[float], hop_seconds: Sequence[float], num_micro_batches: int) -> float:
    """Seconds from the first micro-batch's start to the last one's end if hops run beside compute.

    A stage goes on with the next micro-batch while its output travels; each boundary's link carries one micro-batch at
    a time. Not modelled: what a transfer takes from compute (memory bandwidth, multiprocessors).

    Args:
        stage_seconds: Seconds of each stage for one micro-batch.
        hop_seconds: Seconds of each boundary's transfer, one fewer than stages.
        num_micro_batches: Micro-batches that every stage works on.

    Raises:
        WorkloadError: If the numbers of hops and stages don't match.

    Example:
        >>> overlapped_seconds([2.0, 3.0], [1.0], 4)
        15.0
    """
    return makespan_seconds(_chain(stage_seconds, hop_seconds), num_micro_batches)


def received_beside(num_bytes: float, *, on_gpu: bool) -> bool:
    """Whether our forward pipeline receives the next message while the stage computes, or between two passes.

    On a GPU a receiving that waits for its message keeps multiprocessors from computing, the more of them the longer
    the message is. Between passes a long one takes a small part of the time that computing takes for as many tokens. A
    sending that waits slows down a stage that is ahead anyway. More than one at a time gained nothing on H200s: of 32
    in a CUDA graph all but eight had to come before its first pass began.

    Args:
        num_bytes: Of the message.
        on_gpu: Whether the stage computes on a GPU.
    """
    return not on_gpu or num_bytes <= _BESIDE_BYTES


def bubble_fraction(stage_seconds: Sequence[float], num_micro_batches: int, whole_seconds: float) -> float:
    """Share of device time in which stages wait, between 0 and 1.

    Args:
        stage_seconds: Seconds of each stage for one micro-batch.
        num_micro_batches: Micro-batches that every stage works on.
        whole_seconds: From start to end, e.g. `makespan_seconds`.
    """
    whole = whole_seconds * len(stage_seconds)
    return 1.0 - num_micro_batches * sum(stage_seconds) / whole if whole else 0.0


def bubble_bound(num_stages: int, num_micro_batches: int) -> float:
    """Highest share of the slowest stage's own rate that a drained pipeline of equal stages can reach.

    Source:
        Huang et al., GPipe, 2019, section 2.3: m / (m + p - 1).
    """
    return num_micro_batches / (num_micro_batches + num_stages - 1)


def forward_timeline(stage_seconds: Sequence[float], num_micro_batches: int) -> list[Interval]:
    """When each stage works on each micro-batch, earliest possible, in order of stage and micro-batch."""
    ready = [0.0] * num_micro_batches
    intervals = []
    for stage, seconds in enumerate(stage_seconds):
        free = 0.0
        for micro_batch in range(num_micro_batches):
            start = max(free, ready[micro_batch])
            free = ready[micro_batch] = start + seconds
            intervals.append(Interval(stage=stage, micro_batch=micro_batch, start_seconds=start, stop_seconds=free))
    return intervals


def _chain(stage_seconds: Sequence[float], hop_seconds: Sequence[float]) -> list[float]:
    """Stages and the links between them, in the order in which a micro-batch passes them."""
    if len(hop_seconds) != len(stage_seconds) - 1:
        raise WorkloadError(
            f"{len(hop_seconds)} hops for {len(stage_seconds)} stages; give one for each boundary between two stages."
        )
    pairs = zip(stage_seconds, [*hop_seconds, 0.0], strict=True)
    return [seconds for pair in pairs for seconds in pair][:-1]
