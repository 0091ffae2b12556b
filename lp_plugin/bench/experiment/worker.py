"""One rank of a case: measures the machine, builds the configurations, lets them take turns."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from typing import Literal

import torch
from deepspeed import comm as dist
from torch import distributed

from lp_plugin.bench.experiment.agreement import together
from lp_plugin.bench.experiment.contender import Contender, Outputs, Trial
from lp_plugin.bench.experiment.engines import Engines
from lp_plugin.bench.experiment.entries import Entry, Measured, again, build_entry, control_apart, running
from lp_plugin.bench.experiment.environment import describe_environment
from lp_plugin.bench.experiment.insight import count_sent, counted, profile_entries
from lp_plugin.bench.experiment.job import CaseJob, LeftOutError, case_fields, keep_measured, note_reason
from lp_plugin.bench.experiment.one_by_one import time_stages
from lp_plugin.bench.experiment.progress import Steps
from lp_plugin.bench.experiment.results import CaseResult
from lp_plugin.bench.experiment.settings import Execution, WantedTimes
from lp_plugin.bench.experiment.trials import differs, passes_per_turn, take_turn, time_alone, turn_order, warm_up
from lp_plugin.errors import HardwareError
from lp_plugin.hardware import Cluster
from lp_plugin.integrations.deepspeed.alone.layer_times import time_model_layers
from lp_plugin.job.ranks import agree, gather, run_rank
from lp_plugin.measure.clocks import ClockLog
from lp_plugin.measure.device import detect_device, device_name
from lp_plugin.measure.layers import give_back_memory
from lp_plugin.measure.links import time_links
from lp_plugin.measured import LayerTimes, Links

__all__ = ["run_case_rank"]

Timed = Literal["eager", "graphs", "compiled"]
"""Ways to time layers."""


def run_case_rank(job: CaseJob) -> CaseResult | None:
    """This process's part of a case; collective. The result on rank 0, None elsewhere."""
    try:
        return run_rank(lambda: job, _run)
    except BaseException as error:
        note_reason(job.folder, error)
        raise


def _run(job: CaseJob) -> CaseResult | None:
    steps = Steps(job)
    steps.begin("measuring the machine")
    measured = _measure(job, steps)
    entries: list[Entry] = []
    turns: list[str] = []
    if job.has_rows:
        entries = _build(job, measured, steps)
        _check_outputs(job, entries, steps)
    environment = describe_environment(gather(device_name()))

    def found() -> CaseResult:
        return CaseResult(
            **case_fields(job.case),
            rows=tuple(entry.row() for entry in entries),
            turns=tuple(turns),
            layers=measured.times,
            links=measured.links,
            group_links=measured.group_links,
            environment=environment,
        )

    is_first = dist.get_rank() == 0
    if job.has_trials:
        if is_first:
            keep_measured(job, found())  # layers, predictions, memory
        for turn in _turns(job, entries, steps):
            turns.append(turn)
            whole_round = len({len(entry.trials) for entry, _ in running(entries)}) == 1
            if is_first and whole_round:
                keep_measured(job, found())
        time_stages(job, entries, _device(), steps)
    if "time-split" in job.tables:
        profile_entries(entries, steps)
    if "memory-access" in job.tables and job.case.counters:
        count_sent(job, counted(job.case, entries), measured.cluster, steps)
    for entry in entries:
        entry.release()  # graphs have to go before the process groups that they use
    steps.end()
    return found() if is_first else None


def _measure(job: CaseJob, steps: Steps) -> Measured:
    cluster, is_known = _cluster(job)
    links = time_links(_device()) if job.ranks > 1 else Links()
    group_links = tuple(_group_links(ranks) for ranks in _group_sizes(job))
    times: list[LayerTimes] = []
    for wanted, execution in _to_time(job):
        what = f"timing {wanted.granularity}s alone, TP={wanted.tensor_parallel}, {wanted.rows} rows, {execution}"
        steps.begin(what)
        try:
            found = together(functools.partial(_time, job, cluster, wanted, execution))
        except LeftOutError as error:
            steps.say(f"{what}: {error}")
            continue
        times.append(agree(found))
        steps.say(what)
    give_back_memory()  # of copies of layers, and graphs over them
    calibrated = None if job.calibration is None else Cluster.from_toml(job.calibration)
    return Measured(
        cluster=cluster,
        calibrated=calibrated,
        is_known=is_known,
        times=tuple(times),
        links=links,
        group_links=group_links,
    )


def _group_sizes(job: CaseJob) -> list[int]:
    """Ranks that share a layer, where these are some of all."""
    sizes = {configuration.strategy.tensor_parallel for configuration in job.case.configurations}
    return sorted(size for size in sizes if 1 < size < job.ranks)


def _group_links(ranks: int) -> Links:
    """Messages among the first ranks, while the others rest; collective over all."""
    group = distributed.new_group(list(range(ranks)))
    takes_part = dist.get_rank() < ranks
    links = time_links(_device(), group) if takes_part else None
    dist.barrier()
    if takes_part:
        distributed.destroy_process_group(group)
    return agree(links)


def _time(job: CaseJob, cluster: Cluster, wanted: WantedTimes, execution: Timed) -> LayerTimes | None:
    """Layers alone, on rank 0; the others rest."""
    if dist.get_rank():
        return None
    case = job.case
    return time_model_layers(
        case.config,
        dtype=case.dtype,
        device=_device(),
        rows=wanted.rows,
        tokens=case.sequence,
        cache_length=case.sequence + case.new_tokens if case.phase == "decode" else 0,
        tensor_parallel=wanted.tensor_parallel,
        execution=execution,
        granularity=wanted.granularity,
        first_tier_bytes=cluster.devices[0].cache_bytes,
    )


def _to_time(job: CaseJob) -> list[tuple[WantedTimes, Timed]]:
    """Each kind of layers in each way that configurations may run it, once."""
    found = {
        (dataclasses.replace(wanted, execution="auto"), way): None
        for wanted in job.times
        for way in _ways(wanted.execution, decoding=job.case.phase == "decode")
    }
    return list(found)


def _ways(execution: Execution, *, decoding: bool) -> tuple[Timed, ...]:
    """How layers of a configuration are timed."""
    if not torch.cuda.is_available():
        return ("eager",)
    if decoding:
        return ("compiled" if execution == "compiled" else "graphs",)
    ways: dict[Execution, tuple[Timed, ...]] = {
        "auto": ("eager", "graphs"),
        "eager": ("eager",),
        "stock": ("eager",),
        "graphs": ("graphs",),
        "compiled": ("compiled",),
    }
    return ways[execution]


def _cluster(job: CaseJob) -> tuple[Cluster, bool]:
    """A device per process, as rank 0 finds its own; one that the catalogue lacks as the calibration describes it."""
    processes = job.case.processes
    try:
        device = detect_device(int(os.environ["LOCAL_RANK"]), processes)
    except HardwareError:
        if job.calibration is None:
            raise
        return Cluster.from_toml(job.calibration).subset(processes), False
    return Cluster.homogeneous(agree(device), processes), torch.cuda.is_available()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _build(job: CaseJob, measured: Measured, steps: Steps) -> list[Entry]:
    """Every configuration, in the order of the file; the baseline is built first, so that it finds room."""
    engines = Engines(job, measured.cluster)
    entries = {}
    for configuration in sorted(job.case.configurations, key=lambda each: each.name != job.case.baseline):
        steps.begin(f"building {configuration.name}", configuration.name)
        entry = build_entry(job, configuration, engines, measured)
        fields = entry.fields
        if entry.contender is None:
            steps.say(f"{entry.name} is left out: {fields['reason']}")
        else:
            owner = entry.contender.built.made_for
            shared = "" if owner == entry.name else f", on the engine of {owner}"
            steps.say(f"{entry.name} is built, {fields['execution']}, boundaries {list(fields['boundaries'])}{shared}")
        entries[configuration.name] = entry
    return [entries[configuration.name] for configuration in job.case.configurations]


def _check_outputs(job: CaseJob, entries: list[Entry], steps: Steps) -> None:
    """Leaves out what computes something else than the baseline does (than the first that runs, if that does not)."""
    steps.begin("comparing results")
    found: dict[str, Outputs] = {}
    for entry, _ in running(entries):
        made = gather(entry.outputs)
        found[entry.name] = next(each for each in made if each is not None)
    reference = found.get(job.case.baseline, next(iter(found.values()), None))
    for entry, _ in running(entries):
        reason = "" if reference is None else agree(differs(found[entry.name], reference, job.case.dtype))
        if reason:
            steps.say(f"{entry.name} is left out: {reason}")
            entry.leave_out(reason)


def _turns(job: CaseJob, entries: list[Entry], steps: Steps) -> Iterator[str]:
    """Trials of all, the baseline a second time as the control; yields whose turn it was."""
    entries += [again(entry) for entry, _ in running(entries) if entry.name == job.case.baseline]
    there = control_apart(running(entries), job.case.baseline)
    passes: dict[str, int] = {}
    """Of a configuration's turns; the control is the baseline's engine, and as warm."""
    for entry, contender in there:
        if entry.is_control:
            continue
        steps.begin(f"warming up {entry.name}", entry.configuration.name)
        trial = warm_up(contender)
        passes[entry.name] = passes_per_turn(trial)
        time_alone(contender, trial.seconds)
        steps.say(f"{entry.name} is warm, {_rate(job, trial)}")
    with ClockLog(_device()) as log:
        for position in turn_order(len(there), job.trials):
            entry, contender = there[position]
            steps.begin(f"running {entry.name}", entry.configuration.name)
            _turn(entry, contender, passes[entry.configuration.name], log)
            steps.say(f"turn {len(entry.trials)} of {job.trials}: {entry.name}, {_rate(job, entry.trials[-1])}")
            yield entry.name
    if log.reason and torch.cuda.is_available():
        steps.say(log.reason.rstrip("."))


def _turn(entry: Entry, contender: Contender, passes: int, log: ClockLog) -> None:
    """A trial, and right after it each stage by itself, with the clocks of both."""
    start = time.perf_counter()
    entry.trials.append(take_turn(contender, passes))
    clock, alone_clock = log.since(start), None
    if not entry.is_control:
        start = time.perf_counter()
        entry.alone.append(time_alone(contender, entry.trials[-1].seconds))
        alone_clock = log.since(start) if entry.alone[-1] else None
    found = gather((clock, alone_clock))
    if any(map(any, found)):
        entry.clocks.append(tuple(found[rank] for rank in contender.ranks))


def _rate(job: CaseJob, trial: Trial) -> str:
    return f"{job.case.tokens / trial.seconds:,.0f} tokens/s"
