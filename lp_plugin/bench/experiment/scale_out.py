"""Clusters that we do not have, by the schedule simulator: layers and links as measured, more of them.

The code that predicts the measured rows predicts these; what is not measured is listed with each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lp_plugin.bench.experiment.choose import boundaries_of
from lp_plugin.bench.experiment.costs import counted_profile, launched, links_in, links_of, pick_times, replica
from lp_plugin.bench.experiment.message_costs import Messages
from lp_plugin.bench.experiment.predict import timed_prediction
from lp_plugin.bench.experiment.results import CaseResult, Environment, Prediction, SimulatedRow
from lp_plugin.bench.experiment.settings import Case, Configuration, Experiment, ScaleOut, WantedTimes
from lp_plugin.errors import LpPluginError
from lp_plugin.hardware import Cluster, Device, Link
from lp_plugin.hardware.catalogue import load_device, load_link
from lp_plugin.measure.device import catalogue_name
from lp_plugin.measured import LayerTimes, Links
from lp_plugin.model.layers import Granularity
from lp_plugin.schedule import makespan_seconds, ring_seconds
from lp_plugin.solver.layer_table import FloatArray, LayerTable
from lp_plugin.strategy.layouts import Strategy, layouts

__all__ = ["needed_times", "simulate_scale_out"]

_ONE_DEVICE = Configuration(name="1", strategy=Strategy())
_FREE = Link(name="free", bandwidth_bytes_per_second=1e30, latency_seconds=0.0)


def needed_times(experiment: Experiment, case: Case) -> list[WantedTimes]:
    """Which layers are to be timed for a case: for its own configurations and for the clusters simulated from it.

    Returns:
        Each once. Simulated clusters take the case's own rows, and run as is faster.

    Raises:
        HardwareError: If a simulated cluster is unknown.
    """
    wanted = [
        WantedTimes(
            tensor_parallel=each.strategy.tensor_parallel,
            granularity="layer",
            rows=case.workload(each).chosen_micro_batch,
            execution=each.execution,
        )
        for each in case.configurations
    ]
    for scale in experiment.scale_out:
        if scale.case == case.name:
            for count in scale.devices:
                wanted += [
                    WantedTimes(
                        tensor_parallel=strategy.tensor_parallel,
                        granularity=granularity,
                        rows=case.workload(_ONE_DEVICE).chosen_micro_batch,
                        execution="auto",
                    )
                    for strategy, granularity in _simulated(case, scale, count)
                ]
    return list(dict.fromkeys(wanted))


def simulate_scale_out(experiment: Experiment, cases: Sequence[CaseResult]) -> tuple[SimulatedRow, ...]:
    """Every simulated cluster of an experiment: the widest tensor parallelism, one pipeline, replicas.

    Args:
        experiment: What was asked.
        cases: With the layers and links that were timed; one without layers gives rows with a reason.

    Returns:
        In the order of the file, by number of devices.

    Raises:
        HardwareError: If a simulated cluster is unknown.
    """
    results = {result.name: result for result in cases}
    by_name = {case.name: case for case in experiment.cases}
    return tuple(
        row
        for scale in experiment.scale_out
        if scale.case in results
        for count in scale.devices
        for row in _rows(by_name[scale.case], results[scale.case], scale, count)
    )


def _simulated(case: Case, scale: ScaleOut, count: int) -> Iterator[tuple[Strategy, Granularity]]:
    """What is compared on so many devices, and where each may cut."""
    profile = case.profile()
    kept, _ = layouts(profile, Cluster.homogeneous(scale.cluster, count))
    narrow = [each for each in kept if each.num_devices == count and each.data_parallel == 1]
    widths = [each for each in narrow if 1 < each.tensor_parallel <= scale.widest_tensor_parallel]
    if widths:
        yield max(widths, key=lambda each: each.tensor_parallel), "layer"
    pipeline = Strategy(pipeline_parallel=count)
    if pipeline in narrow:
        yield pipeline, "layer"
    blocks = len({layer.block for layer in profile.layers if layer.block is not None})
    if blocks % count and count <= case.profile("sublayer").num_layers > profile.num_layers:
        yield pipeline, "sublayer"
    if 1 < count <= scale.batch:
        yield Strategy(data_parallel=count), "layer"


def _rows(case: Case, result: CaseResult, scale: ScaleOut, count: int) -> Iterator[SimulatedRow]:
    cluster = Cluster.homogeneous(scale.cluster, count)
    larger = dataclasses.replace(case, processes=count, batch=scale.batch, micro_batch=scale.micro_batch)
    known = _device(result.environment)
    measured_on = known or cluster.devices[0]
    alike = count > 1 and load_link(measured_on.name) == cluster.links[0]
    for strategy, granularity in _simulated(case, scale, count):
        configuration = Configuration(name=strategy.label, strategy=strategy)
        empty = SimulatedRow(
            case=case.name,
            devices=count,
            strategy=strategy.label,
            granularity=granularity,
            boundaries=(),
            tokens_per_second=0.0,
            seconds=0.0,
            bubble_fraction=0.0,
            communication_fraction=0.0,
            assumed=(),
        )
        timed = pick_times(result.layers, strategy.tensor_parallel, "auto", granularity)
        if timed is None:
            reason = result.reason or f"no {granularity}s were timed with tensor parallelism {strategy.tensor_parallel}"
            yield dataclasses.replace(empty, reason=reason)
            continue
        ranks = strategy.tensor_parallel
        links = links_of(result.links, result.group_links, ranks) if alike else Links()
        setting = _Setting(case, larger, configuration, cluster, measured_on, links)
        try:
            row = setting.row(empty, timed)
            if known is None:
                taken = f"the devices that layers were timed on, which the catalogue lacks, for {measured_on.name}"
                row = dataclasses.replace(row, assumed=(taken, *row.assumed))
            yield row
        except LpPluginError as error:
            yield dataclasses.replace(empty, reason=str(error).splitlines()[0])


@dataclass(frozen=True)
class _Setting:
    """One strategy on one simulated cluster."""

    measured: Case
    """As it was timed."""
    case: Case
    """As it is simulated."""
    configuration: Configuration
    cluster: Cluster
    measured_on: Device
    links: Links

    def row(self, empty: SimulatedRow, timed: LayerTimes) -> SimulatedRow:
        """The simulated figures.

        Raises:
            InfeasibleError: If it does not fit the memory.
        """
        times = self._moved(timed)
        messages = Messages(cluster=self.cluster, links=links_in(self.links, timed.execution, self.case.phase))
        boundaries = boundaries_of(
            self.case, self.configuration, [times], self.links, self.cluster, granularity=times.granularity
        )
        made = timed_prediction(self.case, self.configuration, boundaries, times, messages, "auto")
        free = Messages(cluster=Cluster.homogeneous(self.cluster.devices[0], len(self.cluster.devices), _FREE))
        alone = timed_prediction(self.case, self.configuration, boundaries, times, free, "auto").stage_seconds
        waiting, exposed = self._idle(made)
        reducing = self._share(made, sum(made.stage_seconds) - sum(alone))
        return dataclasses.replace(
            empty,
            boundaries=boundaries,
            tokens_per_second=self.case.tokens / made.seconds,
            seconds=made.seconds,
            bubble_fraction=waiting,
            communication_fraction=exposed + reducing,
            assumed=tuple(self._assumed(messages, timed.rows)),
        )

    def _idle(self, made: Prediction) -> tuple[float, float]:
        """Shares of the stages' time in which they wait: for work, and for transfers that nothing hides."""
        num_micro_batches = self.case.workload(self.configuration).num_micro_batches
        if self.case.phase == "decode":
            at_once = (self.case.new_tokens - 1) * ring_seconds(made.stage_seconds, num_micro_batches)
        else:
            at_once = makespan_seconds(made.stage_seconds, num_micro_batches)
        exposed = 1 - at_once / made.seconds
        return 1 - self._share(made, sum(made.stage_seconds)) - exposed, exposed

    def _share(self, made: Prediction, seconds: float) -> float:
        """Of all stages' time, what takes all stages together so many seconds for one micro-batch."""
        passes = self.case.new_tokens - 1 if self.case.phase == "decode" else 1
        whole = len(made.stage_seconds) * made.seconds
        return self.case.workload(self.configuration).num_micro_batches * passes * seconds / whole

    def _moved(self, timed: LayerTimes) -> LayerTimes:
        """The layers' seconds on the simulated devices and micro-batches, scaled by the roofline where these differ."""
        profile = counted_profile(self.case, timed.tensor_parallel, timed.granularity)
        before = LayerTable(profile, dataclasses.replace(self.measured, micro_batch=timed.rows).workload(_ONE_DEVICE))
        after = LayerTable(profile, self.case.workload(self.configuration))

        old, new = self._launched(self.measured_on, timed), self._launched(self.cluster.devices[0], timed)

        def factors(tier: int) -> FloatArray:
            there = before.seconds(old, range(len(old.tiers))[tier])
            here = after.seconds(new, range(len(new.tiers))[tier])
            return np.divide(here, there, out=np.ones_like(here), where=there > 0)

        pairs = zip(timed.resident_seconds, factors(0), strict=True)
        return dataclasses.replace(
            timed,
            rows=self.case.workload(self.configuration).chosen_micro_batch,
            seconds=tuple(float(own * by) for own, by in zip(timed.seconds, factors(-1), strict=True)),
            resident_seconds=tuple(None if own is None else float(own * by) for own, by in pairs),
        )

    def _launched(self, device: Device, timed: LayerTimes) -> Device:
        """With the launch overhead under which layers were timed."""
        return launched(Cluster(devices=(device,), links=()), self.case, timed.execution).devices[0]

    def _assumed(self, messages: Messages, timed_rows: int) -> Iterator[str]:
        """What was not measured."""
        device, rows = self.cluster.devices[0].name, self.case.workload(self.configuration).chosen_micro_batch
        if self.measured_on.name != device:
            yield f"layers timed on {self.measured_on.name}, scaled to {device} by the roofline"
        if rows != timed_rows:
            yield f"layers timed with {timed_rows} sequences, scaled to {rows} by the roofline"
        group = replica(self.cluster, self.configuration)
        ranks = group.group_size
        if ranks > 1 and not (self.links.reduce_bytes and messages.measures(group.group_links[0])):
            yield f"all-reduces over {ranks} ranks as the catalogue has them"
        elif ranks > 1 and ranks != self.links.ranks:
            yield f"all-reduces over {ranks} ranks by the ring's formula from those measured over {self.links.ranks}"
        for link in dict.fromkeys(group.links):
            if not messages.measures(link):
                yield f"{link.name} as the catalogue has it"


def _device(environment: Environment | None) -> Device | None:
    """What the layers were timed on; None if the catalogue lacks it."""
    if environment is None:
        return None
    name = "cpu" if environment.backend == "gloo" else catalogue_name(environment.devices[0])
    return None if name is None else load_device(name)
