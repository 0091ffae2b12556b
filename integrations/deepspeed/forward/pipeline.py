"""`ForwardPipeline`: forward passes of all micro-batches through the stages of a DeepSpeed engine."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from deepspeed.runtime.pipe.schedule import PipeInstruction
from torch import distributed

from lp_plugin.errors import RuntimeEnvironmentError, WorkloadError
from lp_plugin.integrations.deepspeed.engine import stage_group
from lp_plugin.integrations.deepspeed.forward import schedule
from lp_plugin.integrations.deepspeed.forward.hops import Hops
from lp_plugin.integrations.deepspeed.forward.lone_passes import LonePasses, check_capturable
from lp_plugin.integrations.deepspeed.forward.stage_work import StageWork
from lp_plugin.integrations.deepspeed.generation.ring import Ring, find_widths
from lp_plugin.integrations.deepspeed.instructions import instructions
from lp_plugin.measure.graphs import recorded
from lp_plugin.measure.layers import synchronize
from lp_plugin.schedule import received_beside

__all__ = ["Execution", "ForwardPipeline"]

Execution = Literal["auto", "eager", "graphs", "compiled"]
"""``eager``: kernels are launched one by one. ``graphs``: a rank's passes and messages are replayed from CUDA graphs.
``compiled``: the same, of a stage that ``torch.compile`` has fused. ``auto``: graphs where launching kernels takes more
than half of a pass's time, else eager."""

_WORTH_IT = 0.5
"""Share of a pass's time that the host may take to launch it: now and then it takes twice as long as usual, and the
device would wait for it."""
_TIMED_PASSES = 5
_WARM_UP_SECONDS = 1.0
"""On a GPU, before a stage alone is timed first."""
_GRAPHS_DO_NOT_PAY, _GRAPHS_PAY, _NO_GRAPHS, _FAILED = range(4)
"""What a rank says to graphs; the highest vote of a pipeline's ranks decides."""


class ForwardPipeline:
    """Forward passes of micro-batches of one shape through all stages.

    Messages between stages travel while the stages compute (long ones come in between two passes of a GPU), and nothing
    but activations is sent. Making one is collective over the ranks of one pipeline, tensor-parallel ones included, as
    is running it; replicas of the pipeline don't wait for each other, and one may run alone. Several pipelines may
    share an engine, and take turns with its ``eval_batch`` and ``generate``.

    Args:
        engine: DeepSpeed's ``PipelineEngine`` over an ``HFPipelineModule``.
        num_micro_batches: Micro-batches of a run.
        rows: Sequences of each.
        tokens: Of each sequence, no padding among them.
        execution: How a rank runs its passes. ``graphs`` and ``compiled`` need GPUs; on CPUs ``auto`` is ``eager``.

    Attributes:
        execution: What was asked for, or chosen: ``eager``, ``graphs`` or ``compiled``; the same on all ranks of the
            pipeline.

    Raises:
        WorkloadError: If a number is below 1.
        RuntimeEnvironmentError: If graphs are asked for without a GPU, or another rank of the pipeline can't go on.
        UnsupportedModelError: If graphs are asked for, and the model's passes ask the device for values.
        torch.OutOfMemoryError: If this rank's passes don't fit; the pipeline's other ranks raise an error too.
    """

    execution: Execution

    def __init__(
        self, engine: Any, *, num_micro_batches: int, rows: int, tokens: int, execution: Execution = "auto"
    ) -> None:
        for name, value in (("num_micro_batches", num_micro_batches), ("rows", rows), ("tokens", tokens)):
            if value < 1:
                raise WorkloadError(f"{name} is {value}; it must be at least 1.")
        self._device = torch.device(engine.device)
        if execution in ("graphs", "compiled") and self._device.type != "cuda":
            raise RuntimeEnvironmentError(
                f"execution {execution!r} needs CUDA GPUs, but this job runs on {self._device.type}; "
                "choose 'eager' or 'auto'."
            )
        self._engine = engine
        self._num_micro_batches = num_micro_batches
        self._parts = schedule.graph_parts(num_micro_batches)
        self._graphs: dict[tuple[bool, int], torch.cuda.CUDAGraph] = {}
        """Of so many micro-batches with labels on this rank (True), or without."""
        self._results: dict[bool, torch.Tensor] = {}
        """Of replayed runs with labels, and without."""
        self._outgoing: torch.Tensor | None = None
        """What the pass just run hands on."""
        self._lone: LonePasses | None = None
        engine.module.eval()
        ring = Ring(engine.grid)
        with torch.no_grad():
            widths = find_widths(ring, engine.module.stage, self._device, engine.module.torch_dtype)
        coming_bytes = rows * tokens * widths[0] * engine.module.torch_dtype.itemsize
        self._receives_beside = received_beside(coming_bytes, on_gpu=self._device.type == "cuda")
        self._hops = Hops(engine.grid)
        self._make_work: Callable[[], StageWork] = lambda: StageWork(
            engine.module,
            is_first=ring.is_first,
            is_last=ring.is_last,
            num_micro_batches=max(self._parts) if self._device.type == "cuda" else num_micro_batches,
            rows=rows,
            tokens=tokens,
            width=widths[0],
            num_buffers=2 if self._receives_beside else 1,
            compiled=execution == "compiled",
        )
        if self._device.type == "cuda":
            self._prepare(execution)
        else:
            self._work = self._make_work()
            self.execution = "eager"

    def run(self, inputs: torch.Tensor | None, labels: torch.Tensor | None = None) -> torch.Tensor | None:
        """One pass of every micro-batch; collective over the pipeline's ranks. Doesn't wait for the device.

        Args:
            inputs: Token ids, int64 [micro-batches, rows, tokens]; only the first stage looks at them.
            labels: For the module's ``loss_fn``, likewise; only the last stage looks at them.

        Returns:
            On the last stage a result for each micro-batch, [micro-batches, ...]: what ``loss_fn`` makes of the
            stage's output and the labels, if there are both, else the output. The next run, and `alone_seconds`,
            write over it. None on other stages.

        Raises:
            WorkloadError: If inputs or labels are missing, or have another shape.
        """
        labelled = self._work.check(inputs, labels, self._num_micro_batches)
        if self.execution != "eager":
            return self._replay(inputs, labels, labelled=labelled)
        self._work.fill(inputs, labels)
        with self._work.passing():
            self._launch(labelled, self._num_micro_batches)
        return self._work.results(labelled=labelled)

    def alone_seconds(self, span_seconds: float | None = None) -> float:
        """Seconds of this rank's own pass over one micro-batch, as it is executed, without neighbours.

        The first call warms up before. Collective over the ranks that share the stage's layers. Stages that share a CPU
        should take turns.

        Args:
            span_seconds: What the passes take together of which it is the mean, about; left out, 0.3 s (CPU 0.1 s).
        """
        with self._work.passing():
            if self._lone is None:
                self._lone = LonePasses(
                    lambda: self._forward(0, labelled=self._work.has_loss),
                    self._device,
                    pool=self._pool(),
                    replayed=self.execution != "eager",
                    group=stage_group(self._engine.grid),
                )
                if self._device.type == "cuda":
                    self._lone.seconds(_WARM_UP_SECONDS)
            return self._lone.seconds(span_seconds)

    def release(self) -> None:
        """Waits for the device and gives back the memory of graphs, inputs and results; nothing runs afterwards.

        Has to come before process groups are destroyed: NCCL waits for graphs that use it.
        """
        synchronize()
        self._graphs.clear()
        self._results.clear()
        self._outgoing = self._lone = None
        del self._work
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _prepare(self, execution: Execution) -> None:
        """Memory, the choice of an execution, and graphs."""
        vote = self._together(lambda: self._settle(execution))
        self.execution = execution if execution != "auto" else "graphs" if vote == _GRAPHS_PAY else "eager"
        if self.execution == "eager":
            self._work.hold(self._num_micro_batches)
            return
        with self._work.passing():
            self._launch(self._work.has_loss, min(self._num_micro_batches, 2))  # NCCL connects
        self._together(lambda: self._capture(self._work.has_loss))

    def _settle(self, execution: Execution) -> int:
        """What this rank says to graphs, after its own pass has run, and so is warm."""
        stage = self._engine.module.stage
        if execution in ("graphs", "compiled"):
            check_capturable(stage)
        self._work = self._make_work()
        with self._work.passing():
            self._forward(0, labelled=self._work.has_loss)
        torch.cuda.synchronize()
        if execution != "auto":
            return _GRAPHS_DO_NOT_PAY
        if not stage.capturable:
            return _NO_GRAPHS
        with self._work.passing():
            share = statistics.median(self._launching_share() for _ in range(_TIMED_PASSES))
        return _GRAPHS_PAY if share > _WORTH_IT else _GRAPHS_DO_NOT_PAY

    def _launching_share(self) -> float:
        """Of the time of a pass on an idle device, what the host takes to launch it."""
        start = time.perf_counter()
        self._forward(0, labelled=self._work.has_loss)
        launched = time.perf_counter()
        synchronize()
        return (launched - start) / (time.perf_counter() - start)

    def _together(self, attempt: Callable[[], int]) -> int:
        """The highest vote of all ranks of the pipeline; a rank that fails takes the others with it."""
        vote, problem = _FAILED, None
        try:
            vote = attempt()
        except Exception as error:  # noqa: BLE001 - raised below, once the others know
            problem = error
        grid = self._engine.grid
        if grid.get_model_parallel_world_size() > 1:
            votes = torch.tensor(vote, device=self._device)
            distributed.all_reduce(votes, op=distributed.ReduceOp.MAX, group=grid.get_model_parallel_group())
            vote = int(votes)
        if problem is not None:
            raise problem
        if vote == _FAILED:
            raise RuntimeEnvironmentError(
                "another rank of this pipeline could not prepare its forward passes; its own error says why."
            )
        return vote

    def _capture(self, labelled: bool) -> int:
        """One graph for all parts of the same length."""
        for count in dict.fromkeys(self._parts):
            with self._work.passing():
                self._graphs[labelled, count] = recorded(
                    functools.partial(self._launch, labelled, count),
                    warm_up=lambda: self._forward(0, labelled=labelled),
                    pool=self._pool(),
                )
        return _GRAPHS_PAY

    def _replay(
        self, inputs: torch.Tensor | None, labels: torch.Tensor | None, *, labelled: bool
    ) -> torch.Tensor | None:
        """One part of the micro-batches after the other: the host launches the next one while the device is busy."""
        if (labelled, self._parts[0]) not in self._graphs:
            self._capture(labelled)
        for start, count in zip(itertools.accumulate(self._parts, initial=0), self._parts, strict=False):
            part = slice(start, start + count)
            self._work.fill(None if inputs is None else inputs[part], None if labels is None else labels[part])
            self._graphs[labelled, count].replay()
            results = self._work.results(labelled=labelled)
            if results is not None:
                if labelled not in self._results:
                    self._results[labelled] = results.new_empty((self._num_micro_batches, *results.shape[1:]))
                self._results[labelled][part] = results[:count]
        return self._results.get(labelled)

    def _launch(self, labelled: bool, num_micro_batches: int) -> None:
        """Runs the schedule, within `StageWork.passing`."""
        engine, hops = self._engine, self._hops
        table: dict[type[PipeInstruction], Callable[..., None]] = {
            schedule.StartReceiving: lambda micro_batch: hops.start_receiving(
                micro_batch, self._work.buffer(micro_batch)
            ),
            schedule.AwaitActivation: hops.await_activation,
            schedule.Forward: functools.partial(self._forward, labelled=labelled),
            schedule.SendActivation: self._send,
        }
        with instructions(engine, table):
            engine._exec_schedule(
                schedule.ForwardSchedule(
                    num_micro_batches,
                    engine.num_stages,
                    engine.stage_id,
                    receives_beside=self._receives_beside,
                )
            )
        hops.finish()

    def _pool(self) -> Any:
        """Memory that all graphs share, since they never run at the same time; None for the first."""
        return next((graph.pool() for graph in self._graphs.values()), None)

    def _forward(self, micro_batch: int, *, labelled: bool) -> None:
        self._outgoing = self._work.run(micro_batch, labelled=labelled)

    def _send(self, micro_batch: int) -> None:
        if self._outgoing is not None:
            self._hops.send(micro_batch, self._outgoing)
        self._outgoing = None
