"""What a configuration is expected to take, from what is known before its trials: seconds, work, messages, memory.

Prefill: a drained pipeline of a replica's micro-batches; its hops run beside compute, but long ones come in between
passes on GPUs, and DeepSpeed's own ``eval_batch`` receives, computes and sends one after the other. Decode: a ring that
is never drained; a stage receives before it computes, and tokens travel back to the first stage. CPU processes may have
to share cores.

Not modelled: Python between passes, what a transfer takes from compute beside it, sampling beyond the largest logit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lp_plugin.bench.experiment.costs import (
    counted_profile,
    launched,
    links_in,
    pick_times,
    replica,
    timed_profile,
    ungrouped,
)
from lp_plugin.bench.experiment.message_costs import Messages
from lp_plugin.bench.experiment.results import Prediction
from lp_plugin.bench.experiment.settings import Case, Configuration, Execution
from lp_plugin.generate.planning import given_generation
from lp_plugin.generate.static_layers import workspace_bytes
from lp_plugin.hardware import Cluster
from lp_plugin.measured import LayerTimes, Links
from lp_plugin.model import ModelProfile
from lp_plugin.schedule import makespan_seconds, overlapped_seconds, received_beside, ring_seconds
from lp_plugin.solver.layer_table import LayerTable
from lp_plugin.solver.solve import evaluate

__all__ = ["flops_and_traffic", "link_bytes", "memory", "predictions", "timed_prediction"]

_TOKEN_BYTES = 8
Source = Literal["catalogue", "calibrated", "timed layers"]


def predictions(
    case: Case,
    configuration: Configuration,
    boundaries: Sequence[int],
    times: Sequence[LayerTimes],
    links: Links,
    cluster: Cluster,
    calibrated: Cluster | None,
    execution: Execution,
    *,
    cores: int | None = None,
) -> tuple[Prediction, ...]:
    """What the configuration should take by each source that there is.

    DeepSpeed's own ``eval_batch`` is not predicted from timed layers: it runs transformers' kernels, while layers are
    timed with our fewer ones.

    Args:
        case: Model and work.
        configuration: Strategy.
        boundaries: Half-open, one number more than stages.
        times: Of layers; the configuration's degree may be missing.
        links: Measured, of `links_of`; empty takes the cluster's.
        cluster: All devices, not grouped, by the catalogue.
        calibrated: The same by a calibration file; left out if it has too few devices.
        execution: As it will run, as far as it is known.
        cores: CPU cores that all processes share; None if each has a device of its own. A trial takes no less than all
            their work takes so many cores.

    Returns:
        In the order catalogue, calibrated, timed layers.

    Raises:
        WorkloadError: If the boundaries don't match the model or the strategy.
    """
    found = [_by_description("catalogue", case, configuration, boundaries, cluster, execution, cores)]
    if calibrated is not None and len(calibrated.devices) >= configuration.strategy.num_devices:
        found.append(_by_description("calibrated", case, configuration, boundaries, calibrated, execution, cores))
    rows = case.workload(configuration).chosen_micro_batch
    chosen = pick_times(times, configuration.strategy.tensor_parallel, execution, rows=rows)
    if chosen is not None and execution != "stock":
        messages = Messages(cluster=cluster, links=links_in(links, chosen.execution, case.phase))
        found.append(timed_prediction(case, configuration, boundaries, chosen, messages, execution, cores))
    return tuple(found)


def timed_prediction(
    case: Case,
    configuration: Configuration,
    boundaries: Sequence[int],
    times: LayerTimes,
    messages: Messages,
    execution: Execution,
    cores: int | None = None,
) -> Prediction:
    """What the configuration should take by layers timed alone, at the first tier's speed where a stage fits it.

    Args:
        case: Model and work.
        configuration: Its tensor-parallel ranks are those of ``times``.
        boundaries: Of the layers of ``times``.
        times: Of `pick_times`.
        messages: Between the ranks.
        execution: As it will run.
        cores: As for `predictions`.

    Raises:
        WorkloadError: If the boundaries don't match the model or the strategy.
    """
    profile = timed_profile(case, configuration, times, messages)
    group = ungrouped(replica(messages.cluster, configuration))
    expected = _Expected(
        case, configuration, boundaries, profile, group, messages, execution, cores, times.pass_seconds
    )
    return expected.prediction("timed layers")


def _by_description(
    source: Source,
    case: Case,
    configuration: Configuration,
    boundaries: Sequence[int],
    cluster: Cluster,
    execution: Execution,
    cores: int | None,
) -> Prediction:
    profile = counted_profile(case, configuration.strategy.tensor_parallel)
    group = launched(replica(cluster, configuration), case, execution)
    messages = Messages(cluster=cluster)
    return _Expected(case, configuration, boundaries, profile, group, messages, execution, cores).prediction(source)


@dataclass(frozen=True)
class _Expected:
    """One configuration on one description of layers and devices."""

    case: Case
    configuration: Configuration
    boundaries: Sequence[int]
    profile: ModelProfile
    group: Cluster
    """A device, or tensor-parallel group, per stage of a replica."""
    messages: Messages
    execution: Execution
    cores: int | None
    pass_seconds: float = 0.0
    """Of each stage, beside its layers."""

    def prediction(self, source: Source) -> Prediction:
        workload = self.case.workload(self.configuration)
        plan = evaluate(self.profile, self.group, workload, self.boundaries)
        stages = tuple(stage.compute_seconds + self.pass_seconds for stage in plan.stages)
        crossing = LayerTable(self.profile, workload).cuts[list(self.boundaries[1:-1])]
        hops = tuple(
            self.messages.send_seconds(link, float(num_bytes))
            for link, num_bytes in zip(self.group.links, crossing, strict=True)
        )
        return Prediction(
            source=source,
            seconds=max(
                self._seconds(stages, hops, workload.num_micro_batches, float(max(crossing, default=0.0))),
                self._on_cores(stages),
            ),
            stage_seconds=stages,
            hop_seconds=hops,
        )

    def _seconds(
        self, stages: Sequence[float], hops: Sequence[float], num_micro_batches: int, longest_message: float
    ) -> float:
        """Of a trial."""
        if self.case.phase == "decode":
            tokens = self.case.workload(self.configuration).chosen_micro_batch
            back = [self.messages.send_seconds(link, _TOKEN_BYTES * tokens) for link in self.group.links[-1:]]
            turns = [own + before for own, before in zip(stages, [*(back or [0.0]), *hops], strict=True)]
            return (self.case.new_tokens - 1) * ring_seconds(turns, num_micro_batches)
        stock = self.execution == "stock"
        if not stock and received_beside(longest_message, on_gpu=self.group.devices[0].name != "cpu"):
            return overlapped_seconds(stages, hops, num_micro_batches)
        leaving = hops if stock else (0.0,) * len(hops)
        in_turn = zip(stages, (0.0, *hops), (*leaving, 0.0), strict=True)
        return makespan_seconds([sum(each) for each in in_turn], num_micro_batches)

    def _on_cores(self, stages: Sequence[float]) -> float:
        """Seconds that the cores need at least for the work of all ranks."""
        if self.cores is None:
            return 0.0
        passes = self.case.new_tokens - 1 if self.case.phase == "decode" else 1
        count = _micro_batches(self.case, self.configuration) * self.configuration.strategy.tensor_parallel
        return passes * count * sum(stages) / self.cores


def flops_and_traffic(
    case: Case, configuration: Configuration, boundaries: Sequence[int], cluster: Cluster
) -> tuple[float, float]:
    """Floating-point operations and bytes moved to and from device memory in one trial, all devices together.

    Operations are the model's own: what tensor-parallel ranks repeat counts once. Bytes are those of all ranks, less
    what the first tier is predicted to serve. Decoding, both cover what `Row.seconds` covers: all new tokens but each
    sequence's first.

    Args:
        case: Model and work.
        configuration: Strategy.
        boundaries: Half-open, one number more than stages.
        cluster: All devices, not grouped.

    Returns:
        Operations, bytes.
    """
    workload, strategy = case.workload(configuration), configuration.strategy
    passes = case.new_tokens - 1 if case.phase == "decode" else 1
    whole = LayerTable(counted_profile(case, 1), workload)
    flops = float(np.sum(whole.flops)) / workload.chosen_micro_batch * case.batch * passes
    profile = counted_profile(case, strategy.tensor_parallel)
    plan = evaluate(profile, replica(cluster, configuration), workload, boundaries)
    missed = sum(stage.traffic_bytes * (1 - stage.hit_fraction) for stage in plan.stages)
    return flops, missed * strategy.tensor_parallel * _micro_batches(case, configuration) * passes


def link_bytes(case: Case, configuration: Configuration, boundaries: Sequence[int]) -> tuple[int, ...]:
    """Bytes that one rank of each stage of the first replica sends in one trial, decoding with its prefill.

    Activations to the next stage (decoding, also tokens to the first), and the rank's part of the ring of each
    all-reduce.

    Args:
        case: Model and work.
        configuration: Strategy.
        boundaries: Half-open, one number more than stages.

    Returns:
        One number for each stage.
    """
    strategy, workload = configuration.strategy, case.workload(configuration)
    size, rows = strategy.tensor_parallel, workload.chosen_micro_batch
    prompts = case.sequence * rows
    steps = case.new_tokens - 1 if case.phase == "decode" else 0
    tokens = prompts + rows * steps
    profile = counted_profile(case, size)
    sent = []
    for start, stop in itertools.pairwise(boundaries):
        reduced = sum(layer.all_reduce_bytes_per_token for layer in profile.layers[start:stop])
        own = 2 * (size - 1) / size * reduced * tokens
        if stop < profile.num_layers:
            own += profile.layers[stop - 1].output_bytes_per_token * tokens
        elif start > 0:
            own += _TOKEN_BYTES * rows * (steps + 1 if steps else 0)
        sent.append(round(own * workload.num_micro_batches))
    return tuple(sent)


def memory(
    case: Case, configuration: Configuration, boundaries: Sequence[int], cluster: Cluster
) -> tuple[tuple[int, int], ...]:
    """Predicted bytes of weights, and of everything at its peak, for each rank.

    Decoding, all micro-batches of a replica are slots with caches of their own. What libraries keep on a GPU is that of
    passes that are captured as graphs.

    Args:
        case: Model and work.
        configuration: Strategy.
        boundaries: Half-open, one number more than stages.
        cluster: All devices, not grouped.

    Returns:
        Pairs in the order of ranks: stages, then replicas, then members of a tensor-parallel group.
    """
    workload, strategy = case.workload(configuration), configuration.strategy
    group = replica(cluster, configuration)
    if case.phase == "decode":
        made = given_generation(
            case.profile().sharded(strategy.tensor_parallel),
            group,
            boundaries,
            prompt_tokens=case.sequence,
            new_tokens=case.new_tokens,
            micro_batch=workload.chosen_micro_batch,
            num_slots=workload.num_micro_batches,
        )
        stages = list(zip(made.weight_bytes, made.stage_memory_bytes, strict=True))
    else:
        plan = evaluate(counted_profile(case, strategy.tensor_parallel), group, workload, boundaries)
        pairs = zip(plan.stages, group.devices, strict=True)
        stages = [(stage.weight_bytes, stage.memory_bytes + workspace_bytes(device)) for stage, device in pairs]
    alike = strategy.data_parallel * strategy.tensor_parallel
    return tuple(stage for stage in stages for _ in range(alike))


def _micro_batches(case: Case, configuration: Configuration) -> int:
    """Of all replicas together, whose shares of the batch are as equal as can be."""
    replicas, rows = configuration.strategy.data_parallel, case.workload(configuration).chosen_micro_batch
    share, more = divmod(case.batch, replicas)
    return more * -(-(share + 1) // rows) + (replicas - more) * -(-share // rows)
