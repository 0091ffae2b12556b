"""What is looked at once, beside the trials: where the time goes, and what is sent over NVLink."""

from __future__ import annotations

from collections.abc import Sequence

from lp_plugin.bench.experiment.contender import Contender
from lp_plugin.bench.experiment.costs import counted_profile, replica
from lp_plugin.bench.experiment.entries import Entry, running
from lp_plugin.bench.experiment.job import CaseJob
from lp_plugin.bench.experiment.predict import link_bytes
from lp_plugin.bench.experiment.progress import Steps
from lp_plugin.bench.experiment.settings import Case
from lp_plugin.hardware import Cluster
from lp_plugin.job.ranks import gather
from lp_plugin.measure.nvlink import count_nvlink
from lp_plugin.measure.split import profile_run
from lp_plugin.measured import Counters
from lp_plugin.solver.solve import evaluate

__all__ = ["count_sent", "counted", "profile_entries"]


def profile_entries(entries: Sequence[Entry], steps: Steps) -> None:
    """One batch of each configuration under the profiler; collective over all ranks of the case."""
    for entry, contender in running(entries):
        if entry.is_control:
            continue
        steps.begin(f"profiling {entry.name}", entry.name)
        entry.fields["split"] = profile_run(
            contender.batch,
            contender.ranks,
            tensor_groups=_alike(contender, "pipe", "data"),
            pipelines=_alike(contender, "data", "model"),
        )
        steps.say(f"{entry.name} is profiled")


def counted(case: Case, entries: Sequence[Entry]) -> list[Entry]:
    """Those whose hardware counters are read: the baseline, and the first other configuration."""
    others = [entry for entry in entries if entry.name != case.baseline and not entry.is_control][:1]
    return [entry for entry in entries if entry.name == case.baseline] + others


def count_sent(job: CaseJob, entries: Sequence[Entry], cluster: Cluster, steps: Steps) -> None:
    """What each stage's first rank sends over NVLink in one batch, and what is predicted; collective over all ranks.

    Other counters are read later, in processes of their own. What is predicted of them is that of `predictions`. Stages
    of a configuration that has too few GPUs here send nothing, but their other counters can be read.

    Args:
        job: The case.
        entries: Whose messages are counted.
        cluster: A device per process.
        steps: To say what is done.
    """
    for entry in entries:
        shortage = job.shortage(entry.configuration)
        if "boundaries" not in entry.fields or not (entry.contender or shortage):
            continue
        steps.begin(f"counting what {entry.name} sends", entry.name)
        configuration, boundaries = entry.configuration, entry.fields["boundaries"]
        sent = link_bytes(job.case, configuration, boundaries)
        plan = evaluate(
            counted_profile(job.case, configuration.strategy.tensor_parallel),
            replica(cluster, configuration),
            job.case.workload(configuration),
            boundaries,
        )
        found = _sent(entry.contender) if entry.contender else [(None, shortage)] * len(plan.stages)
        entry.fields["counters"] = tuple(
            Counters(
                stage=stage,
                counted_bytes=planned.traffic_bytes,
                predicted_hit_fraction=planned.hit_fraction,
                nvlink_bytes=num_bytes,
                nvlink_reason=reason,
                counted_link_bytes=predicted,
            )
            for stage, (planned, predicted, (num_bytes, reason)) in enumerate(
                zip(plan.stages, sent, found, strict=True)
            )
        )


def _sent(contender: Contender) -> list[tuple[float | None, str]]:
    """Bytes over NVLink of each stage's first rank, or why they can't be counted."""
    found = gather(count_nvlink(contender.batch if contender.takes_part else _nothing, contender.device))
    return [found[group[0]] for group in _alike(contender, "pipe")]


def _nothing() -> None:
    """The part of a rank that does not take part."""


def _alike(contender: Contender, *axes: str) -> list[list[int]]:
    """The ranks that take part, those together that have the same place on the axes."""
    topology = contender.engine.module.topology()
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in contender.ranks:
        place = topology.get_coord(rank)
        groups.setdefault(tuple(getattr(place, axis) for axis in axes), []).append(rank)
    return list(groups.values())
