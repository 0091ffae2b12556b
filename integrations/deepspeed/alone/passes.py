"""Passes of stages without a pipeline, by the code that runs them in one: `ForwardPipeline`'s and generation's."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from transformers import GenerationConfig, LogitsProcessorList

from lp_plugin.integrations.deepspeed.forward.lone_passes import LonePasses, check_capturable
from lp_plugin.integrations.deepspeed.forward.stage_work import StageWork
from lp_plugin.integrations.deepspeed.generation.choosing import Chooser
from lp_plugin.integrations.deepspeed.generation.lean import LeanPass
from lp_plugin.integrations.deepspeed.generation.sampling import Sampling
from lp_plugin.integrations.deepspeed.generation.slot_state import SlotState
from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.measure.graphs import recorded, spread_over_streams
from lp_plugin.measure.layers import synchronize
from lp_plugin.measure.turns import Runner

__all__ = ["Execution", "LoneStage", "Passes", "Shape", "make_passes"]

Execution = Literal["eager", "graphs", "compiled"]
"""Launched one by one, or replayed as CUDA graphs, of compiled stages."""

_ROUNDS = 4
"""Passes of a stage at a time on a GPU, in a captured graph too: a pipeline's graph holds all micro-batches."""
_LAUNCHES = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a pass takes."""

    rows: int
    """Sequences."""
    tokens: int
    """Of each."""
    cache_length: int
    """Tokens of the cache that a decode step reads; 0 for whole sequences without cache."""
    dtype: torch.dtype
    """Of activations."""


class Passes(abc.ABC):
    """Passes of one or several stages in turn.

    Attributes:
        peak_bytes: Most memory beyond weights and input in a pass of the first stage; None on a CPU, and for caches too
            short for a few passes.
        launch_seconds: Host seconds to launch such a pass kernel by kernel; 0 on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.peak_bytes: int | None = None
        self.launch_seconds = 0.0
        self._device = device

    @abc.abstractmethod
    def launched(self) -> Runner:
        """Launched kernel by kernel, compiled if that is asked for, but never captured."""

    @abc.abstractmethod
    def ready(self) -> Runner:
        """To be timed, captured if that is asked for."""

    def _look(self, launch: Callable[[], Any]) -> None:
        """Measures memory and host seconds of a pass; makes one on a CPU, too."""
        launch()
        if self._device.type != "cuda":
            return
        seconds = []
        for _ in range(_LAUNCHES):
            synchronize(self._device)
            before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            start = time.perf_counter()
            launch()
            seconds.append(time.perf_counter() - start)
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - before
        synchronize(self._device)
        self.launch_seconds = sorted(seconds)[_LAUNCHES // 2]


def make_passes(stages: Sequence[DecoderStage], shape: Shape, execution: Execution, device: torch.device) -> Passes:
    """Passes with random weights and inputs.

    Args:
        stages: All of one kind, materialised.
        shape: Of a micro-batch.
        execution: How they are launched.
        device: Where they lie.
    """
    return (_Steps if shape.cache_length else _Sequences)(stages, shape, execution, device)


class LoneStage:
    """A stage over whole sequences without a pipeline, to be timed again and again.

    What `ForwardPipeline.alone_seconds` does with a stage of an engine, by the same code.

    Args:
        stage: Materialised; all-reduces of tensor parallelism are not in its passes.
        shape: Of a micro-batch.
        execution: How its passes are launched.
        device: Where it lies.

    Raises:
        UnsupportedModelError: If graphs are asked for, and its passes ask the device for values.
    """

    def __init__(self, stage: DecoderStage, shape: Shape, execution: Execution, device: torch.device) -> None:
        if execution != "eager":
            check_capturable(stage)
        spread_over_streams(device)
        self._work = work = _work(stage, shape, device, compiled=execution == "compiled")
        with work.passing():
            self._lone = LonePasses(
                lambda: work.run(0, labelled=True), device, pool=None, replayed=execution != "eager"
            )

    def seconds(self) -> float:
        """Seconds of a pass, the mean over 0.3 s (CPU 0.1 s) of passes."""
        with self._work.passing():
            return self._lone.seconds()


class _Sequences(Passes):
    """Whole sequences, as `ForwardPipeline` runs them."""

    def __init__(
        self, stages: Sequence[DecoderStage], shape: Shape, execution: Execution, device: torch.device
    ) -> None:
        super().__init__(device)
        self._replays = execution != "eager"
        self._works = [_work(stage, shape, device, compiled=execution == "compiled") for stage in stages]
        self._rounds = _ROUNDS if device.type == "cuda" and len(stages) == 1 else 1
        with self._works[0].passing():
            self._look(lambda: self._works[0].run(0, labelled=True))

    def launched(self) -> Runner:
        return Runner(run=self._round, passes=self._rounds * len(self._works))

    def ready(self) -> Runner:
        runner = self.launched()
        if not self._replays:
            return runner
        self._graph = recorded(self._round, warm_up=self._round)
        return dataclasses.replace(runner, run=self._replay)

    def _replay(self) -> None:
        """Needs the buffers that this object keeps, as the graph reads them."""
        self._graph.replay()

    def _round(self) -> None:
        for work in self._works:
            with work.passing():
                for _ in range(self._rounds):
                    work.run(0, labelled=True)


class _Steps(Passes):
    """Decode steps on a cache, as `generate` runs them."""

    def __init__(
        self, stages: Sequence[DecoderStage], shape: Shape, execution: Execution, device: torch.device
    ) -> None:
        super().__init__(device)
        self._stages, self._shape = stages, shape
        self._most = max(shape.cache_length - 1, 1)
        self._replays = execution != "eager"
        with torch.no_grad():
            self._slots = [_slot(stage, shape, device, compiled=execution == "compiled") for stage in stages]
            self._reset()
            if self._most > _LAUNCHES:
                self._look(self._slots[0].decode)

    def launched(self) -> Runner:
        return Runner(run=self._round, passes=len(self._slots), most=self._most, prepare=self._reset)

    def ready(self) -> Runner:
        if self._replays:
            with torch.no_grad():
                for slot in self._slots:
                    slot.capture(self._slots[0].pool)
        return self.launched()

    def _round(self) -> None:
        with torch.no_grad():
            for slot in self._slots:
                slot.decode()

    def _reset(self) -> None:
        """Leaves one token in each cache."""
        ones = torch.ones(self._shape.rows, dtype=torch.long, device=self._device)
        with torch.no_grad():
            for slot, stage in zip(self._slots, self._stages, strict=True):
                slot.prefill(_token(stage, self._shape, self._device), ones)


def _work(stage: DecoderStage, shape: Shape, device: torch.device, *, compiled: bool) -> StageWork:
    """A stage of `ForwardPipeline` with one micro-batch, which keeps, after the head, the logits of the last tokens."""
    module = SimpleNamespace(
        stage=stage,
        loss_fn=lambda logits, _: logits[:, -1],
        device=device,
        torch_dtype=shape.dtype,
        hf_config=SimpleNamespace(vocab_size=_known_tokens(stage)),
    )
    return StageWork(
        module,
        is_first=stage.has_embedding,
        is_last=stage.has_head,
        num_micro_batches=1,
        rows=shape.rows,
        tokens=shape.tokens,
        width=int(stage.config.hidden_size),
        num_buffers=1,
        compiled=compiled,
    )


def _slot(stage: DecoderStage, shape: Shape, device: torch.device, *, compiled: bool) -> SlotState:
    """A slot of generation, greedy after the head."""
    width = int(stage.config.hidden_size)
    sampling = Sampling(
        model=stage.model,
        config=GenerationConfig(do_sample=False),
        device=device,
        new_tokens=shape.cache_length,
        min_new_tokens=0,
        ends=(),
        padding=0,
        shared=LogitsProcessorList(),
        by_row=False,
    )
    slot = SlotState(
        stage,
        rows=shape.rows,
        length=shape.cache_length,
        widths=(0 if stage.has_embedding else width, 0 if stage.has_head else width),
        is_first=stage.has_embedding,
        chooser=Chooser(sampling, shape.rows, shape.cache_length) if stage.has_head else None,
        lean=LeanPass(stage.model),
        compiled=compiled,
        device=device,
        dtype=shape.dtype,
    )
    slot.received[:-1].copy_(_token(stage, shape, device).flatten())
    return slot


def _token(stage: DecoderStage, shape: Shape, device: torch.device) -> torch.Tensor:
    """Random input of one token per row: ids that this rank holds, or an activation."""
    if stage.has_embedding:
        return torch.randint(_known_tokens(stage), (shape.rows, 1), device=device)
    return torch.randn(shape.rows, 1, int(stage.config.hidden_size), device=device).to(shape.dtype)


def _known_tokens(stage: DecoderStage) -> int:
    """Rows of the table of tokens; 1 where there is none."""
    return int(stage.model.get_input_embeddings().weight.shape[0]) if stage.has_embedding else 1
