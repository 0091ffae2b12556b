"""Every layer of a model timed alone on this device, as scoring and generation run it.

A pass of a stage takes what all its layers take, and something besides: masks, rotary tables, the launch of a graph.
The two are told apart by stages of a few copies of a block and of more: the difference is blocks alone. Copies have
weights of their own, more than caches hold, so that weights come from memory; one copy over and over finds them in the
cache, if they fit. What is no block (embedding, norm, head) is timed in a stage of its own, from which the time of a
stage without layers is taken off. All the stages that are compared take turns, so that a clock that falls meets all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from lp_plugin.errors import RuntimeEnvironmentError
from lp_plugin.integrations.deepspeed.alone.passes import Execution, Passes, Shape, make_passes
from lp_plugin.integrations.deepspeed.alone.stages import read_mapping, stage_of_copies, stored_bytes
from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.measure.layers import give_back_memory
from lp_plugin.measure.turns import seconds_in_turns
from lp_plugin.measured import LayerTimes
from lp_plugin.model import LayerCost, ModelProfile
from lp_plugin.model.layers import Granularity
from lp_plugin.solver.layer_table import LayerTable
from lp_plugin.workload import Phase, Workload

__all__ = ["time_model_layers"]

_TIERS = 4
"""Copies that take turns hold more than so many times the first tier."""
_MOST_COPIES = 6
"""Of a layer in a stage, and in turn; torch.compile takes up to 8 stages of one kind."""
_SMALL = 0.01
"""A layer of less than this share of the first tier is timed on one copy: its weights don't count."""
_AMPLE_BYTES = 2**30
"""Stages compared hold 1 and 4 parts of copies if that makes fewer bytes of weights, else 1 and 2; compiling takes time
for each copy, so then 1 and 2, too."""
_BLOCKS = frozenset({"block", "attention", "mlp"})


def time_model_layers(
    config: Mapping[str, Any],
    *,
    dtype: str,
    device: torch.device,
    rows: int,
    tokens: int,
    cache_length: int = 0,
    tensor_parallel: int = 1,
    execution: Execution,
    granularity: Granularity = "layer",
    first_tier_bytes: int,
) -> LayerTimes:
    """Times every distinct layer, with random weights and inputs, in this process alone.

    All-reduces of tensor parallelism are not in the figures.

    Args:
        config: transformers' configuration, the JSON object of a ``config.json``.
        dtype: Precision of weights and activations.
        device: Where.
        rows: Sequences of a micro-batch.
        tokens: Of each sequence; no matter when decoding.
        cache_length: Tokens of a static KV cache, for a decode step of one token per row; 0 for whole sequences
            without cache.
        tensor_parallel: Ranks that share each layer; timed is what the first one holds.
        execution: Launched one by one, or replayed as CUDA graphs, of compiled layers. What can't be captured is
            launched one by one, and the result says so.
        granularity: Whether blocks are whole or attention and MLP apart.
        first_tier_bytes: What the device's first memory tier can hold of a stage; 0 if it has none.

    Returns:
        The times.

    Raises:
        RuntimeEnvironmentError: If graphs are asked for without a GPU.
        UnsupportedModelError, ModelConfigError, WorkloadError: If the model can't be run or shared so.
    """
    if execution != "eager" and device.type != "cuda":
        raise RuntimeEnvironmentError(f"layers on {device.type} can't run as CUDA graphs; ask for eager execution.")
    profile = ModelProfile.from_config(dict(config), dtype=dtype, granularity=granularity)
    bench = _Bench(
        read_mapping(config),
        profile.sharded(tensor_parallel) if tensor_parallel > 1 else profile,
        device,
        Shape(rows=rows, tokens=1 if cache_length else tokens, cache_length=cache_length, dtype=getattr(torch, dtype)),
        execution,
        first_tier_bytes,
    )
    return bench.run()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """What one distinct layer gave."""

    seconds: float
    resident_seconds: float | None
    weight_bytes: int
    peak_bytes: int | None
    spread: float
    launch_seconds: float = 0.0
    pass_seconds: float = 0.0


class _Bench:
    """What is timed, and how."""

    def __init__(
        self,
        config: PretrainedConfig,
        profile: ModelProfile,
        device: torch.device,
        shape: Shape,
        execution: Execution,
        tier_bytes: int,
    ) -> None:
        self.config, self.profile, self.device, self.shape = config, profile, device, shape
        self.tier_bytes = tier_bytes
        self.kinds = [layer.anywhere for layer in profile.layers]
        self.fits = self._find_fitting()
        self.execution: Execution = execution if execution == "eager" or self._capturable() else "eager"

    def run(self) -> LayerTimes:
        """Times each distinct layer once."""
        timed: dict[LayerCost, _Timed] = {}
        for index, kind in enumerate(self.kinds):
            if kind not in timed:
                timed[kind] = self._time_block(index) if kind.kind in _BLOCKS else self._time_end(index)
                if self.execution == "compiled":
                    torch.compiler.reset()
                if self.device.type == "cuda":
                    give_back_memory()
        layers = [timed[kind] for kind in self.kinds]
        return LayerTimes(
            tensor_parallel=self.profile.tensor_parallel,
            execution=self.execution,
            granularity=self.profile.granularity,
            rows=self.shape.rows,
            seconds=tuple(layer.seconds for layer in layers),
            resident_seconds=tuple(layer.resident_seconds for layer in layers),
            weight_bytes=tuple(layer.weight_bytes for layer in layers),
            peak_bytes=tuple(layer.peak_bytes for layer in layers),
            launch_seconds=max(layer.launch_seconds for layer in layers),
            pass_seconds=max(layer.pass_seconds for layer in layers),
            spread=max(layer.spread for layer in layers),
        )

    def _capturable(self) -> bool:
        """Whether CUDA graphs can hold every layer."""
        return all(self._stage(index, index + 1).capturable for index in map(self.kinds.index, set(self.kinds)))

    def _find_fitting(self) -> list[bool]:
        """Whether each layer's working set fits the first tier."""
        rows, length = self.shape.rows, self.shape.cache_length
        phase: Phase = "decode" if length else "prefill"
        workload = Workload(phase=phase, batch=rows, sequence=length or self.shape.tokens, micro_batch=rows)
        table = LayerTable(self.profile, workload)
        working_sets = table.touched + table.cuts[:-1] + table.cuts[1:] + table.buffers
        return [bool(num_bytes <= self.tier_bytes) for num_bytes in working_sets]

    def _stage(self, start: int, stop: int, copies: int = 1) -> DecoderStage:
        return stage_of_copies(
            self.config,
            start,
            stop,
            copies=copies,
            halves=self.profile.granularity == "sublayer",
            tensor_parallel=self.profile.tensor_parallel,
            device=self.device,
            dtype=self.shape.dtype,
        )

    def _passes(self, *stages: DecoderStage) -> Passes:
        return make_passes(stages, self.shape, self.execution, self.device)

    def _copies(self, weight_bytes: int) -> int:
        """So many that weights come from memory when they take turns."""
        if weight_bytes < _SMALL * self.tier_bytes:
            return 1
        return max(1, min(math.ceil(_TIERS * self.tier_bytes / max(weight_bytes, 1)), _MOST_COPIES))

    def _time_block(self, index: int) -> _Timed:
        """A block, or half of one, from stages of a few copies and of more."""
        one = self._stage(index, index + 1)
        weight_bytes = stored_bytes(one)
        copies = self._copies(weight_bytes)
        short = one if copies == 1 else self._stage(index, index + 1, copies)
        ample = 5 * copies * weight_bytes < _AMPLE_BYTES and self.execution != "compiled"
        more = copies * (4 if ample else 2)
        passes = [self._passes(short), self._passes(self._stage(index, index + 1, more))]
        peak_bytes, launch_seconds = passes[0].peak_bytes, passes[1].launch_seconds / more
        resides = self.fits[index] and copies > 1
        if resides:
            passes.append(self._passes(one))
            peak_bytes = passes[2].peak_bytes
        timed = seconds_in_turns([each.ready() for each in passes], self.device, warm_up_seconds=1.0)
        few, many, *alone = (each.seconds for each in timed)
        seconds = max((many - few) / (more - copies), 0.0)
        pass_seconds = max(few - copies * seconds, 0.0)
        resident = max(alone[0] - pass_seconds, 0.0) if alone else seconds
        return _Timed(
            seconds=seconds,
            resident_seconds=resident if self.fits[index] else None,
            weight_bytes=weight_bytes,
            peak_bytes=peak_bytes,
            spread=max(each.spread for each in timed),
            launch_seconds=launch_seconds,
            pass_seconds=pass_seconds,
        )

    def _time_end(self, index: int) -> _Timed:
        """What is no block: copies in turn, and one alone, beside a stage without layers."""
        stage = self._stage(index, index + 1)
        weight_bytes = stored_bytes(stage)
        copies = self._copies(weight_bytes)
        lone = self._passes(stage, *(self._stage(index, index + 1) for _ in range(copies - 1)))
        passes = [lone, self._passes(self._stage(index, index))]
        if self.fits[index] and copies > 1:
            passes.append(self._passes(self._stage(index, index + 1)))
        timed = seconds_in_turns([each.ready() for each in passes], self.device)
        with_layer, without, *alone = (each.seconds for each in timed)
        seconds = max(with_layer - without, 0.0)
        resident = max(alone[0] - without, 0.0) if alone else seconds
        return _Timed(
            seconds=seconds,
            resident_seconds=resident if self.fits[index] else None,
            weight_bytes=weight_bytes,
            peak_bytes=lone.peak_bytes,
            spread=max(each.spread for each in timed),
        )
