"""What a decision looks like: a `Plan` of `Stage`s; pure data, made by `lp_plugin.planner`."""

from __future__ import annotations

from dataclasses import dataclass

from lp_plugin.model.layers import Granularity
from lp_plugin.objective import Constraints, Objective
from lp_plugin.schedule import bubble_fraction, makespan_seconds, ring_seconds
from lp_plugin.workload import Workload

__all__ = ["LayerFootprint", "Plan", "Stage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFootprint:
    """What one layer weighs, for tables."""

    name: str
    """The layer's name."""
    kind: str
    """`LayerCost.kind`: embedding, block, attention, mlp, norm, head, ..."""
    block: int | None
    """Index of the transformer block that it is, or is a part of."""
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
    """Temporaries at their peak, and the pipeline's second pair of activations; in training, what the optimizer's step
    takes beyond all activations, if that is more."""
    training_bytes: int
    """Gradients and Adam states; 0 unless training."""
    working_set_bytes: int
    """Touched per micro-batch; compared with each tier."""
    capacity_bytes: int
    """Usable bytes of the device's memory."""
    reserved_bytes: int
    """The rest of the device's memory: CUDA context, NCCL buffers, fragmentation."""
    max_sequences: int | None
    """Sequences of the workload's length whose KV cache fits beside the rest; None if it keeps none or trains."""
    hit_fraction: float
    """Predicted share of the traffic that the device's first tier serves."""
    traffic_bytes: int
    """Moved per micro-batch between the compute units and whatever tier holds the data."""
    compute_seconds: float
    """One micro-batch through the layers."""
    resident_seconds: float
    """The same if the working set lay in the device's first tier."""
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
    model_type: str | None
    """transformers' name of the model's family; None for plain costs and layer lists."""
    dtype: str
    """Precision."""
    weight_dtype: str | None
    """How matrices are stored if they are quantised."""
    workload: Workload
    """With the micro-batch chosen."""
    objective: Objective | None
    """What was optimised; None for boundaries that were given."""
    constraints: Constraints
    """What it had to keep to."""
    tensor_parallel: int
    """Devices that share each stage's layers; all figures are those of one of them."""
    boundaries: tuple[int, ...]
    """Half-open, ``num_stages + 1`` numbers (DeepSpeed's ``parts``)."""
    stages: tuple[Stage, ...]
    """In pipeline order."""
    layers: tuple[LayerFootprint, ...]
    """Footprint of each layer."""
    lower_bound_seconds: float
    """The heaviest layer, or all work spread evenly: no partition of these layers can have a faster bottleneck."""
    uniform_seconds: float | None
    """Slowest stage of DeepSpeed's uniform split of the same layers; None if that does not fit."""
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
    def granularity(self) -> Granularity:
        """``sublayer`` if blocks are two layers each, attention and MLP, else ``layer``."""
        return "sublayer" if any(layer.kind in {"attention", "mlp"} for layer in self.layers) else "layer"

    @property
    def stage_seconds(self) -> tuple[float, ...]:
        """Seconds of each stage for one micro-batch."""
        return tuple(stage.seconds for stage in self.stages)

    @property
    def bottleneck_seconds(self) -> float:
        """Seconds of the slowest stage for one micro-batch."""
        return max(self.stage_seconds)

    @property
    def latency_seconds(self) -> float:
        """Seconds of one micro-batch through all stages; decoding: until its turn comes again, its next token."""
        return self.makespan_seconds if self.workload.phase == "decode" else sum(self.stage_seconds)

    @property
    def gap(self) -> float:
        """How far the bottleneck lies above the lower bound, as a share of it; 0 if there is no work."""
        return self.bottleneck_seconds / self.lower_bound_seconds - 1 if self.lower_bound_seconds else 0.0

    @property
    def max_sequences(self) -> int | None:
        """Sequences of the workload's length whose KV cache fits on all stages; None if none keeps one."""
        return min((stage.max_sequences for stage in self.stages if stage.max_sequences is not None), default=None)

    @property
    def memory_share(self) -> float:
        """Share of its usable memory that the fullest device needs."""
        return max(stage.memory_bytes / stage.capacity_bytes for stage in self.stages)

    @property
    def dram_bytes_per_token(self) -> float:
        """Bytes that all devices together fetch from beyond their first tier, per token; a prediction."""
        missed = sum(stage.traffic_bytes * (1 - stage.hit_fraction) for stage in self.stages) * self.tensor_parallel
        return missed / (self.workload.chosen_micro_batch * self.workload.tokens_per_sequence)

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
