"""One rank of a generating job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from transformers import AutoConfig

from lp_plugin.generate.job import GenerateJob
from lp_plugin.generate.outcome import Outcome, RankFigures
from lp_plugin.generate.planning import GenerationPlan, plan_generation
from lp_plugin.generate.results import Generated, Relay, Results
from lp_plugin.generate.stream import Stream
from lp_plugin.integrations.deepspeed.engine import build_engine, quiet
from lp_plugin.integrations.deepspeed.generation.sampling import complete_config  # and the engine gets generate()
from lp_plugin.integrations.deepspeed.methods import detected_cluster
from lp_plugin.integrations.transformers.pipeline import HFPipelineModule
from lp_plugin.job.documents import load_tokenizer
from lp_plugin.job.journal import Journal
from lp_plugin.job.progress import Progress
from lp_plugin.job.ranks import agree, check_processes, gather
from lp_plugin.model import ModelProfile
from lp_plugin.report import console

__all__ = ["run"]

Listener = Callable[[int, list[int]], None]
"""Gets a prompt's number in the input, and tokens of it."""
Receivers = tuple[Listener, Listener | None]
"""Of new tokens, and of finished prompts."""


def run(job: GenerateJob) -> Outcome | None:
    """This process's part of the job; collective. The job's figures on rank 0, None elsewhere."""
    check_processes(job.layout)
    journal = Journal(job.output, job.digest, job.prompts.ids, Generated) if dist.get_rank() == 0 else None
    remaining = agree(journal.missing() if journal else None)
    planned: GenerationPlan | None = None
    ranks: tuple[RankFigures, ...] = ()
    if remaining:
        # refuses what can't be done before anything is loaded
        config = AutoConfig.from_pretrained(job.directory, local_files_only=True, trust_remote_code=False)
        complete_config(job.settings, job.directory, config)
        planned = _plan(job, remaining)
        ranks = gather(_Rank(job, planned, remaining).run(journal))
    if journal is None:
        return None
    outcome = Outcome(
        plan=planned,
        layout=job.layout,
        ranks=ranks,
        num_prompts=len(job.prompts),
        num_generated=len(remaining),
        max_new_tokens=job.max_new_tokens,
        total_new_tokens=sum(len(record["token_ids"]) for record in journal.records.values()),
    )
    journal.finish()
    return outcome


def _plan(job: GenerateJob, remaining: list[int]) -> GenerationPlan:
    """How to generate for what remains, the same for all replicas; collective."""
    layout = job.layout
    granularity = "layer" if job.plan is None else job.plan.granularity
    profile = ModelProfile.from_config(job.directory, dtype=job.dtype, granularity=granularity)
    topology = PipeModelDataParallelTopology(
        num_pp=layout.num_stages, num_mp=layout.tensor_parallel, num_dp=layout.data_parallel
    )
    cluster = job.cluster or detected_cluster(topology, "auto", tensor_parallel=layout.tensor_parallel)
    return plan_generation(
        profile.sharded(layout.tensor_parallel),
        cluster,
        prompts=-(-len(remaining) // layout.data_parallel),
        prompt_tokens=int(job.prompts.lengths[remaining].max()),
        new_tokens=job.max_new_tokens,
        num_stages=layout.num_stages,
        micro_batch=job.micro_batch,
        plan=job.plan,
        compiled=job.compiled,
    )


class _Rank:
    """This rank's stage, and its prompts: those of its replica, every ``data_parallel``-th of what remains."""

    def __init__(self, job: GenerateJob, planned: GenerationPlan, remaining: list[int]) -> None:
        self._job, self._planned, self._remaining = job, planned, remaining
        layout = job.layout
        with quiet():
            module = HFPipelineModule(
                job.directory,
                num_stages=layout.num_stages,
                workload=planned.plan.workload,
                plan=planned.plan,
                dtype=job.dtype,
                cluster=job.cluster,
                tensor_parallel=layout.tensor_parallel,
                data_parallel=layout.data_parallel,
            )
        self._engine = build_engine(
            module, micro_batch=planned.micro_batch, num_micro_batches=planned.num_slots, dtype=job.dtype
        )
        self._engine.module.eval()
        place = module._topo.get_coord(dist.get_rank())
        self._replica = place.data
        self._is_head = place.pipe == 0 and place.model == 0
        self._mine = remaining[self._replica :: layout.data_parallel]

    def run(self, journal: Journal[Generated] | None) -> RankFigures:
        """Generates; collective. On return of rank 0 all results are on disk."""
        loaded = _allocated()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        clock = _Clock(len(self._job.prompts))
        with self._receivers(journal, clock) as (on_tokens, on_finished):
            dist.barrier()  # the ranks have loaded their stages at different times
            clock.start()
            made = self._generate(on_tokens, on_finished) if self._mine else []
            generated = clock.seconds()
        return RankFigures(
            elapsed_seconds=generated,
            written_seconds=clock.seconds(),
            num_tokens=sum(map(len, made)) if self._is_head else 0,
            first_token_seconds=clock.first_token_seconds,
            step_seconds=clock.step_seconds,
            loaded_bytes=loaded,
            peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            host=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            threads=torch.get_num_threads(),
        )

    def _generate(self, on_tokens: Listener | None, on_finished: Listener | None) -> list[list[int]]:
        """The new tokens of this replica's prompts; collective over the replica."""
        return self._engine.generate(
            [self._job.prompts[index].tolist() for index in self._mine],
            generation_config=self._job.settings,
            micro_batch=self._planned.micro_batch,
            num_slots=self._planned.num_slots,
            seed=self._job.seed,
            compiled=self._job.compiled,
            indices=self._mine,
            on_tokens=self._numbered(on_tokens),
            on_finished=self._numbered(on_finished),
        )

    def _numbered(self, listener: Listener | None) -> Listener | None:
        """A listener that is told the prompt's position among this replica's, for one of numbers in the input."""
        if listener is None:
            return None
        return lambda position, token_ids: listener(self._mine[position], token_ids)

    @contextmanager
    def _receivers(self, journal: Journal[Generated] | None, clock: _Clock) -> Iterator[Receivers]:
        """What takes tokens and finished prompts as they come: rank 0, and the first stages of other replicas."""
        job = self._job
        store = torch.distributed.distributed_c10d._get_default_store()
        if journal is None:
            relay = Relay(store, self._replica) if self._is_head else None
            yield clock.tokens, relay.finished if relay else None
            return
        tokenizer = load_tokenizer(job.directory)

        def decode(token_ids: list[int]) -> str:
            return str(tokenizer.decode(token_ids, skip_special_tokens=True))

        progress = Progress("prompts", len(job.prompts), len(job.prompts) - len(self._remaining), bar=not job.stream)
        progress.show_plan(self._planned.plan)
        results = Results(
            journal,
            decode,
            progress,
            expected=len(self._remaining),
            store=store,
            num_replicas=job.layout.data_parallel,
            stream=Stream(console(), decode, job.prompts) if job.stream else None,
        )

        def on_tokens(index: int, token_ids: list[int]) -> None:
            clock.tokens(index, token_ids)
            results.tokens(index, token_ids)

        try:
            with results:
                yield on_tokens, results.finished
        finally:
            progress.close()


class _Clock:
    """Measures when tokens come, on the first stage of a replica.

    Args:
        num_prompts: Of the job.
    """

    def __init__(self, num_prompts: int) -> None:
        self._start = 0.0
        self._first, self._last = np.full(num_prompts, np.nan), np.full(num_prompts, np.nan)
        self._tokens = np.full(num_prompts, 0)

    def start(self) -> None:
        """Generation begins."""
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start

    def tokens(self, index: int, token_ids: list[int]) -> None:
        """Notes the time of new tokens."""
        now = self.seconds()
        if not self._tokens[index]:
            self._first[index] = now
        self._last[index] = now
        self._tokens[index] += len(token_ids)

    @property
    def first_token_seconds(self) -> tuple[float, ...]:
        """From the start to each prompt's first token, soonest first; empty on ranks that take no tokens."""
        return tuple(np.sort(self._first[self._tokens > 0]).tolist())

    @property
    def step_seconds(self) -> float | None:
        """Median over prompts of the time between two of their tokens; None without a second token."""
        several = self._tokens > 1
        steps = (self._last - self._first)[several] / (self._tokens[several] - 1)
        return float(np.median(steps)) if steps.size else None


def _allocated() -> int:
    """Bytes of the GPU that torch has given out; 0 on CPUs."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
