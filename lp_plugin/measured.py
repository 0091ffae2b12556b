"""What measuring on real devices gives: layers and links timed, memory, where time went, hardware counters.

Plain data; `lp_plugin.measure` and the integrations fill it in, the benchmark keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Clock", "Counters", "LayerTimes", "Links", "Memory", "RankClocks", "Span", "TimeSplit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Every layer of a model timed alone on one device, as one rank of a tensor-parallel group holds it."""

    tensor_parallel: int
    """Ranks that share each layer; all-reduces are not in the figures."""
    execution: Literal["eager", "graphs", "compiled"]
    """Launched one by one back to back, or replayed as CUDA graphs (of compiled layers)."""
    granularity: Literal["layer", "sublayer"]
    """Whether blocks are whole or attention and MLP are apart."""
    rows: int
    """Sequences of the micro-batch that they were timed with."""
    seconds: tuple[float, ...]
    """One per layer for one micro-batch, weights from memory: copies take turns so that no cache holds them."""
    resident_seconds: tuple[float | None, ...]
    """The same over and over on one copy, so that weights stay in the cache if they fit; None if the layer's working
    set is larger than the first tier."""
    weight_bytes: tuple[int, ...]
    """Measured: memory that the layer's parameters and buffers take."""
    peak_bytes: tuple[int | None, ...]
    """Measured: most memory beyond weights and input while it runs, its output included; None where it can't be read
    (CPU)."""
    launch_seconds: float
    """Host seconds to launch one pass of a block eagerly; 0 where launches do not run ahead (CPU)."""
    pass_seconds: float = 0.0
    """What a pass of a stage takes besides its layers, once, however many it has: masks, rotary tables, launching."""
    spread: float = 0.0
    """Of repeats of one stage's passes, between the quartiles, over the median: the largest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Messages between ranks, measured in the experiment's own processes; empty with one process."""

    send_bytes: tuple[int, ...] = ()
    """Sizes sent from rank 0 to rank 1."""
    send_seconds: tuple[float, ...] = ()
    """Median of each."""
    reduce_bytes: tuple[int, ...] = ()
    """Sizes all-reduced over ``ranks`` ranks."""
    reduce_seconds: tuple[float, ...] = ()
    """Median of each."""
    ranks: int = 1
    """Ranks of the all-reduce."""
    replayed_send_seconds: tuple[float, ...] = ()
    """As ``send_seconds``, inside CUDA graphs, where launching costs nothing; empty on CPUs."""
    replayed_reduce_seconds: tuple[float, ...] = ()
    """As ``reduce_seconds``, inside CUDA graphs; empty on CPUs."""
    spread: float = 0.0
    """Of repeats of one message, between the quartiles, over the median: the largest, of those outside of graphs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of one rank, in bytes."""

    rank: int
    """Which."""
    predicted_weights: int
    """By the plan."""
    loaded: int | None
    """Measured after loading; None where it can't be read."""
    predicted_peak: int
    """By the plan: all kinds together."""
    peak: int | None
    """Measured while it ran; None where it can't be read (CPU)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """What the driver said of a GPU while it worked."""

    hertz: float
    """Of its multiprocessors, the mean."""
    capped_fraction: float
    """Share of the time in which its power limit held the clock back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankClocks:
    """Of one rank's GPU, the median turn of each kind."""

    rank: int
    """Which."""
    trials: Clock | None
    """In turns of the whole; None if not known."""
    alone: Clock | None
    """While stages ran by themselves; None if not known, or not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that one rank did, from the start of the profiled trial."""

    kind: Literal["compute", "communication"]
    """What."""
    name: str
    """Of the kernel or operation, shortened."""
    start_seconds: float
    """When it began."""
    stop_seconds: float
    """When it ended."""
    lane: str
    """Stream or thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSplit:
    """Where one rank's time went in one profiled trial; parts overlap and are not forced to add up."""

    rank: int
    """Which."""
    wall_seconds: float
    """From the first to the last thing that any rank did."""
    compute_seconds: float
    """At least one computing kernel ran."""
    communication_seconds: float
    """At least one communication kernel ran, waiting for the peer included."""
    transfer_seconds: float | None
    """The part of it in which all peers of the message were there, so that bytes could move; None if not known."""
    overlap_seconds: float
    """Compute and communication at once."""
    idle_seconds: float
    """Neither: the bubble as the device sees it."""
    exposed_transfer_seconds: float | None = None
    """The part of ``transfer_seconds`` beside which nothing computed; None if not known."""
    spans: tuple[Span, ...] = ()
    """What it is made of, neighbours merged until a few thousand are left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Hardware counters over one pass of one micro-batch through a stage, or why there are none."""

    stage: int
    """Position in the pipeline."""
    reason: str = ""
    """Why it was not measured; empty if it was."""
    l2_read_hit_fraction: float | None = None
    """Sectors read that L2 had, over all sectors read."""
    dram_read_bytes: float | None = None
    """Read from device memory."""
    dram_write_bytes: float | None = None
    """Written to device memory."""
    counted_bytes: int = 0
    """What the planner counts as moved."""
    predicted_hit_fraction: float = 0.0
    """What the planner expects of the first tier."""
    nvlink_bytes: float | None = None
    """Sent over NVLink in one trial by the stage's first rank, from NVML; None if not measured."""
    nvlink_reason: str = ""
    """Why not."""
    counted_link_bytes: int = 0
    """What the planner counts as sent in one trial."""
