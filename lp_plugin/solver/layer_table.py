"""Every layer of a profile for one micro-batch of a workload, as arrays over the layers.

A layer takes ``max(FLOPs / achieved FLOP/s, traffic / achieved bandwidth of its tier, launch overhead)``
(the roofline of Williams et al., 2009), or its measured seconds; tensor parallelism adds its all-reduces.
Training computes forward and twice as much backward; with checkpointing the forward pass twice.

Not modelled: the optimizer's step, overlap of communication with compute, power limits, kernels that are unlike a
large matrix product.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lp_plugin.hardware import Device, Link
from lp_plugin.model import LayerCost, ModelProfile
from lp_plugin.model.architecture import DTYPE_BYTES
from lp_plugin.workload import Workload

__all__ = ["FloatArray", "IntArray", "LayerTable", "RangeMax", "attention_pairs", "prefix_sums"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_BUCKET_BYTES = 2 * 10**9
"""Of gradients that DeepSpeed's engine copies together to reduce them: 500 million in float32."""

_LAUNCHES = {"block": 1.0, "attention": 0.5, "mlp": 0.5}
"""Share of a transformer block's launch overhead by kind of layer; others have next to none."""


def attention_pairs(sequence: int, window: int | None, *, decode: bool, causal: bool = True) -> int:
    """(query, key) pairs one sequence looks at.

    Causal: itself and what came before, at most ``window`` keys; not causal: half a window to each side; decoding:
    one query against its context.

    Example:
        >>> attention_pairs(4, None, decode=False), attention_pairs(4, 2, decode=False)
        (10, 7)
        >>> attention_pairs(4, None, decode=False, causal=False), attention_pairs(4, 2, decode=False, causal=False)
        (16, 10)
    """
    reach = sequence if window is None else min(window, sequence)
    if decode:
        return reach
    if causal:
        return reach * (reach + 1) // 2 + (sequence - reach) * reach
    side = sequence - 1 if window is None else min(window // 2, sequence - 1)
    return sequence + 2 * side * sequence - side * (side + 1)


def prefix_sums(values: FloatArray) -> FloatArray:
    """Sums of the first 0, 1, ... values; exact while values lie on a grid that fits a float's 53 bits."""
    return np.concatenate([[0.0], np.cumsum(values)])


class RangeMax:
    """Maxima of columns over half-open runs in constant time (a sparse table each)."""

    def __init__(self, *columns: FloatArray) -> None:
        count = len(columns[0])
        self._num_layers = count
        self._level = np.maximum(np.frexp(np.arange(count + 1))[1].astype(np.int64) - 1, 0)  # by length
        self._columns = [
            float(column[0]) if np.all(column == column[0]) else self._sparse(column) for column in columns
        ]

    def _sparse(self, values: FloatArray) -> FloatArray:
        """``[level * num_layers + start]`` is the maximum of the ``2^level`` values from start on."""
        levels = np.zeros((int(self._level[-1]) + 1, self._num_layers))
        levels[0] = values
        for level in range(1, len(levels)):
            half, reach = 1 << (level - 1), self._num_layers - (1 << level) + 1
            levels[level, :reach] = np.maximum(levels[level - 1, :reach], levels[level - 1, half : half + reach])
        return levels.ravel()

    def __call__(self, starts: IntArray, stops: IntArray) -> list[FloatArray]:
        """The maximum of each column over the runs."""
        level = self._level[stops - starts]
        row = level * self._num_layers
        left, right = row + starts, row + stops - (1 << level)
        return [
            np.full(left.shape, column) if isinstance(column, float) else np.maximum(column[left], column[right])
            for column in self._columns
        ]


class LayerTable:
    """Costs of every layer for one micro-batch of a workload.

    Attributes:
        flops: FLOPs; shape [num_layers].
        traffic: Bytes moved between compute units and the tier the stage lives in; [num_layers].
        weights: Bytes of parameters, shared ones included; [num_layers].
        kv_per_sequence: Bytes of KV cache that one sequence of the workload's length keeps; [num_layers]. Counted
            in every phase but training: in prefill it is what the sequence would keep for decoding.
        kv_cache: Bytes kept for all sequences of the batch; [num_layers], zero unless decoding.
        touched: Bytes of weights and KV cache that one micro-batch touches; [num_layers].
        streamed: The part of ``traffic`` that always comes from the slowest tier; [num_layers]. It is the KV cache of a
            micro-batch while others decode in between: it comes round once a token, after all the others'.
        buffers: Bytes of temporaries at their peak; [num_layers].
        cuts: Bytes of the activation that crosses each cut, the model's input and output included;
            [num_layers + 1].
        training: Bytes of gradients and Adam states; [num_layers], zero unless training.
        step: Bytes that the optimizer's step takes for a while, when no activations are left; [num_layers], zero unless
            training. A stage's are at most ``largest_step``.
        saved: Bytes kept per micro-batch in flight for its backward pass; [num_layers], zero unless training.
        recomputed: Bytes that a checkpointed layer keeps while it runs backward; [num_layers], zero otherwise.
    """

    def __init__(self, profile: ModelProfile, workload: Workload) -> None:
        self.layers = profile.layers
        self.measured_on = profile.measured_on
        self.is_training = workload.phase == "train"
        self.tokens = workload.chosen_micro_batch * workload.tokens_per_sequence
        self.batch = workload.batch
        self._dtype = profile.dtype
        self._checkpointing = workload.checkpointing and self.is_training
        active = [float(not (workload.phase == "decode" and layer.runs_once)) for layer in self.layers]
        self._active = np.asarray(active)
        self.largest_step = math.inf
        self._count_work(workload)
        self._count_memory(profile, workload)
        self.measured = _column([_measured(layer, self.passes) for layer in self.layers])
        self._resident = _column([_resident(layer, self.passes) for layer in self.layers])

    @property
    def passes(self) -> int:
        """Forward passes' worth of compute per micro-batch."""
        return (4 if self._checkpointing else 3) if self.is_training else 1

    def _count_work(self, workload: Workload) -> None:
        decode, sequence = workload.phase == "decode", workload.sequence
        sequences, tokens = workload.chosen_micro_batch, self.tokens
        kept = [0 if self.is_training else min(sequence, layer.kv_window or sequence) for layer in self.layers]
        self.kv_per_sequence = _column(
            [layer.kv_bytes_per_token * count for layer, count in zip(self.layers, kept, strict=True)]
        )
        cross = sequence * (1 if decode else sequence)
        products = [
            layer.flops_per_token * tokens
            + layer.flops_per_pair
            * sequences
            * attention_pairs(sequence, layer.window, decode=decode, causal=layer.causal)
            + layer.flops_per_cross_pair * sequences * cross
            for layer in self.layers
        ]
        self.flops = self.passes * self._active * _column(products)
        weights = _column([layer.weight_traffic_bytes + _experts_read(layer, tokens) for layer in self.layers])
        read = self._active * weights
        cache = self._active * self.kv_per_sequence * sequences if decode else np.zeros(len(self.layers))
        activations = _column([layer.traffic_bytes_per_token * tokens for layer in self.layers])
        self.traffic = self.passes * (read + self._active * activations + cache)
        self.touched = read + cache
        self.streamed = cache if workload.num_micro_batches > 1 else np.zeros(len(self.layers))

    def _count_memory(self, profile: ModelProfile, workload: Workload) -> None:
        layers, tokens, active = self.layers, self.tokens, self._active
        nothing = np.zeros(len(layers))
        self.weights = _column([layer.weight_bytes for layer in layers])
        self.kv_cache = self.kv_per_sequence * workload.batch if workload.phase == "decode" else nothing
        self.buffers = np.ceil(active * _column([layer.buffer_bytes_per_token * tokens for layer in layers]))
        outputs = np.ceil(active * _column([layer.output_bytes_per_token * tokens for layer in layers]))
        self.cuts = np.concatenate([[np.ceil(active[0] * profile.input_bytes_per_token * tokens)], outputs])
        if not self.is_training:
            self.training = self.saved = self.recomputed = self.step = nothing
            self._state_per_parameter = self._step_per_parameter = 0.0
            return
        self._state_per_parameter, self._step_per_parameter = _training_bytes(profile.dtype, workload)
        if profile.dtype == "float32" and not workload.zero_stage:
            self.largest_step = float(_BUCKET_BYTES)
        state = _column([layer.weight_bytes + self._state_per_parameter * layer.parameters for layer in layers])
        self.step = np.ceil(_column([self._step_per_parameter * layer.parameters for layer in layers]))
        saved = np.ceil(_column([layer.saved_bytes_per_token * tokens for layer in layers]))
        self.training = np.ceil(state)
        self.saved = self.cuts[:-1] if self._checkpointing else saved
        self.recomputed = saved if self._checkpointing else nothing

    def seconds(self, device: Device, tier: int, group: tuple[Link, int] | None = None) -> FloatArray:
        """Seconds of each layer when its stage lives in ``device.tiers[tier]``; shape [num_layers].

        Args:
            device: What the stage, or each member of its group, runs on.
            tier: Index of the memory tier.
            group: Link and size of the tensor-parallel group, if there is one.
        """
        roofline = self._roofline(device, tier)
        measured = self._moved(self.measured, roofline, device, -1)
        if tier == 0 and len(device.tiers) > 1:
            measured = np.fmin(measured, self._moved(self._resident, roofline, device, 0))  # fmin passes over NaN
        seconds = self._active * np.where(np.isnan(measured), roofline, measured)
        return seconds if group is None else seconds + self._all_reduce_seconds(*group)

    def _moved(self, measured: FloatArray, roofline: FloatArray, device: Device, tier: int) -> FloatArray:
        """Measured seconds as they are, or scaled from the device and tier that they were measured on."""
        if self.measured_on is None or self.measured_on.name == device.name:
            return measured
        there = self._roofline(self.measured_on, range(len(self.measured_on.tiers))[tier])
        return np.asarray(measured * np.divide(roofline, there, out=np.ones_like(there), where=there > 0))

    def _roofline(self, device: Device, tier: int) -> FloatArray:
        overhead = (
            self.passes
            * self._active
            * _column([device.layer_overhead_seconds * _LAUNCHES.get(layer.kind, 0.0) for layer in self.layers])
        )
        compute = self.flops / device.flops(self._dtype)
        return np.maximum(np.maximum(compute, self.moving_seconds(device, tier)), overhead)

    def moving_seconds(self, device: Device, tier: int) -> FloatArray:
        """Seconds that each layer's traffic takes when its stage lives in ``device.tiers[tier]``; [num_layers]."""
        rate, slowest_rate = (device.tiers[index].achieved_bytes_per_second for index in (tier, -1))
        return (self.traffic - self.streamed) / rate + self.streamed / slowest_rate

    def _all_reduce_seconds(self, link: Link, size: int) -> FloatArray:
        def layer_seconds(layer: LayerCost) -> float:
            if not layer.num_all_reduces:
                return 0.0
            each = link.all_reduce_seconds(layer.all_reduce_bytes_per_token * self.tokens / layer.num_all_reduces, size)
            return layer.num_all_reduces * each

        trips = self.passes - 1 if self.is_training else 1  # a backward pass has as many as a forward pass
        return trips * self._active * _column([layer_seconds(layer) for layer in self.layers])

    @cached_property
    def peaks(self) -> RangeMax:
        """What comes and goes, at its largest: input and output of a layer, and its temporaries."""
        return RangeMax(self.cuts[:-1] + self.cuts[1:], self.buffers + self.recomputed)

    @cached_property
    def shared_pairs(self) -> list[tuple[int, int, int, int, int]]:
        """(layer, next one with the same key, shared bytes, their training state, step): once if a stage holds both."""
        last: dict[str, int] = {}
        pairs = []
        size = DTYPE_BYTES[self._dtype]
        per_byte = 1 + self._state_per_parameter / size if self.is_training else 0.0
        for index, layer in enumerate(self.layers):
            if layer.shared_key is None:
                continue
            if layer.shared_key in last:
                state = math.floor(layer.shared_bytes * per_byte)
                step = math.floor(layer.shared_bytes * self._step_per_parameter / size)
                pairs.append((last[layer.shared_key], index, layer.shared_bytes, state, step))
            last[layer.shared_key] = index
        return pairs


def _training_bytes(dtype: str, workload: Workload) -> tuple[float, float]:
    """(stays, comes and goes in the optimizer's step) per parameter, beside its weight and a gradient in its precision.

    Adam's two moments in float32, and master weights beside 16-bit ones. With ZeRO stage 1 there are master weights in
    float32 too, and all of it is spread over the replicas. In bfloat16 it always is, and without ZeRO a second gradient
    sums up the micro-batches'. The step needs gradients in float32, for its share of the parameters. Not counted are
    the temporaries of an Adam that is not fused.

    Source:
        DeepSpeed 0.19.8: ``runtime/bf16_optimizer.py``, ``zero/stage_1_and_2.py``, ``fp16/fused_optimizer.py``,
        ``engine.py`` (``allreduce_no_retain``); allocations of each recorded.
    """
    replicas, zero = workload.data_parallel, workload.zero_stage
    if dtype == "float32":
        return (12 / replicas, 4 / replicas) if zero else (8.0, 4.0)
    if not zero:
        return (2 + 12 / replicas, 4 / replicas) if dtype == "bfloat16" else (12.0, 4.0)
    if workload.float32_gradients:
        return 4 + 12 / replicas, 0.0
    return 12 / replicas, max(4 / replicas - 2, 0.0)  # the 16-bit gradients are gone by then


def _experts_read(layer: LayerCost, tokens: int) -> float:
    """Expected bytes of routed experts that any token of a micro-batch passes, if all are equally likely."""
    if not layer.expert_bytes:
        return 0.0
    missed = (1 - layer.experts_per_token / layer.num_experts) ** tokens
    return float(layer.expert_bytes * (1 - missed))


def _column(values: list[float] | list[int]) -> FloatArray:
    return np.asarray(values, dtype=np.float64)


def _measured(layer: LayerCost, passes: int) -> float:
    if layer.seconds is None:
        return float("nan")
    if passes == 1:
        return layer.seconds
    backward = layer.backward_seconds if layer.backward_seconds is not None else 2 * layer.seconds
    return (passes - 2) * layer.seconds + backward


def _resident(layer: LayerCost, passes: int) -> float:
    if layer.seconds is None or layer.resident_seconds is None or passes > 1:
        return float("nan")
    return layer.resident_seconds
