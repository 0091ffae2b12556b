"""A pipeline that has too few GPUs here: what one GPU can tell of it, by running its stages one after the other."""

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
from lp_plugin.integrations.deepspeed.alone.passes import Execution, LoneStage, Shape
from lp_plugin.integrations.deepspeed.alone.stages import read_mapping, stage_of_copies
from lp_plugin.quantity import format_seconds

__all__ = ["time_stages"]


def time_stages(job: CaseJob, entries: Sequence[Entry], device: torch.device, steps: Steps) -> None:
    """Times each stage of the configurations that need more GPUs than there are, by itself, as often as trials go.

    Only what the pipeline would run as it is here: whole sequences, in our own schedule, and no layer that is shared by
    several ranks, whose all-reduces would be missing.

    Args:
        job: The case.
        entries: Of its configurations; what is found becomes a part of them.
        device: Where.
        steps: To say what is done.
    """
    for entry in entries:
        if not _can_be_timed(job, entry):
            continue
        steps.begin(f"timing the stages of {entry.name}", entry.name)
        try:
            entry.alone = together(functools.partial(_turns, job, entry, device))
        except LeftOutError as error:
            steps.say(f"the stages of {entry.name} are not timed: {error}")
            continue
        seconds = ", ".join(format_seconds(statistics.median(each)) for each in zip(*entry.alone, strict=True))
        steps.say(f"the stages of {entry.name} take {seconds} alone")


def _can_be_timed(job: CaseJob, entry: Entry) -> bool:
    configuration, fields = entry.configuration, entry.fields
    return (
        bool(job.shortage(configuration))
        and job.case.phase == "prefill"
        and configuration.strategy.tensor_parallel == 1
        and fields.get("execution") in {"eager", "graphs", "compiled"}
        and "boundaries" in fields
    )


def _turns(job: CaseJob, entry: Entry, device: torch.device) -> list[tuple[float, ...]]:
    """Seconds of each stage, turn by turn; the first turn warms up."""
    case, fields = job.case, entry.fields
    dtype: torch.dtype = getattr(torch, case.dtype)
    execution: Execution = fields["execution"]
    shape = Shape(rows=fields["micro_batch"], tokens=case.sequence, cache_length=0, dtype=dtype)
    config = read_mapping(case.config)
    stages = [
        LoneStage(
            stage_of_copies(config, start, stop, halves=False, tensor_parallel=1, device=device, dtype=dtype),
            shape,
            execution,
            device,
        )
        for start, stop in pairwise(fields["boundaries"])
    ]
    turns = [tuple(stage.seconds() for stage in stages) for _ in range(job.trials + 1)]
    return turns[1:]
