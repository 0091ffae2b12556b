"""A pipeline that has too few GPUs here: its stages by themselves, one after the other."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from itertools import pairwise

import torch

from lp_plugin.bench.experiment.agreement import together
from lp_plugin.bench.experiment.entries import Entry
from lp_plugin.bench.experiment.job import CaseJob, LeftOutError
from lp_plugin.bench.experiment.progress import Steps
from lp_plugin.integrations.deepspeed.alone.passes import LoneStage, Shape
from lp_plugin.integrations.deepspeed.alone.stages import read_mapping, stage_of_copies
from lp_plugin.measure.layers import give_back_memory
from lp_plugin.quantity import format_seconds

__all__ = ["time_stages"]


def time_stages(job: CaseJob, entries: Sequence[Entry], device: torch.device, steps: Steps) -> None:
    """Times each stage of the configurations that need more GPUs than there are, as often as there are trials.

    One stage after the other, so that a model has room whose stages would each have a GPU. Only those that run here
    just as they would in the pipeline: of prefill, in our own schedule, and with whole layers, since of those that
    several ranks share the all-reduces would be missing.

    Args:
        job: The case.
        entries: Of its configurations; what is found becomes a part of them.
        device: Where.
        steps: To say what is done.
    """
    for entry in entries:
        if not _can_be_timed(job, entry):
            continue
        stages = list(pairwise(entry.fields["boundaries"]))
        try:
            times = [_times(job, entry, number, stages[number], device, steps) for number in range(len(stages))]
        except LeftOutError as error:
            steps.say(f"the stages of {entry.name} are not timed: {error}")
            continue
        entry.alone = list(zip(*times, strict=True))
        medians = ", ".join(format_seconds(statistics.median(each)) for each in times)
        steps.say(f"the stages of {entry.name} take {medians} alone")


def _can_be_timed(job: CaseJob, entry: Entry) -> bool:
    return (
        bool(job.shortage(entry.configuration))
        and job.case.phase == "prefill"
        and entry.configuration.strategy.tensor_parallel == 1
        and entry.fields.get("execution") in {"eager", "graphs", "compiled"}
    )


def _times(
    job: CaseJob, entry: Entry, number: int, layers: tuple[int, int], device: torch.device, steps: Steps
) -> list[float]:
    """Seconds of one stage's pass over one micro-batch, a figure per trial after one that warms up."""
    what = f"timing stage {number} of {entry.name}"
    steps.begin(what, entry.name)
    stage = together(functools.partial(_stage, job, entry, layers, device))
    seconds = []
    for _ in range(job.trials + 1):
        steps.begin(what, entry.name)
        seconds.append(stage.seconds())
    del stage
    give_back_memory()
    return seconds[1:]


def _stage(job: CaseJob, entry: Entry, layers: tuple[int, int], device: torch.device) -> LoneStage:
    case, dtype = job.case, getattr(torch, job.case.dtype)
    stage = stage_of_copies(
        read_mapping(case.config), *layers, halves=False, tensor_parallel=1, device=device, dtype=dtype
    )
    shape = Shape(rows=entry.fields["micro_batch"], tokens=case.sequence, cache_length=0, dtype=dtype)
    return LoneStage(stage, shape, entry.fields["execution"], device)
