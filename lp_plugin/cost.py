"""One stage on one device -> seconds and bytes, per memory tier.

A layer takes ``max(FLOPs / achieved FLOP/s, traffic / achieved bandwidth of its tier, launch overhead)``
(the roofline of Williams et al., 2009), or its measured seconds. A stage takes the sum of its layers plus the
time to receive its input and to send its output: DeepSpeed's point-to-point calls block, so neither overlaps
with compute. Memory is the sum of what stays (weights, KV cache, training state) and the largest of what comes
and goes (activations, buffers).

Not modelled: overlap of transfers with compute, power limits, kernels that are unlike a large matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lp_plugin.architecture import DTYPE_BYTES
from lp_plugin.hardware import Cluster, Device, Link
from lp_plugin.model import LayerCost, ModelProfile
from lp_plugin.workload import Workload

__all__ = ["LayerTable", "StageTable", "attention_pairs", "stage_tables", "work_lower_bound"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def attention_pairs(sequence: int, window: int | None, *, decode: bool) -> int:
    """(query, key) pairs one sequence looks at: causal, or one query against its context.

    Example:
        >>> attention_pairs(4, None, decode=False), attention_pairs(4, 2, decode=False)
        (10, 7)
    """
    reach = sequence if window is None else min(window, sequence)
    if decode:
        return reach
    return reach * (reach + 1) // 2 + (sequence - reach) * reach


class LayerTable:
    """Costs of every layer for one micro-batch of a workload, as arrays over the layers.

    Attributes:
        flops: FLOPs; shape [num_layers].
        traffic: Bytes moved between compute units and the tier the stage lives in; [num_layers].
        weights: Bytes of parameters, shared ones included; [num_layers].
        kv_cache: Bytes kept for all sequences of the batch; [num_layers].
        touched: Bytes of weights and KV cache that one micro-batch touches; [num_layers].
        buffers: Bytes of temporaries at their peak; [num_layers].
        cuts: Bytes of the activation that crosses each cut, the model's input and output included;
            [num_layers + 1].
        training: Bytes of gradients and Adam states; [num_layers], zero unless training.
        saved: Bytes kept per micro-batch in flight for its backward pass; [num_layers], zero unless training.
    """

    def __init__(self, profile: ModelProfile, workload: Workload) -> None:
        layers = profile.layers
        micro_batch = workload.chosen_micro_batch
        tokens = micro_batch * workload.tokens_per_sequence
        decode = workload.phase == "decode"
        self.is_training = workload.phase == "train"
        pairs = [attention_pairs(workload.sequence, layer.window, decode=decode) for layer in layers]
        context = [min(workload.sequence, layer.window or workload.sequence) for layer in layers]
        kv_per_sequence = _column(
            [layer.kv_bytes_per_token * kept if decode else 0 for layer, kept in zip(layers, context, strict=True)]
        )
        passes = 3 if self.is_training else 1  # backward computes twice the forward's products
        self.layers = layers
        self.measured_on = profile.measured_on
        self.flops = passes * _column(
            [
                layer.flops_per_token * tokens + layer.flops_per_pair * pair * micro_batch
                for layer, pair in zip(layers, pairs, strict=True)
            ]
        )
        read = _column([layer.weight_traffic_bytes for layer in layers])
        self.traffic = passes * (
            read + _column([layer.traffic_bytes_per_token * tokens for layer in layers]) + kv_per_sequence * micro_batch
        )
        self.weights = _column([layer.weight_bytes for layer in layers])
        self.kv_cache = kv_per_sequence * workload.batch
        self.touched = read + kv_per_sequence * micro_batch
        self.buffers = np.ceil(_column([layer.buffer_bytes_per_token * tokens for layer in layers]))
        outputs = [layer.output_bytes_per_token * tokens for layer in layers]
        self.cuts = np.ceil(_column([profile.input_bytes_per_token * tokens, *outputs]))
        per_parameter = 12 if DTYPE_BYTES[profile.dtype] == 2 else 8  # Adam in float32, with master weights for 16 bit
        state = _column([layer.weight_bytes + per_parameter * layer.parameters for layer in layers])
        self.training = state if self.is_training else np.zeros(len(layers))
        self._training_per_byte = 1 + per_parameter / DTYPE_BYTES[profile.dtype] if self.is_training else 0.0
        self.saved = self.cuts[1:] + self.buffers if self.is_training else np.zeros(len(layers))
        self.seconds = _column([_measured(layer, training=self.is_training) for layer in layers])

    def layer_seconds(self, device: Device, tier: int, dtype: str) -> FloatArray:
        """Seconds of each layer when its stage lives in ``device.tiers[tier]``; shape [num_layers]."""
        roofline = self._roofline(device, tier, dtype)
        measured = self.seconds
        if self.measured_on is not None and self.measured_on.name != device.name:
            there = self._roofline(self.measured_on, len(self.measured_on.tiers) - 1, dtype)
            measured = measured * np.divide(roofline, there, out=np.ones_like(there), where=there > 0)
        return np.where(np.isnan(measured), roofline, measured)

    def _roofline(self, device: Device, tier: int, dtype: str) -> FloatArray:
        overhead = _column([device.layer_overhead_seconds if layer.kind == "block" else 0.0 for layer in self.layers])
        compute = self.flops / device.flops(dtype)
        return np.maximum(np.maximum(compute, self.traffic / device.tiers[tier].achieved_bytes_per_second), overhead)

    @cached_property
    def shared_pairs(self) -> list[tuple[int, int, int, float]]:
        """(layer, next layer with the same key, shared bytes, their training state): once if a stage holds both."""
        last: dict[str, int] = {}
        pairs = []
        for index, layer in enumerate(self.layers):
            if layer.shared_key is None:
                continue
            if layer.shared_key in last:
                state = layer.shared_bytes * self._training_per_byte
                pairs.append((last[layer.shared_key], index, layer.shared_bytes, state))
            last[layer.shared_key] = index
        return pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBytes:
    """Memory of runs of layers by kind, in bytes; each an array over the runs asked for."""

    weights: FloatArray
    kv_cache: FloatArray
    training: FloatArray
    activations: FloatArray
    buffers: FloatArray

    @property
    def total(self) -> FloatArray:
        """All kinds together."""
        return self.weights + self.kv_cache + self.training + self.activations + self.buffers


class StageTable:
    """Seconds and bytes of one stage position for any run of layers; a `lp_plugin.partition.StageCosts`.

    Args:
        table: The layers' costs.
        device: Where the stage runs.
        dtype: Precision of compute.
        receive: Link from the stage before; None for the first stage.
        send: Link to the next stage; None for the last.
        in_flight: Micro-batches whose activations wait for their backward pass.
        tier_limit: Index of the slowest of the device's tiers that the working set may need.
    """

    def __init__(
        self,
        table: LayerTable,
        device: Device,
        *,
        dtype: str,
        receive: Link | None,
        send: Link | None,
        in_flight: int,
        tier_limit: int,
    ) -> None:
        self.table = table
        self.device = device
        self.tier_limit = min(tier_limit, len(device.tiers) - 1)
        self._in_flight = in_flight
        trips = 2 if table.is_training else 1  # gradients go back over the same link
        self.entry = _transfer_seconds(receive, table.cuts, trips)
        self.exit = _transfer_seconds(send, table.cuts, trips)
        self._seconds = [_prefix(table.layer_seconds(device, tier, dtype)) for tier in range(len(device.tiers))]
        self._weights, self._kv = _prefix(table.weights), _prefix(table.kv_cache)
        self._training, self._saved = _prefix(table.training), _prefix(table.saved)
        self._touched = _prefix(table.touched)
        self._in_out = _RangeMax(table.cuts[:-1] + table.cuts[1:])
        self._buffers = _RangeMax(table.buffers)

    def memory(self, starts: IntArray, stops: IntArray) -> StageBytes:
        """Bytes on the device by kind."""
        in_out = self._in_out(starts, stops)
        weights = self._weights[stops] - self._weights[starts]
        training = self._training[stops] - self._training[starts]
        for first, second, shared, state in self.table.shared_pairs:
            both = (starts <= first) & (stops > second)
            weights = weights - shared * both
            training = training - state * both
        return StageBytes(
            weights=weights,
            kv_cache=self._kv[stops] - self._kv[starts],
            training=training,
            activations=in_out + self._in_flight * (self._saved[stops] - self._saved[starts]),
            buffers=in_out + self._buffers(starts, stops),  # the pipeline keeps a second pair of activations
        )

    def working_set(self, starts: IntArray, stops: IntArray) -> FloatArray:
        """Bytes touched per micro-batch: weights, KV cache, activations and buffers."""
        touched = self._touched[stops] - self._touched[starts]
        return touched + self._in_out(starts, stops) + self._buffers(starts, stops)

    def tier(self, starts: IntArray, stops: IntArray) -> IntArray:
        """Index of the fastest tier that holds the working set (the last one if none does)."""
        working_set = self.working_set(starts, stops)
        tiers = np.full(working_set.shape, len(self.device.tiers) - 1)
        for index in range(len(self.device.tiers) - 2, -1, -1):
            tiers[working_set <= self.device.tiers[index].usable_bytes] = index
        return tiers

    def compute(self, starts: IntArray, stops: IntArray) -> FloatArray:
        """Seconds of the layers alone, without transfers and whether or not they fit."""
        tiers = self.tier(starts, stops)
        choices = [seconds[stops] - seconds[starts] for seconds in self._seconds]
        return np.asarray(np.choose(tiers, choices), dtype=np.float64)

    def inner(self, starts: IntArray, stops: IntArray) -> FloatArray:
        """Seconds of the layers; inf where memory or the tier limit is exceeded."""
        limit = self.device.tiers[self.tier_limit].usable_bytes
        fits = self.memory(starts, stops).total <= self.device.memory.usable_bytes
        if self.tier_limit < len(self.device.tiers) - 1:
            fits &= self.working_set(starts, stops) <= limit
        return np.where(fits, self.compute(starts, stops), np.inf)


def stage_tables(profile: ModelProfile, cluster: Cluster, workload: Workload, *, tier_limit: int) -> list[StageTable]:
    """Costs of each stage position, one per device of the cluster; equal positions are the same object.

    Args:
        profile: The layers.
        cluster: A device per stage.
        workload: With its micro-batch chosen.
        tier_limit: Slowest tier allowed, counted from the fastest.
    """
    table = LayerTable(profile, workload)
    last = len(cluster.devices) - 1
    made: dict[tuple[Device, Link | None, Link | None, int], StageTable] = {}
    tables = []
    for position, device in enumerate(cluster.devices):
        receive = cluster.links[position - 1] if position > 0 else None
        send = cluster.links[position] if position < last else None
        in_flight = min(last + 1 - position, workload.num_micro_batches) if table.is_training else 0
        key = (device, receive, send, in_flight)
        if key not in made:
            made[key] = StageTable(
                table,
                device,
                dtype=profile.dtype,
                receive=receive,
                send=send,
                in_flight=in_flight,
                tier_limit=tier_limit,
            )
        tables.append(made[key])
    return tables


def work_lower_bound(tables: list[StageTable], num_layers: int) -> float:
    """Seconds that no partition of these layers over these stages can beat.

    The larger of: the heaviest layer on the device that runs it fastest; all layers spread over all devices,
    each layer counted at the tier it reaches alone. Transfers and memory are left out.
    """
    index = np.arange(num_layers)
    distinct = {id(table): table.compute(index, index + 1) for table in tables}
    alone = [distinct[id(table)] for table in tables]
    fastest = np.min(list(distinct.values()), axis=0)
    reference = alone[0]
    work = reference > 0
    with np.errstate(divide="ignore"):
        speeds = [float(np.max(reference[work] / seconds[work], initial=0.0)) for seconds in alone]
    spread = float(np.sum(reference)) / sum(speeds) if np.any(work) else 0.0
    return max(float(np.max(fastest)), spread)


class _RangeMax:
    """Maximum over half-open runs in constant time (a sparse table)."""

    def __init__(self, values: FloatArray) -> None:
        self._levels = [values]
        span = 1
        while 2 * span <= len(values):
            below = self._levels[-1]
            self._levels.append(np.maximum(below[:-span], below[span:]))
            span *= 2
        padded = [np.pad(level, (0, len(values) - len(level)), mode="edge") for level in self._levels]
        self._table = np.stack(padded)

    def __call__(self, starts: IntArray, stops: IntArray) -> FloatArray:
        level = np.frexp(np.asarray(stops - starts, dtype=np.float64))[1] - 1
        left, right = self._table[level, starts], self._table[level, stops - (1 << level)]
        return np.asarray(np.maximum(left, right), dtype=np.float64)


def _column(values: list[float] | list[int]) -> FloatArray:
    return np.asarray(values, dtype=np.float64)


def _prefix(values: FloatArray) -> FloatArray:
    return np.concatenate([[0.0], np.cumsum(values)])


def _transfer_seconds(link: Link | None, cuts: FloatArray, trips: int) -> FloatArray:
    if link is None:
        return np.zeros_like(cuts)
    return trips * _column([link.seconds(float(num_bytes)) for num_bytes in cuts])


def _measured(layer: LayerCost, *, training: bool) -> float:
    if layer.seconds is None:
        return float("nan")
    backward = layer.backward_seconds if layer.backward_seconds is not None else 2 * layer.seconds
    return layer.seconds + (backward if training else 0.0)
