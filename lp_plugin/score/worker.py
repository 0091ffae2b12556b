"""One rank of a scoring job."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed import comm as dist

from lp_plugin.errors import RuntimeEnvironmentError
from lp_plugin.integrations.deepspeed.engine import (
    StageTimes,
    build_engine,
    quiet,
    stage_alone_seconds,
    stage_group,
)
from lp_plugin.integrations.deepspeed.finite import FiniteCheck
from lp_plugin.integrations.transformers.pipeline import HFPipelineModule
from lp_plugin.job.journal import Journal
from lp_plugin.job.layout import Layout
from lp_plugin.job.place import at, set_step
from lp_plugin.job.progress import Progress
from lp_plugin.job.ranks import agree, check_processes, gather
from lp_plugin.plan import Plan
from lp_plugin.score.batches import Step, make_steps, pad_length
from lp_plugin.score.job import ScoreJob
from lp_plugin.score.likelihood import log_likelihoods
from lp_plugin.score.outcome import Outcome, RankTimes
from lp_plugin.score.scores import Score
from lp_plugin.score.steps import StepRunner
from lp_plugin.workload import Workload

__all__ = ["run"]


def run(job: ScoreJob) -> Outcome | None:
    """This process's part of the job; collective. The job's figures on rank 0, None elsewhere."""
    check_processes(job.layout)
    journal = Journal(job.output, job.digest, job.documents.ids, Score) if dist.get_rank() == 0 else None
    remaining = agree(journal.missing() if journal else None)
    done_before = len(job.documents) - len(remaining)
    progress = Progress("documents", len(job.documents), done_before) if journal else None
    done = _Done()
    if remaining:
        module, longest = _load(job, remaining)
        done.plan, done.tokens_per_micro_batch = module.lp_plan, module.lp_workload.chosen_micro_batch * longest
        steps = make_steps(
            job.documents.lengths,
            remaining,
            tokens_per_micro_batch=done.tokens_per_micro_batch,
            num_stages=job.layout.num_stages,
            max_positions=job.max_positions,
            num_replicas=job.layout.data_parallel,
        )
        _run_steps(job, module, steps, done, journal, progress)
    at("drain")
    ranks = gather(_times(done))
    if journal is None or progress is None:
        return None
    progress.close()
    outcome = _outcome(job, done, ranks, journal)
    journal.finish()
    return outcome


@dataclass(kw_only=True)
class _Done:
    """What this rank has done so far."""

    plan: Plan | None = None
    tokens_per_micro_batch: int = 0
    steps: list[Step] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    forward_seconds: list[float] = field(default_factory=list)
    longest: StageTimes | None = None
    alone_seconds: float = 0.0
    elapsed_seconds: float = 0.0

    def add(self, step: Step, times: StageTimes) -> None:
        """Counts a step; of the instructions only the longest step's are kept, for the timeline."""
        self.steps.append(step)
        self.wall_seconds.append(times.wall_seconds)
        self.forward_seconds.append(times.busy_seconds("forward"))
        if self.longest is None or len(times.intervals) > len(self.longest.intervals):
            self.longest = times


def _load(job: ScoreJob, remaining: list[int]) -> tuple[HFPipelineModule, int]:
    """This rank's stage, and the length of the longest row."""
    longest = pad_length(int(job.documents.lengths[remaining].max()), job.max_positions)
    micro_batch = job.micro_batch
    if micro_batch is None and job.plan is not None:
        planned = job.plan.workload
        micro_batch = max(1, planned.chosen_micro_batch * planned.tokens_per_sequence // longest)
    if micro_batch is not None:
        micro_batch = min(micro_batch, len(remaining))
    workload = Workload(phase="prefill", batch=len(remaining), sequence=longest, micro_batch=micro_batch)
    with quiet():
        module = HFPipelineModule(
            job.directory,
            num_stages=job.layout.num_stages,
            workload=workload,
            plan=job.plan,
            dtype=job.dtype,
            cluster=job.cluster,
            loss_fn=log_likelihoods,
            tensor_parallel=job.layout.tensor_parallel,
            data_parallel=job.layout.data_parallel,
        )
    return module, longest


def _run_steps(
    job: ScoreJob,
    module: HFPipelineModule,
    steps: list[Step],
    done: _Done,
    journal: Journal[Score] | None,
    progress: Progress | None,
) -> None:
    """Every step in turn; rank 0 keeps the journal and shows progress."""
    if progress:
        progress.show_plan(module.lp_plan)
    engine = _engine(module, steps[0])
    if job.check_finite:
        engine.lp_finite = FiniteCheck(engine)
    runner = StepRunner(engine, timed=True)
    at("time layers")
    done.alone_seconds = _alone(module, steps[0])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()  # the ranks end their measurements at different times
    start = time.perf_counter()
    for number, step in enumerate(steps):
        set_step(number)
        scores = _run_step(runner, job, step)
        if runner.times is not None:
            done.add(step, runner.times)
        if journal and progress:
            journal.append(scores)
            lengths = job.documents.lengths[list(step.documents)]
            progress.advance(len(step.documents), int(lengths.sum()))
    set_step(None)
    done.elapsed_seconds = time.perf_counter() - start


def _engine(module: HFPipelineModule, step: Step) -> Any:
    engine = build_engine(
        module, micro_batch=step.rows, num_micro_batches=len(step.micro_batches), dtype=module.lp_profile.dtype
    )
    engine.module.eval()
    return engine


def _alone(module: HFPipelineModule, step: Step) -> float:
    """Seconds of this rank's stage by itself, loss included; stages that share a CPU take turns."""
    inputs = _stage_input(module, step)
    stage = module.with_loss(module) if module.stage.has_head else module
    shared = module.lp_profile.tensor_parallel
    if torch.cuda.is_available():
        return stage_alone_seconds(stage, inputs, warm_up_seconds=2.0, group=stage_group(module._grid))
    seconds = 0.0
    for turn in range(dist.get_world_size() // shared):
        if turn == dist.get_rank() // shared:
            seconds = stage_alone_seconds(stage, inputs)
        dist.barrier()
    return seconds


def _stage_input(module: HFPipelineModule, step: Step) -> torch.Tensor:
    """A micro-batch of random values in the shape that this rank's stage takes."""
    if module.stage.has_embedding:
        return torch.randint(module.hf_config.vocab_size, (step.rows, step.length), device=module.device)
    shape = (step.rows, step.length, module.hf_config.hidden_size)
    return torch.randn(shape, device=module.device).to(module.torch_dtype)


def _run_step(runner: StepRunner, job: ScoreJob, step: Step) -> dict[int, Score]:
    """The scores of a step, on every rank."""
    documents = job.documents
    values = runner.run(step, documents).tolist()
    scores = {}
    for micro_batch, row_values in zip(step.micro_batches, values, strict=True):
        for index, value in zip(micro_batch, row_values, strict=False):  # rows beyond the documents are padding
            if not math.isfinite(value):
                raise RuntimeEnvironmentError(
                    f"document {documents.ids[index]!r} got log-likelihood {value}: the model overflows in "
                    f"{job.dtype}, or its weights hold values that are not finite. Try --dtype float32 or bfloat16, "
                    f"with another --output or without {job.output}.partial (scores of one precision don't mix)."
                )
            scores[index] = Score(num_tokens=max(len(documents[index]) - 1, 0), log_likelihood=value + 0.0)
    return scores


def _times(done: _Done) -> RankTimes:
    """What this rank measured."""
    return RankTimes(
        wall_seconds=tuple(done.wall_seconds),
        forward_seconds=tuple(done.forward_seconds),
        alone_seconds=done.alone_seconds,
        elapsed_seconds=done.elapsed_seconds,
        intervals=() if done.longest is None else done.longest.intervals,
        peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        host=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        threads=torch.get_num_threads(),
    )


def _outcome(job: ScoreJob, done: _Done, ranks: tuple[RankTimes, ...], journal: Journal[Score]) -> Outcome:
    scored = [index for step in done.steps for index in step.documents]
    replicas = job.layout.data_parallel
    return Outcome(
        plan=done.plan,
        layout=job.layout,
        tokens_per_micro_batch=done.tokens_per_micro_batch,
        steps=tuple(step.of_replica(0, replicas) for step in done.steps),
        ranks=_first_of_each_stage(ranks, job.layout),
        num_documents=len(job.documents),
        num_scored=len(scored),
        num_tokens=int(job.documents.lengths[scored].sum()),
        total_log_likelihood=math.fsum(score["log_likelihood"] for score in journal.records.values()),
        total_scored_tokens=sum(score["num_tokens"] for score in journal.records.values()),
    )


def _first_of_each_stage(ranks: tuple[RankTimes, ...], layout: Layout) -> tuple[RankTimes, ...]:
    """The first pipeline's first rank of each stage; its peak is that of the fullest rank with the same layers."""
    size = layout.tensor_parallel * layout.data_parallel
    stages = [ranks[first : first + size] for first in range(0, len(ranks), size)]
    return tuple(dataclasses.replace(alike[0], peak_bytes=max(rank.peak_bytes for rank in alike)) for alike in stages)
