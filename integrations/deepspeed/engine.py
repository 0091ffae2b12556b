"""DeepSpeed's pipeline engine for inference: built without its chatter, its instructions timed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import p2p, schedule
from deepspeed.utils import logger

from lp_plugin.errors import HardwareError
from lp_plugin.job.launch import join_launcher
from lp_plugin.job.place import at
from lp_plugin.job.watch.timeout import DEFAULT_TIMEOUT_SECONDS
from lp_plugin.job.watch.watch import watch
from lp_plugin.measure.layers import synchronize
from lp_plugin.schedule import Interval

__all__ = [
    "InstructionTimer",
    "StageTimes",
    "build_engine",
    "init_distributed",
    "join_or_start",
    "quiet",
    "ready_for_batch",
    "slowest",
    "stage_alone_seconds",
    "stage_group",
]

_TIMEOUT = timedelta(hours=12)
"""Other ranks wait in a collective while rank 0 tokenizes; a rank that is gone is noticed by the watch, not by this."""

_PASSES_ALONE = 7
"""Of a stage that is timed alone."""

_TRAINING = frozenset({"optimizer", "scheduler", "zero_optimization", "train_batch_size", "bfloat16"})
"""Parts of a DeepSpeed configuration that an engine without optimizer does without."""


def init_distributed(timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
    """Joins the job that torchrun or another launcher started: NCCL with GPUs, Gloo without.

    From then on its ranks watch over one another (`lp_plugin.job.watch`).

    On CPUs DeepSpeed would first compile a shared-memory all-reduce (about a minute, a compiler needed), which a
    pipeline never calls; it is told that the operator is not available.

    Args:
        timeout_seconds: After which a rank that does not move counts as hung.

    Raises:
        HardwareError: If this host has fewer GPUs than processes.
        RuntimeEnvironmentError: If other ranks can't be reached, or have other versions.
    """
    cuda = torch.cuda.is_available()
    if not cuda:  # DeepSpeed takes stderr away while it looks, so before this rank may have something to say
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        watch(timeout_seconds)
        at("init")
    if cuda:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise HardwareError(
                f"local process {local_rank} has no GPU: this host shows {torch.cuda.device_count()}. "
                "Ask for fewer stages per host, or check CUDA_VISIBLE_DEVICES."
            )
        torch.cuda.set_device(local_rank)
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device", category=UserWarning)  # DeepSpeed's own
    with quiet():
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", timeout=_TIMEOUT)
    at("")


def join_or_start() -> None:
    """Joins the job of a launcher, or makes this process a job of its own; nothing if there is one already.

    The processes stay together until they end: a second joining would find the first one's addresses in the
    launcher's store.

    Raises:
        HardwareError: If this host has fewer GPUs than processes.
    """
    if not torch.distributed.is_initialized() and not join_launcher():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
    init_distributed()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back DeepSpeed's prints and log lines below warnings."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def build_engine(
    module: PipelineModule,
    *,
    micro_batch: int,
    num_micro_batches: int,
    dtype: str,
    config: Mapping[str, Any] | None = None,
) -> Any:
    """A ``PipelineEngine`` without optimizer.

    Args:
        module: Built and loaded.
        micro_batch: Sequences per micro-batch.
        num_micro_batches: Micro-batches of an ordinary ``eval_batch``.
        dtype: Precision of the module's weights.
        config: A user's DeepSpeed configuration; what it says about sizes, precision and training does not count.
    """
    users = {key: value for key, value in (config or {}).items() if key not in _TRAINING}
    own = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": num_micro_batches,
        "steps_per_print": 2**31,
        "fp16": {"enabled": dtype == "float16"},
        "bf16": {"enabled": dtype == "bfloat16"},
        # with tensor parallelism every rank of a stage holds the whole activation
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    with quiet():
        engine, _, _, _ = deepspeed.initialize(model=module, config=users | own)
    return engine


def ready_for_batch(engine: Any) -> None:
    """Has to come before each ``eval_batch``: losses start anew, and messages go to this engine's own neighbours."""
    engine.total_loss = None  # eval_batch would go on adding to it, whatever the number of rows
    if engine.grid.pipe_parallel_size > 1:
        p2p.init_process_groups(engine.grid)  # another engine of this process may have set its own neighbours


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """What one rank did in one ``eval_batch``."""

    wall_seconds: float
    """From the common start to this rank's last instruction."""
    intervals: tuple[Interval, ...]
    """Its instructions, from the common start."""

    def busy_seconds(self, kind: str) -> float:
        """Sum over the intervals of a kind."""
        return sum(each.stop_seconds - each.start_seconds for each in self.intervals if each.kind == kind)


class InstructionTimer:
    """Times every forward, send and receive of an engine, with CUDA events on GPUs.

    The engine keeps its own schedule and instructions; its ``_INSTRUCTION_MAP`` is replaced on the instance by
    functions that mark the time before and after.
    """

    _KINDS = ((schedule.ForwardPass, "forward"), (schedule.SendActivation, "send"), (schedule.RecvActivation, "recv"))

    def __init__(self, engine: Any) -> None:
        self._stage = engine.stage_id
        self._marks: list[tuple[str, Any, Any]] = []
        self._start: Any = None
        table = dict(engine._INSTRUCTION_MAP)
        for instruction, kind in self._KINDS:
            table[instruction] = self._timed(table[instruction], kind)
        engine._INSTRUCTION_MAP = table

    def start(self) -> None:
        """Sets the common start: all ranks meet in a barrier first."""
        self._marks.clear()
        dist.barrier()
        synchronize()
        self._start = _mark()

    def stop(self) -> StageTimes:
        """Waits for the device and returns what was done since `start`."""
        end = _mark()
        synchronize()
        counts: dict[str, int] = {}
        intervals = []
        for kind, before, after in self._marks:
            number = counts.setdefault(kind, 0)
            counts[kind] += 1
            intervals.append(
                Interval(
                    stage=self._stage,
                    micro_batch=number,
                    start_seconds=_elapsed(self._start, before),
                    stop_seconds=_elapsed(self._start, after),
                    kind=kind,
                )
            )
        return StageTimes(wall_seconds=_elapsed(self._start, end), intervals=tuple(intervals))

    def _timed(self, instruction: Callable[..., None], kind: str) -> Callable[..., None]:
        def run(engine: Any, *args: Any, **kwargs: Any) -> None:
            before = _mark()
            instruction(engine, *args, **kwargs)
            self._marks.append((kind, before, _mark()))

        return run


def stage_group(grid: Any) -> Any:
    """Of an engine's grid: the ranks that share this rank's stage, layer by layer; None if it has the stage alone."""
    return grid.get_slice_parallel_group() if grid.get_slice_parallel_world_size() > 1 else None


def stage_alone_seconds(
    stage: Callable[[Any], Any],
    inputs: Any,
    *,
    warm_up_seconds: float = 0.0,
    group: Any = None,
) -> float:
    """Median seconds of several passes of this rank's stage over one micro-batch, without pipeline or neighbours.

    Args:
        stage: This rank's layers.
        inputs: A micro-batch of what the stage takes, on the device.
        warm_up_seconds: Passes to warm up take at least this long (GPUs lower their clocks under sustained load),
            and are at least 2.
        group: Ranks that share the stage's layers and all call this; each pass takes as long as the slowest of them.
    """
    seconds: list[float] = []
    warm_up = 2
    with torch.no_grad():
        while len(seconds) < warm_up + _PASSES_ALONE:
            synchronize()
            start = time.perf_counter()
            stage(inputs)
            synchronize()
            seconds.append(slowest(time.perf_counter() - start, group))
            if sum(seconds) < warm_up_seconds:
                warm_up = len(seconds)
    return statistics.median(seconds[-_PASSES_ALONE:])


def slowest(seconds: float, group: Any) -> float:
    """The most that any rank of a group took, so that all stop after as many passes."""
    if group is None:
        return seconds
    most = torch.tensor(seconds, dtype=torch.float64, device=get_accelerator().current_device_name())
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
    return float(most)


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(start: Any, stop: Any) -> float:
    if isinstance(start, float):
        return float(stop - start)
    return float(start.elapsed_time(stop)) / 1000.0
