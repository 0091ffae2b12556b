"""The rows of a case while they come about: built, checked, measured."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lp_plugin.bench.experiment.agreement import together
from lp_plugin.bench.experiment.choose import boundaries_of
from lp_plugin.bench.experiment.contender import Contender, Outputs, Trial
from lp_plugin.bench.experiment.costs import links_of, pick_times
from lp_plugin.bench.experiment.decode import Decode
from lp_plugin.bench.experiment.engines import Built, Engines, plan_of
from lp_plugin.bench.experiment.job import CaseJob, LeftOutError, in_a_line
from lp_plugin.bench.experiment.predict import flops_and_traffic, memory, predictions
from lp_plugin.bench.experiment.prefill import Prefill, StockPrefill
from lp_plugin.bench.experiment.results import Row
from lp_plugin.bench.experiment.settings import Configuration, Execution
from lp_plugin.errors import LpPluginError, WorkloadError
from lp_plugin.hardware import Cluster
from lp_plugin.job.ranks import gather
from lp_plugin.measure.layers import synchronize
from lp_plugin.measured import Clock, LayerTimes, Links, Memory, RankClocks

__all__ = ["Entry", "Measured", "again", "build_entry", "control_apart", "running"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What is known of the machine before configurations are built."""

    cluster: Cluster
    """A device per process."""
    calibrated: Cluster | None
    """The same by a calibration file."""
    is_known: bool
    """Whether the device's peaks are those of the very GPU."""
    times: tuple[LayerTimes, ...]
    """Layers alone."""
    links: Links
    """Messages, over all processes."""
    group_links: tuple[Links, ...]
    """The same over as many as share a layer."""

    def links_of(self, configuration: Configuration) -> Links:
        """What a configuration's messages take."""
        return links_of(self.links, self.group_links, configuration.strategy.tensor_parallel)


@dataclass(kw_only=True)
class Entry:
    """A configuration on its way to a row."""

    name: str
    """Of the row."""
    configuration: Configuration
    """What runs."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Of the row, as far as they are known."""
    contender: Contender | None = None
    """Ready to run; None if it can't."""
    outputs: Outputs | None = None
    """Of its first run, as `Contender.outputs` gives them."""
    trials: list[Trial] = field(default_factory=list)
    """Of its turns."""
    alone: list[tuple[float, ...]] = field(default_factory=list)
    """Seconds of each stage by itself, in the same turns."""
    clocks: list[tuple[tuple[Clock | None, Clock | None], ...]] = field(default_factory=list)
    """Of each rank used, in the trial of a turn and while its stage was timed by itself."""

    @property
    def is_control(self) -> bool:
        """Whether it is the baseline's second appearance."""
        return self.name != self.configuration.name

    def leave_out(self, reason: str) -> None:
        """It is not run, or no further."""
        self.fields["reason"] = reason
        self.release()

    def release(self) -> None:
        """Gives back what only its trials need."""
        if self.contender is not None:
            self.contender.release()
        self.contender = None

    def row(self) -> Row:
        """What was found out."""
        strategy = self.configuration.strategy
        tokens = [trial.token_seconds for trial in self.trials if trial.token_seconds is not None]
        return Row(
            name=self.name,
            data_parallel=strategy.data_parallel,
            tensor_parallel=strategy.tensor_parallel,
            pipeline_parallel=strategy.pipeline_parallel,
            partition=self.configuration.partition,
            seconds=tuple(trial.seconds for trial in self.trials),
            first_token_seconds=tuple(trial.first_token_seconds for trial in self.trials),
            token_seconds=tuple(tokens),
            alone_seconds=tuple(statistics.median(each) for each in zip(*self.alone, strict=True)),
            clocks=tuple(_rank_clocks(rank, turns) for rank, turns in enumerate(zip(*self.clocks, strict=True))),
            **self.fields,
        )


def _rank_clocks(rank: int, turns: Sequence[tuple[Clock | None, Clock | None]]) -> RankClocks:
    trials, alone = (_median_clock([clock for clock in clocks if clock]) for clocks in zip(*turns, strict=True))
    return RankClocks(rank=rank, trials=trials, alone=alone)


def _median_clock(clocks: Sequence[Clock]) -> Clock | None:
    if not clocks:
        return None
    return Clock(
        hertz=statistics.median(clock.hertz for clock in clocks),
        capped_fraction=statistics.median(clock.capped_fraction for clock in clocks),
    )


def build_entry(job: CaseJob, configuration: Configuration, engines: Engines, measured: Measured) -> Entry:
    """A configuration, built and run once, or the reason why not; collective over all ranks.

    Of one that has too few GPUs here all is known that takes no run: its cut, and what is predicted of it.

    Args:
        job: The case.
        configuration: Which.
        engines: Takes or makes its engine.
        measured: Of the machine.
    """
    rows = job.case.workload(configuration).chosen_micro_batch
    entry = Entry(name=configuration.name, configuration=configuration, fields={"micro_batch": rows})
    if configuration.name in job.excluded:
        entry.leave_out(job.excluded[configuration.name])
        return entry
    try:
        _refuse(job, configuration)
        boundaries = _choose(job, entry, measured)
        predicted = memory(job.case, configuration, boundaries, measured.cluster)
        if shortage := job.shortage(configuration):
            entry.fields["memory"] = _memory(predicted)
            entry.fields["execution"] = _expected_execution(job, configuration, measured)
            _predict(job, entry, measured)
            entry.leave_out(shortage)
            return entry
        engines.check_room(configuration, boundaries, predicted)
        built = engines.get(configuration, plan_of(job.case, configuration, boundaries, measured.cluster))
        entry.contender = _contender(job, configuration, built)
        _run_once(entry, entry.contender, predicted)
        _predict(job, entry, measured)
    except (LpPluginError, LeftOutError) as error:
        entry.leave_out(in_a_line(error))
    return entry


def _refuse(job: CaseJob, configuration: Configuration) -> None:
    """What can't be done at all."""
    if configuration.execution == "stock" and configuration.strategy.num_devices < job.ranks:
        raise WorkloadError(
            "DeepSpeed's eval_batch waits for all processes; put one device's stock into a case of one process"
        )
    if job.case.phase == "prefill":
        return
    if configuration.execution == "eager" and torch.cuda.is_available():
        raise WorkloadError("decoding on GPUs runs as CUDA graphs; take eager out")
    if configuration.execution in {"graphs", "compiled"} and not torch.cuda.is_available():
        raise WorkloadError(f"{configuration.execution} needs a GPU; take it out, or run on one")


def _choose(job: CaseJob, entry: Entry, measured: Measured) -> tuple[int, ...]:
    case, configuration = job.case, entry.configuration
    links = measured.links_of(configuration)
    boundaries = boundaries_of(case, configuration, measured.times, links, measured.cluster)
    entry.fields["boundaries"] = boundaries
    if configuration.partition == "cache-aware":
        entry.fields["catalogue_boundaries"] = boundaries_of(case, configuration, (), Links(), measured.cluster)
    return boundaries


def _contender(job: CaseJob, configuration: Configuration, built: Built) -> Contender:
    if job.case.phase == "decode":
        return Decode(job.case, configuration, built)
    if configuration.execution == "stock":
        return StockPrefill(job.case, configuration, built)
    return Prefill(job.case, configuration, built)


def _run_once(entry: Entry, contender: Contender, predicted: Sequence[tuple[int, int]]) -> None:
    """First each rank's stage alone, then all together; memory is what that takes."""
    cuda = torch.cuda.is_available()
    strategy = entry.configuration.strategy
    waits = strategy.num_devices > strategy.data_parallel
    together(contender.alone_once)
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    together(contender.prepare)

    def run() -> None:
        if contender.takes_part:
            contender.batch()
            synchronize()

    together(run, waits=waits)
    entry.outputs = contender.outputs()  # before anything writes over them
    loaded = contender.built.loaded_bytes
    peak = None if loaded is None else torch.cuda.max_memory_allocated() - before + loaded
    found = gather((loaded, peak))
    entry.fields["memory"] = _memory(predicted, [found[rank] for rank in contender.ranks])
    entry.fields["execution"] = gather(contender.execution)[0]


def _memory(
    predicted: Sequence[tuple[int, int]], found: Sequence[tuple[int | None, int | None]] | None = None
) -> tuple[Memory, ...]:
    """Of each rank weights and peak as predicted, and as found."""
    pairs = zip(predicted, found or [(None, None)] * len(predicted), strict=True)
    return tuple(
        Memory(rank=rank, predicted_weights=weights, loaded=loaded, predicted_peak=most, peak=peak)
        for rank, ((weights, most), (loaded, peak)) in enumerate(pairs)
    )


def _expected_execution(job: CaseJob, configuration: Configuration, measured: Measured) -> Execution:
    """How a configuration that is not run is expected to run; the choice itself would take the whole stage's time."""
    if configuration.execution != "auto":
        return configuration.execution
    if job.case.phase == "decode":
        return "graphs" if torch.cuda.is_available() else "eager"
    rows = job.case.workload(configuration).chosen_micro_batch
    chosen = pick_times(measured.times, configuration.strategy.tensor_parallel, "auto", rows=rows)
    return "eager" if chosen is None else chosen.execution


def _predict(job: CaseJob, entry: Entry, measured: Measured) -> None:
    """Predictions, now that the execution is known, and what the work amounts to."""
    case, configuration, boundaries = job.case, entry.configuration, entry.fields["boundaries"]
    device, used = measured.cluster.devices[0], configuration.strategy.num_devices
    flops, traffic = flops_and_traffic(case, configuration, boundaries, measured.cluster)
    entry.fields |= {
        "predictions": predictions(
            case,
            configuration,
            boundaries,
            measured.times,
            measured.links_of(configuration),
            measured.cluster,
            measured.calibrated,
            entry.fields["execution"],
            cores=None if torch.cuda.is_available() else os.cpu_count(),
        ),
        "flops": flops,
        "traffic_bytes": traffic,
        "peak_flops": dict(device.peak_flops).get(case.dtype, 0.0) * used if measured.is_known else 0.0,
        "peak_bandwidth": device.memory.bandwidth_bytes_per_second * used if measured.is_known else 0.0,
    }


def again(entry: Entry) -> Entry:
    """The same contender under a name of its own: what differs is noise."""
    return dataclasses.replace(
        entry, name=f"{entry.name} (again)", fields=dict(entry.fields), trials=[], alone=[], clocks=[]
    )


def control_apart(there: Sequence[tuple[Entry, Contender]], baseline: str) -> list[tuple[Entry, Contender]]:
    """In the order of the first turn, from the baseline on; half a turn later its control, which is the same engine.

    Turns that go on from there then have others between the two, if there are two others.

    Args:
        there: All that run, the control last.
        baseline: Its name; without it there is no control.
    """
    names = [entry.name for entry, _ in there]
    if baseline not in names:
        return list(there)
    first = names.index(baseline)
    *others, control = [*there[first:-1], *there[:first], there[-1]]
    middle = (len(others) + 1) // 2
    return [*others[:middle], control, *others[middle:]]


def running(entries: Sequence[Entry]) -> list[tuple[Entry, Contender]]:
    """Those that can run."""
    return [(entry, entry.contender) for entry in entries if entry.contender is not None]
