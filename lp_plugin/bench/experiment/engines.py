"""DeepSpeed engines over random weights: one per layout and boundaries, shared by the configurations that agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist

from lp_plugin.bench.experiment.agreement import together
from lp_plugin.bench.experiment.job import CaseJob
from lp_plugin.bench.experiment.settings import Case, Configuration
from lp_plugin.errors import InfeasibleError
from lp_plugin.hardware import Cluster
from lp_plugin.integrations.deepspeed.engine import build_engine, quiet
from lp_plugin.integrations.transformers.random_weights import RandomPipelineModule
from lp_plugin.job.layout import Layout
from lp_plugin.plan import Plan
from lp_plugin.quantity import format_bytes
from lp_plugin.solver.solve import evaluate

__all__ = ["Built", "Engines", "layout_of", "no_room", "plan_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An engine on this rank."""

    engine: Any
    """DeepSpeed's ``PipelineEngine``."""
    plan: Plan
    """Of its boundaries."""
    loaded_bytes: int | None
    """What torch has given out for it; None on CPUs."""
    made_for: str
    """The configuration that it was built for; others of the same layout and boundaries run on it, too."""


def layout_of(configuration: Configuration, processes: int) -> Layout:
    """The processes of a configuration's engine; one device of several is one replica of many, the others idle."""
    strategy = configuration.strategy
    replicas = processes if strategy.num_devices == 1 else strategy.data_parallel
    return Layout(
        num_stages=strategy.pipeline_parallel, tensor_parallel=strategy.tensor_parallel, data_parallel=replicas
    )


def plan_of(case: Case, configuration: Configuration, boundaries: tuple[int, ...], cluster: Cluster) -> Plan:
    """What is predicted of one replica's stages.

    Raises:
        WorkloadError: If the layers can't be shared out so.
    """
    strategy = configuration.strategy
    profile = case.profile()
    if strategy.tensor_parallel > 1:
        profile = profile.sharded(strategy.tensor_parallel)
    devices = cluster.subset(strategy.pipeline_parallel * strategy.tensor_parallel).grouped(strategy.tensor_parallel)
    return evaluate(profile, devices, case.workload(configuration), boundaries)


class Engines:
    """Built when they are first asked for; all stay, since configurations take turns.

    Args:
        job: The case.
        cluster: A device per process.
    """

    def __init__(self, job: CaseJob, cluster: Cluster) -> None:
        self._job, self._cluster = job, cluster
        self._built: dict[tuple[Layout, tuple[int, ...]], Built] = {}
        self._peaks: dict[tuple[Layout, tuple[int, ...]], list[int]] = {}

    def check_room(
        self, configuration: Configuration, boundaries: tuple[int, ...], predicted: Sequence[tuple[int, int]]
    ) -> None:
        """Refuses an engine for which there is no room, beside those that are built before.

        Every engine is counted with all that it is predicted to hold at its peak, since graphs and caches stay.

        Args:
            configuration: What it is for.
            boundaries: Of its stages.
            predicted: Of `memory`.

        Raises:
            InfeasibleError: Naming what is needed and what there is.
        """
        processes, usable = self._job.ranks, self._cluster.devices[0].memory.usable_bytes
        key = (layout_of(configuration, processes), boundaries)
        peaks = [peak for _, peak in predicted]
        peaks *= processes // len(peaks)  # of one device's configuration every process has an engine
        reason = no_room(peaks, [self._peaks[each] for each in self._built if each != key], usable)
        if reason:
            raise InfeasibleError(reason)
        self._peaks[key] = peaks

    def get(self, configuration: Configuration, plan: Plan) -> Built:
        """The engine of a plan; collective over all ranks.

        Raises:
            LeftOutError: If any rank can't build its part, as when weights don't fit beside those of other engines.
        """
        key = (layout_of(configuration, self._job.ranks), plan.boundaries)
        if key not in self._built:
            self._built[key] = self._build(configuration.name, key[0], plan)
        return dataclasses.replace(self._built[key], plan=plan)

    def _build(self, name: str, layout: Layout, plan: Plan) -> Built:
        before = _allocated()
        module = together(lambda: self._module(layout, plan))
        engine = build_engine(
            module,
            micro_batch=plan.workload.chosen_micro_batch,
            num_micro_batches=plan.num_micro_batches,
            dtype=plan.dtype,
        )
        engine.module.eval()
        dist.barrier()
        after = _allocated()
        loaded = None if before is None or after is None else after - before
        return Built(engine=engine, plan=plan, loaded_bytes=loaded, made_for=name)

    def _module(self, layout: Layout, plan: Plan) -> RandomPipelineModule:
        with quiet():
            return RandomPipelineModule(
                self._job.directory,
                num_stages=layout.num_stages,
                workload=plan.workload,
                plan=plan,
                dtype=plan.dtype,
                cluster=self._cluster.subset(plan.num_stages * layout.tensor_parallel).grouped(layout.tensor_parallel),
                loss_fn=last_logits,
                tensor_parallel=layout.tensor_parallel,
                data_parallel=layout.data_parallel,
            )


def no_room(peaks: Sequence[int], others: Sequence[Sequence[int]], usable_bytes: int) -> str:
    """Why an engine does not fit; empty if it does.

    Args:
        peaks: Most bytes that it holds on each rank.
        others: The same of engines that are there.
        usable_bytes: Of a device.
    """
    of_a_device = f"of the {format_bytes(usable_bytes)} of a device"
    if max(peaks) > usable_bytes:
        return f"does not fit: needs {format_bytes(max(peaks))} {of_a_device}"
    most = max(map(sum, zip(peaks, *others, strict=True)))
    if most > usable_bytes:
        together = f"together {format_bytes(most)} {of_a_device}"
        return f"does not fit beside the others: {together}; put it in a case of its own"
    return ""


def last_logits(logits: torch.Tensor, labels: Any) -> torch.Tensor:
    """What is kept of a prefill: the logits of each sequence's last position, [rows, vocabulary]."""
    del labels
    return logits[:, -1].contiguous()


def _allocated() -> int | None:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else None
