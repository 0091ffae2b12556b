"""Prefill of whole sequences: by our own schedule, or by DeepSpeed's ``eval_batch``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lp_plugin.bench.experiment.contender import Contender, Trial, timed
from lp_plugin.bench.experiment.engines import Built
from lp_plugin.bench.experiment.settings import Case, Configuration
from lp_plugin.integrations.deepspeed import forward
from lp_plugin.integrations.deepspeed.engine import ready_for_batch, stage_group
from lp_plugin.integrations.deepspeed.forward.lone_passes import LonePasses
from lp_plugin.integrations.deepspeed.forward.whole_rows import whole_rows

__all__ = ["Prefill", "StockPrefill"]


class Prefill(Contender):
    """Whole sequences through our own schedule."""

    def __init__(self, case: Case, configuration: Configuration, built: Built) -> None:
        super().__init__(case, configuration, built)
        if configuration.execution != "stock":
            self.execution: forward.Execution = configuration.execution
        self._pipelines: list[forward.ForwardPipeline] = []
        self._last: torch.Tensor | None = None

    def prepare(self) -> None:
        """See `Contender.prepare`."""
        if not self.takes_part:
            return
        self._inputs = self._micro_batches()
        for count in (self.num_micro_batches, 1):
            pipeline = forward.ForwardPipeline(
                self.engine,
                num_micro_batches=count,
                rows=self.rows,
                tokens=self.case.sequence,
                execution=self.execution,
            )
            self._pipelines.append(pipeline)
            self.execution = pipeline.execution  # the same for the other one

    def batch(self) -> None:
        """See `Contender.batch`."""
        self._last = self._pipelines[0].run(self._inputs, self._inputs)

    def trial(self) -> Trial:
        """See `Contender.trial`."""
        seconds = timed(self.takes_part, self.batch)
        return Trial(seconds=seconds, first_token_seconds=timed(self.takes_part, self._first))

    def outputs(self) -> NDArray[np.float32] | None:
        """See `Contender.outputs`."""
        return None if self._last is None or self.replica else np.array(self._last[0].float().cpu())

    def alone_seconds(self, span_seconds: float) -> float:
        """See `Contender.alone_seconds`."""
        return self._pipelines[0].alone_seconds(span_seconds)

    def release(self) -> None:
        """See `Contender.release`."""
        self._last = None
        while self._pipelines:
            self._pipelines.pop().release()

    def _first(self) -> None:
        inputs = self._inputs[:1]
        self._pipelines[1].run(inputs, inputs)


class StockPrefill(Contender):
    """Whole sequences through DeepSpeed's own ``eval_batch``, always of one shape; as for ours no pass asks the device.

    What is left of the difference is DeepSpeed's schedule, and transformers' own kernels, launched one by one.
    """

    def __init__(self, case: Case, configuration: Configuration, built: Built) -> None:
        super().__init__(case, configuration, built)
        self.execution = "stock"
        self._last: torch.Tensor | None = None
        self._lone: LonePasses | None = None

    def prepare(self) -> None:
        """See `Contender.prepare`."""
        self._inputs = list(self._micro_batches())

    def batch(self) -> None:
        """See `Contender.batch`."""
        self._last = self._run(self._inputs)

    def trial(self) -> Trial:
        """See `Contender.trial`."""
        seconds = timed(self.takes_part, self.batch)
        return Trial(seconds=seconds, first_token_seconds=timed(self.takes_part, self._first))

    def outputs(self) -> NDArray[np.float32] | None:
        """See `Contender.outputs`."""
        return None if self._last is None or self.replica else np.array(self._last.float().cpu())

    def alone_seconds(self, span_seconds: float) -> float:
        """See `Contender.alone_seconds`."""
        with whole_rows():
            if self._lone is None:
                stage, inputs = self._whole_stage(), self._stage_input()
                group = stage_group(self.engine.grid)
                self._lone = LonePasses(lambda: stage(inputs), self.device, pool=None, replayed=False, group=group)
            return self._lone.seconds(span_seconds)

    def release(self) -> None:
        """See `Contender.release`."""
        self._inputs, self._last, self._lone = [], None, None

    def _first(self) -> None:
        self._run(self._inputs[:1])

    def _run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The first micro-batch's results, on the last stage."""
        engine = self.engine
        ready_for_batch(engine)
        ends = engine.is_first_stage() or engine.is_last_stage()
        with whole_rows():  # else the host waits for the device in every pass
            outputs = engine.eval_batch(
                iter([(each, each) for each in inputs] if ends else []),
                compute_loss=True,
                reduce_output=None,
                bcast_loss=False,
                num_micro_batches=len(inputs),
            )
        return outputs[0] if engine.is_last_stage() else None
