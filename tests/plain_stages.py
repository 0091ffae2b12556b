"""What a stage costs, by plain loops over its layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lp_plugin import Cluster, Device, LayerCost, ModelProfile, Workload

INFINITE = float("inf")


def count_pairs(sequence: int, window: int | None, phase: str, *, causal: bool = True) -> int:
    """(query, key) pairs of one sequence, counted one by one."""
    if phase == "decode":  # the newest token looks back
        return sum(window is None or sequence - 1 - key < window for key in range(sequence))
    count = 0
    for query, key in itertools.product(range(sequence), repeat=2):
        if causal:
            count += key <= query and (window is None or query - key < window)
        else:
            count += window is None or abs(query - key) <= window // 2
    return count


@dataclass(frozen=True)
class PlainStage:
    """One stage's cost, by kind."""

    compute_seconds: float
    resident_seconds: float
    transfer_seconds: float
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    buffer_bytes: int
    training_bytes: int
    working_set_bytes: float
    traffic_bytes: float
    hit_fraction: float
    room: float
    """Sequences whose KV cache fits beside the rest; inf if it keeps none; below 0 if not even the rest fits."""
    tier: int

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.transfer_seconds

    @property
    def memory_bytes(self) -> int:
        kinds = (self.weight_bytes, self.kv_bytes, self.activation_bytes, self.buffer_bytes, self.training_bytes)
        return sum(kinds)


class PlainStages:
    """Seconds and bytes of any layers on any device of a cluster, layer by layer."""

    def __init__(self, profile: ModelProfile, cluster: Cluster, workload: Workload) -> None:
        self.profile, self.cluster, self.workload = profile, cluster, workload
        self._train, self._decode = workload.phase == "train", workload.phase == "decode"
        self._tokens = workload.micro_batch * (1 if self._decode else workload.sequence)
        forwards = 2 if workload.checkpointing else 1
        self._passes = forwards + 2 if self._train else 1  # a backward pass computes as much as two forward passes
        self._known: dict[tuple[int, int, int], PlainStage] = {}
        self._seconds: dict[tuple[int, int, int], float] = {}

    def __call__(self, position: int, start: int, stop: int) -> PlainStage:
        key = (position, start, stop)
        if key not in self._known:
            self._known[key] = self._stage(*key)
        return self._known[key]

    def _stage(self, position: int, start: int, stop: int) -> PlainStage:
        device, layers = self.cluster.devices[position], self.profile.layers[start:stop]
        in_and_out = max(self._crossing(index) + self._crossing(index + 1) for index in range(start, stop))
        buffers = max(self._buffer(index) for index in range(start, stop))
        weights, training = self._held(layers)
        step = self._step(layers)
        in_flight = 0
        if self._train:
            micro_batches = len(range(0, self.workload.batch, self.workload.micro_batch))
            in_flight = min(len(self.cluster.devices) - position, micro_batches)
        saved = sum(self._saved(index) for index in range(start, stop))
        per_sequence = sum(self._kept(layer) for layer in layers)
        cache = per_sequence * self.workload.batch if self._decode else 0

        touched = sum(self._read(layer) for layer in layers)
        traffic = sum(self._passes * (self._read(layer) + self._activations(layer)) for layer in layers)
        working_set = touched + in_and_out + buffers
        tier = next(
            (index for index, level in enumerate(device.tiers) if working_set <= level.usable_bytes),
            len(device.tiers) - 1,
        )
        hit = 0.0
        if working_set <= device.tiers[0].usable_bytes:
            hit = 1 - sum(self._streamed(layer) for layer in layers) / traffic if traffic else 1.0
        elif in_and_out + buffers <= device.tiers[0].usable_bytes and traffic:
            hit = max(1 - self._passes * touched / traffic, 0.0)
        activations, temporaries = in_and_out + in_flight * saved, in_and_out + buffers
        if activations + temporaries < step:  # the optimizer's step, when all activations are gone
            temporaries = step - activations
        left = device.memory.usable_bytes
        left -= weights + training + activations + temporaries
        room = INFINITE if left >= 0 else -1
        if left >= 0 and per_sequence:
            room = left // per_sequence
        return PlainStage(
            compute_seconds=sum(self._layer_seconds(position, tier, index) for index in range(start, stop)),
            resident_seconds=sum(self._layer_seconds(position, 0, index) for index in range(start, stop)),
            transfer_seconds=self._transfers(position, start, stop),
            weight_bytes=weights,
            kv_bytes=cache,
            activation_bytes=activations,
            buffer_bytes=temporaries,
            training_bytes=training,
            working_set_bytes=working_set,
            traffic_bytes=traffic,
            hit_fraction=hit,
            room=room,
            tier=tier,
        )

    def _runs(self, layer: LayerCost) -> bool:
        return not (self._decode and layer.runs_once)

    def _crossing(self, cut: int) -> int:
        """Bytes that cross the cut before a layer; the model's own input and output at the ends."""
        source = self.profile.layers[cut - 1 if cut else 0]
        per_token = source.output_bytes_per_token if cut else self.profile.input_bytes_per_token
        return math.ceil(per_token * self._tokens) if self._runs(source) else 0

    def _buffer(self, index: int) -> int:
        layer = self.profile.layers[index]
        if not self._runs(layer):
            return 0
        own = math.ceil(layer.buffer_bytes_per_token * self._tokens)
        if self.workload.checkpointing:  # the inside of one layer, computed again
            own += math.ceil(layer.saved_bytes_per_token * self._tokens)
        return own

    def _saved(self, index: int) -> int:
        """What waits for the backward pass of one micro-batch."""
        if self.workload.checkpointing:
            return self._crossing(index)
        return math.ceil(self.profile.layers[index].saved_bytes_per_token * self._tokens)

    def _held(self, layers: Sequence[LayerCost]) -> tuple[int, int]:
        """Bytes of weights, and of gradients and Adam states; shared ones once."""
        weights, training = 0, 0
        seen: set[str] = set()
        element = 4 if self.profile.dtype == "float32" else 2
        replicas = self.workload.data_parallel
        # two moments; master weights beside 16 bit, and with ZeRO, which spreads all of them
        adam = Fraction(8 if element == 4 and not self.workload.zero_stage else 12)
        if self.workload.zero_stage or self.profile.dtype == "bfloat16":
            adam /= replicas
        if self.profile.dtype == "bfloat16" and not self.workload.zero_stage:
            adam += 2  # what sums up the micro-batches' gradients
        if self.workload.zero_stage and self.workload.float32_gradients and element == 2:
            adam += 4
        for layer in layers:
            again = layer.shared_bytes if layer.shared_key in seen else 0
            if layer.shared_key is not None:
                seen.add(layer.shared_key)
            weights += layer.weight_bytes - again
            if self._train:
                training += math.ceil(layer.weight_bytes + adam * layer.parameters)
                training -= math.floor(again + adam * again / element)
        return weights, training

    def _step(self, layers: Sequence[LayerCost]) -> int:
        """Bytes of gradients in float32, of a replica's share of the parameters; in 16 bits in place of the others."""
        if not self._train:
            return 0
        workload, element = self.workload, 4 if self.profile.dtype == "float32" else 2
        shares = workload.data_parallel if workload.zero_stage or self.profile.dtype == "bfloat16" else 1
        each = Fraction(4, shares)
        if workload.zero_stage and element == 2:
            each = Fraction(0) if workload.float32_gradients else max(each - 2, Fraction(0))
        total, seen = 0, set()
        for layer in layers:
            total += math.ceil(each * layer.parameters)
            if layer.shared_key in seen:
                total -= math.floor(each * layer.shared_bytes / element)
            seen.add(layer.shared_key or layer.name)
        return min(total, 2 * 10**9) if element == 4 and not workload.zero_stage else total

    def _kept(self, layer: LayerCost) -> int:
        """Bytes of KV cache of one sequence."""
        if self._train:
            return 0
        positions = self.workload.sequence if layer.kv_window is None else min(layer.kv_window, self.workload.sequence)
        return layer.kv_bytes_per_token * positions

    def _read(self, layer: LayerCost) -> float:
        """Bytes of weights and KV cache that one micro-batch reads once."""
        if not self._runs(layer):
            return 0
        read: float = layer.weight_traffic_bytes
        if layer.num_experts:
            idle = 1.0  # the chance that no token picks one expert
            for _ in range(self._tokens):
                idle *= 1 - layer.experts_per_token / layer.num_experts
            read += layer.expert_bytes * (1 - idle)
        return read + (self._kept(layer) * self.workload.micro_batch if self._decode else 0)

    def _streamed(self, layer: LayerCost) -> int:
        """Bytes of KV cache of one micro-batch, if others decode before it is read again."""
        takes_turns = self._decode and self.workload.micro_batch < self.workload.batch
        return self._kept(layer) * self.workload.micro_batch if takes_turns and self._runs(layer) else 0

    def _activations(self, layer: LayerCost) -> float:
        return layer.traffic_bytes_per_token * self._tokens if self._runs(layer) else 0

    def _transfers(self, position: int, start: int, stop: int) -> float:
        trips = 2 if self._train else 1  # gradients come back
        seconds = 0.0
        if position > 0:
            seconds += trips * self.cluster.links[position - 1].seconds(self._crossing(start))
        if position < len(self.cluster.devices) - 1:
            seconds += trips * self.cluster.links[position].seconds(self._crossing(stop))
        return seconds

    def _layer_seconds(self, position: int, tier: int, index: int) -> float:
        key = (position, tier, index)
        if key not in self._seconds:
            layer, device = self.profile.layers[index], self.cluster.devices[position]
            self._seconds[key] = self._alone(layer, device, tier) + self._all_reduces(layer, position)
        return self._seconds[key]

    def _alone(self, layer: LayerCost, device: Device, tier: int) -> float:
        if not self._runs(layer):
            return 0.0
        roofline = self._roofline(layer, device, tier)
        if layer.seconds is None:
            return roofline
        forward, backward = layer.seconds, layer.backward_seconds
        measured = forward
        if self._train:
            measured += forward if self.workload.checkpointing else 0
            measured += 2 * forward if backward is None else backward
        there = self.profile.measured_on
        elsewhere = there is not None and there.name != device.name
        slowest = self._roofline(layer, there, len(there.tiers) - 1) if elsewhere else 0
        found = measured * roofline / slowest if slowest else measured
        near = layer.resident_seconds
        if near is None or self._train or tier > 0 or len(device.tiers) == 1:
            return found
        fastest = self._roofline(layer, there, 0) if elsewhere else 0
        return min(found, near * roofline / fastest if fastest else near)

    def _roofline(self, layer: LayerCost, device: Device, tier: int) -> float:
        workload = self.workload
        pairs = count_pairs(workload.sequence, layer.window, workload.phase, causal=layer.causal)
        cross = workload.sequence * (1 if self._decode else workload.sequence)
        products = layer.flops_per_token * self._tokens
        products += (layer.flops_per_pair * pairs + layer.flops_per_cross_pair * cross) * workload.micro_batch
        streamed = self._streamed(layer)
        moved = self._read(layer) + self._activations(layer) - streamed
        level, slowest = device.tiers[tier], device.tiers[-1]
        launches = {"block": 1.0, "attention": 0.5, "mlp": 0.5}.get(layer.kind, 0.0)
        return max(
            self._passes * products / (dict(device.peak_flops)[self.profile.dtype] * device.compute_efficiency),
            self._passes * moved / (level.bandwidth_bytes_per_second * level.bandwidth_efficiency)
            + streamed / (slowest.bandwidth_bytes_per_second * slowest.bandwidth_efficiency),
            self._passes * device.layer_overhead_seconds * launches,
        )

    def _all_reduces(self, layer: LayerCost, position: int) -> float:
        if self.cluster.group_size == 1 or not self._runs(layer) or not layer.num_all_reduces:
            return 0.0
        each = layer.all_reduce_bytes_per_token * self._tokens / layer.num_all_reduces
        link = self.cluster.group_links[position]
        trips = self._passes - 1 if self._train else 1  # a backward pass has as many as a forward pass
        return trips * sum(link.all_reduce_seconds(each, self.cluster.group_size) for _ in range(layer.num_all_reduces))
