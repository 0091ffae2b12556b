"""What a decision looks like: a `Plan` of `Stage`s; pure data, made by `lp_plugin.planner`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lp_plugin.schedule import bubble_fraction, makespan_seconds, ring_seconds
from lp_plugin.workload import Workload

__all__ = ["LayerFootprint", "Objective", "Plan", "Stage"]

Objective = Literal["throughput", "memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFootprint:
    """What one layer weighs, for tables."""

    name: str
    """The layer's name."""
    weight_bytes: int
    """Parameters as stored, shared ones included."""
    activation_bytes: int
    """The activation it hands on for one micro-batch."""
    kv_bytes: int
    """KV cache for all sequences of the batch."""
    buffer_bytes: int
    """Temporaries at their peak for one micro-batch."""

    @property
    def total_bytes(self) -> int:
        """All kinds together."""
        return self.weight_bytes + self.activation_bytes + self.kv_bytes + self.buffer_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A contiguous run of layers on one device."""

    start: int
    """First layer."""
    stop: int
    """One past the last layer."""
    layers: tuple[str, ...]
    """Names of the layers."""
    device: str
    """Name of the device."""
    tier: str
    """Fastest memory tier that holds the working set."""
    weight_bytes: int
    """Parameters, shared ones once."""
    kv_bytes: int
    """KV cache for all sequences of the batch."""
    activation_bytes: int
    """Input and output of a micro-batch; training: also what waits for the backward passes."""
    buffer_bytes: int
    """Temporaries at their peak, and the pipeline's second pair of activations."""
    training_bytes: int
    """Gradients and Adam states; 0 unless training."""
    working_set_bytes: int
    """Touched per micro-batch; compared with each tier."""
    capacity_bytes: int
    """Usable bytes of the device's memory."""
    compute_seconds: float
    """One micro-batch through the layers."""
    transfer_seconds: float
    """Receiving the input and sending the output of one micro-batch."""

    @property
    def memory_bytes(self) -> int:
        """All kinds together; at most ``capacity_bytes`` in a plan that fits."""
        kinds = (
            self.weight_bytes,
            self.kv_bytes,
            self.activation_bytes,
            self.buffer_bytes,
            self.training_bytes,
        )
        return sum(kinds)

    @property
    def seconds(self) -> float:
        """One micro-batch, transfers included."""
        return self.compute_seconds + self.transfer_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which layers go on which device, and what that is predicted to give."""

    model_name: str
    """The profile's name."""
    dtype: str
    """Precision."""
    workload: Workload
    """With the micro-batch chosen."""
    objective: Objective | None
    """What was optimised; None for boundaries that were given."""
    boundaries: tuple[int, ...]
    """Half-open, ``num_stages + 1`` numbers (DeepSpeed's ``parts``)."""
    stages: tuple[Stage, ...]
    """In pipeline order."""
    layers: tuple[LayerFootprint, ...]
    """Footprint of each layer."""
    lower_bound_seconds: float
    """The heaviest layer, or all work spread evenly: no partition of these layers can have a faster bottleneck."""
    notes: tuple[str, ...] = ()
    """What a user should know: why the batch is cut, what more devices would not bring, ..."""
    model_digest: str
    """`ModelProfile.digest`."""
    cluster_digest: str
    """`Cluster.digest`."""
    workload_digest: str
    """`Workload.digest`, with the micro-batch chosen."""

    @property
    def num_stages(self) -> int:
        """Stages in the pipeline."""
        return len(self.stages)

    @property
    def stage_seconds(self) -> tuple[float, ...]:
        """Seconds of each stage for one micro-batch."""
        return tuple(stage.seconds for stage in self.stages)

    @property
    def bottleneck_seconds(self) -> float:
        """Seconds of the slowest stage for one micro-batch."""
        return max(self.stage_seconds)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches in the batch."""
        return self.workload.num_micro_batches

    @property
    def makespan_seconds(self) -> float:
        """Predicted seconds for the whole batch (decode: for one token of every sequence)."""
        if self.workload.phase == "decode":
            return ring_seconds(self.stage_seconds, self.num_micro_batches)
        return makespan_seconds(self.stage_seconds, self.num_micro_batches)

    @property
    def bubble_fraction(self) -> float:
        """Share of device time in which stages wait, between 0 and 1."""
        return bubble_fraction(self.stage_seconds, self.num_micro_batches, self.makespan_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens per second over the whole batch; infinite for a model that costs nothing."""
        return self.workload.total_tokens / self.makespan_seconds if self.makespan_seconds else float("inf")
