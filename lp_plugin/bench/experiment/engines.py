"""DeepSpeed engines over random weights: one per layout and boundaries, shared by the configurations that agree."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist

from lp_plugin.bench.experiment.agreement import together
from lp_plugin.bench.experiment.job import CaseJob
from lp_plugin.bench.experiment.settings import Case, Configuration
from lp_plugin.hardware import Cluster
from lp_plugin.integrations.deepspeed.engine import build_engine, quiet
from lp_plugin.integrations.transformers.random_weights import RandomPipelineModule
from lp_plugin.job.layout import Layout
from lp_plugin.plan import Plan
from lp_plugin.solver.solve import evaluate

__all__ = ["Built", "Engines", "layout_of", "plan_of"]


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

    def get(self, configuration: Configuration, plan: Plan) -> Built:
        """The engine of a plan; collective over all ranks.

        Raises:
            LeftOutError: If any rank can't build its part, as when weights don't fit beside those of other engines.
        """
        key = (layout_of(configuration, self._job.case.processes), plan.boundaries)
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


def last_logits(logits: torch.Tensor, labels: Any) -> torch.Tensor:
    """What is kept of a prefill: the logits of each sequence's last position, [rows, vocabulary]."""
    del labels
    return logits[:, -1].contiguous()


def _allocated() -> int | None:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else None
