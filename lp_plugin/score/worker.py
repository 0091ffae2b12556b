"""One rank of a scoring job."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from deepspeed import comm as dist

from lp_plugin.errors import RuntimeEnvironmentError, WorldSizeError
from lp_plugin.integrations.deepspeed.engine import (
    InstructionTimer,
    StageTimes,
    build_engine,
    init_distributed,
    quiet,
    stage_alone_seconds,
)
from lp_plugin.integrations.transformers.pipeline import HFPipelineModule
from lp_plugin.job.journal import Journal, Score
from lp_plugin.plan import Plan
from lp_plugin.score.batches import Step, make_steps, pad_length
from lp_plugin.score.job import ScoreJob
from lp_plugin.score.likelihood import log_likelihoods
from lp_plugin.score.outcome import Outcome, RankTimes
from lp_plugin.score.progress import Progress
from lp_plugin.workload import Workload

__all__ = ["run_rank"]

Value = TypeVar("Value")


def run_rank(prepared: Callable[[], ScoreJob] | None) -> Outcome | None:
    """Runs this process's part of the job.

    Collective over all ranks of the job; torchrun's environment variables are set.

    Args:
        prepared: Makes the job; needed on rank 0, which hands it to the others. Called once the ranks are
            connected: if it raises, the others notice that this one is gone.

    Returns:
        The job's figures on rank 0, None elsewhere.

    Raises:
        LpPluginError: Any of its kinds.
    """
    init_distributed()
    outcome = _run(_agree(prepared() if prepared else None))
    dist.barrier()  # Gloo may abort a process that ends while its last message is under way
    torch.distributed.destroy_process_group()  # not after an error: its store tells who has reported it
    return outcome


def _run(job: ScoreJob) -> Outcome | None:
    _check_processes(job)
    journal = Journal(job.output, job.digest, job.documents.ids) if dist.get_rank() == 0 else None
    remaining = _agree(journal.missing() if journal else None)
    progress = Progress(len(job.documents), len(job.documents) - len(remaining)) if journal else None
    done = _Done()
    if remaining:
        module, longest = _load(job, remaining)
        done.plan, done.tokens_per_micro_batch = module.lp_plan, module.lp_workload.chosen_micro_batch * longest
        steps = make_steps(
            job.documents.lengths,
            remaining,
            tokens_per_micro_batch=done.tokens_per_micro_batch,
            num_stages=job.num_stages,
            max_positions=job.max_positions,
        )
        _run_steps(job, module, steps, done, journal, progress)
    ranks = _gather(job, done)
    if journal is None or progress is None:
        return None
    progress.close()
    journal.finish()
    return _outcome(job, done, ranks, journal)


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


def _check_processes(job: ScoreJob) -> None:
    world = dist.get_world_size()
    if world != job.num_stages:
        raise WorldSizeError(
            f"{world} processes for {job.num_stages} stages: the job needs one process per stage; "
            f"start {job.num_stages} processes, or pass --stages {world}."
        )


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
            num_stages=job.num_stages,
            workload=workload,
            plan=job.plan,
            dtype=job.dtype,
            cluster=job.cluster,
            loss_fn=log_likelihoods,
        )
    return module, longest


def _run_steps(
    job: ScoreJob,
    module: HFPipelineModule,
    steps: list[Step],
    done: _Done,
    journal: Journal | None,
    progress: Progress | None,
) -> None:
    """Every step in turn; rank 0 keeps the journal and shows progress."""
    if progress:
        progress.show_plan(module.lp_plan)
    engine = _engine(module, steps[0])
    timer = InstructionTimer(engine)
    done.alone_seconds = _alone(module, steps[0])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()  # the ranks end their measurements at different times
    start = time.perf_counter()
    shape = None
    for step in steps:
        if shape != (step.rows, step.length):
            shape = (step.rows, step.length)
            engine.reset_activation_shape()  # else the last step's shape would be assumed, silently
            engine.set_train_micro_batch_size(step.rows)
        scores, times = _run_step(engine, timer, job, step)
        done.add(step, times)
        if journal and progress:
            journal.append(scores)
            progress.advance(step, job.documents)
    done.elapsed_seconds = time.perf_counter() - start


def _engine(module: HFPipelineModule, step: Step) -> Any:
    engine = build_engine(
        module, micro_batch=step.rows, num_micro_batches=len(step.micro_batches), dtype=module.lp_profile.dtype
    )
    engine.module.eval()
    return engine


def _alone(module: HFPipelineModule, step: Step) -> float:
    """Seconds of this rank's stage by itself, loss included; ranks that share a CPU take turns."""
    inputs = _stage_input(module, step)
    stage = module.with_loss(module) if module.stage.has_head else module
    if torch.cuda.is_available():
        return stage_alone_seconds(stage, inputs, warm_up_seconds=2.0)
    seconds = 0.0
    for turn in range(dist.get_world_size()):
        if turn == dist.get_rank():
            seconds = stage_alone_seconds(stage, inputs)
        dist.barrier()
    return seconds


def _stage_input(module: HFPipelineModule, step: Step) -> torch.Tensor:
    """A micro-batch of random values in the shape that this rank's stage takes."""
    device = next(iter(module.parameters())).device
    if module._local_start == 0:
        return torch.randint(module.hf_config.vocab_size, (step.rows, step.length), device=device)
    shape = (step.rows, step.length, module.hf_config.hidden_size)
    return torch.randn(shape, device=device).to(module.torch_dtype)


def _run_step(engine: Any, timer: InstructionTimer, job: ScoreJob, step: Step) -> tuple[dict[int, Score], StageTimes]:
    """One ``eval_batch``; the scores reach every rank."""
    engine.total_loss = None  # eval_batch goes on adding to it, whatever the number of rows
    micro_batches = _micro_batches(engine, step, job)
    timer.start()
    outputs = engine.eval_batch(
        iter(micro_batches),
        compute_loss=True,
        reduce_output=None,
        bcast_loss=False,
        num_micro_batches=len(step.micro_batches),
    )
    times = timer.stop()
    result = torch.zeros((len(step.micro_batches), step.rows), dtype=torch.float64, device=engine.device)
    if engine.is_last_stage():
        result.copy_(torch.stack(outputs))
    dist.broadcast(result, src=job.num_stages - 1)
    values = result.tolist()
    scores = {}
    for micro_batch, row_values in zip(step.micro_batches, values, strict=True):
        for index, value in zip(micro_batch, row_values, strict=False):  # rows beyond the documents are padding
            if not math.isfinite(value):
                raise RuntimeEnvironmentError(
                    f"document {job.documents.ids[index]!r} got log-likelihood {value}: the model overflows in "
                    f"{job.dtype}, or its weights hold values that are not finite. Try --dtype float32 or bfloat16, "
                    f"with another --output or without {job.output}.partial (scores of one precision don't mix)."
                )
            scores[index] = Score(num_tokens=max(len(job.documents[index]) - 1, 0), log_likelihood=value + 0.0)
    return scores, times


def _micro_batches(engine: Any, step: Step, job: ScoreJob) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and labels of a step on the device already: a copy per micro-batch would wait for the pass before it."""
    if not (engine.is_first_stage() or engine.is_last_stage()):
        return []
    numbers = range(len(step.micro_batches))
    inputs = np.stack([step.inputs(job.documents, number) for number in numbers])
    labels = np.stack([step.labels(job.documents, number) for number in numbers])
    on_device = (torch.from_numpy(each).to(engine.device) for each in (inputs, labels))
    return list(zip(*on_device, strict=True))


def _agree(value: Value | None) -> Value:
    """Rank 0's value, on every rank."""
    box: list[Any] = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _gather(job: ScoreJob, done: _Done) -> tuple[RankTimes, ...]:
    """Every rank's times, on every rank; collective."""
    mine = RankTimes(
        wall_seconds=tuple(done.wall_seconds),
        forward_seconds=tuple(done.forward_seconds),
        alone_seconds=done.alone_seconds,
        elapsed_seconds=done.elapsed_seconds,
        intervals=() if done.longest is None else done.longest.intervals,
        peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        host=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        threads=torch.get_num_threads(),
    )
    gathered: list[RankTimes] = [mine] * job.num_stages
    torch.distributed.all_gather_object(gathered, mine)
    return tuple(gathered)


def _outcome(job: ScoreJob, done: _Done, ranks: tuple[RankTimes, ...], journal: Journal) -> Outcome:
    scored = [index for step in done.steps for index in step.documents]
    return Outcome(
        plan=done.plan,
        tokens_per_micro_batch=done.tokens_per_micro_batch,
        steps=tuple(done.steps),
        ranks=ranks,
        num_documents=len(job.documents),
        num_scored=len(scored),
        num_tokens=int(job.documents.lengths[scored].sum()),
        total_log_likelihood=math.fsum(score.log_likelihood for score in journal.scores.values()),
        total_scored_tokens=sum(score.num_tokens for score in journal.scores.values()),
    )
