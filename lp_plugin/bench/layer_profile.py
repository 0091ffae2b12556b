"""``lp-plugin profile``: a model's layers timed on this machine, beside what the planner predicts of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lp_plugin.errors import WorkloadError
from lp_plugin.files import check_output, write_atomically
from lp_plugin.generate.static_layers import last_logits, on_static_caches, replayed
from lp_plugin.hardware import Cluster
from lp_plugin.integrations.deepspeed.alone.layer_times import time_model_layers
from lp_plugin.measure.device import detect_device
from lp_plugin.measure.turns import NOISE, UNSTEADY, WHY_UNSTEADY, format_difference
from lp_plugin.measured import LayerTimes
from lp_plugin.model import ModelProfile
from lp_plugin.model.architecture import read_config
from lp_plugin.model.layers import Granularity
from lp_plugin.planner import make_plan
from lp_plugin.quantity import format_bytes, format_seconds
from lp_plugin.solver.layer_table import LayerTable
from lp_plugin.solver.solve import evaluate
from lp_plugin.workload import Workload

__all__ = ["profile_model"]

_MICRO_BATCHES = 4
"""Per stage, of the batch that boundaries are compared for."""


def profile_model(
    console: Console,
    model: str,
    *,
    sequence: int,
    micro_batch: int,
    phase: Literal["prefill", "decode"],
    dtype: str | None,
    granularity: Granularity,
    tensor_parallel: int,
    cluster: str | None,
    stages: int | None,
    output: Path | None,
) -> None:
    """Times the layers, prints a table, writes the times.

    Args:
        console: For the table.
        model: Directory or ``config.json``.
        sequence: Tokens per sequence; when decoding, of the cache.
        micro_batch: Sequences.
        phase: What is timed.
        dtype: Instead of the config's.
        granularity: Whether blocks are whole.
        tensor_parallel: Ranks that share each layer.
        cluster: What to predict for; None asks the driver.
        stages: For which to compare boundaries; None for none.
        output: JSON file of the times; None for none.

    Raises:
        LpPluginError: Any of its kinds, before anything is timed.
    """
    if output is not None:
        check_output(output, "the times")
    whole = ModelProfile.from_config(model, dtype=dtype, granularity=granularity)
    _check_asked(whole, sequence, stages)
    count = stages or 1
    asked = _Asked(
        profile=whole.sharded(tensor_parallel) if tensor_parallel > 1 else whole,
        cluster=_cluster(cluster, count * tensor_parallel).grouped(tensor_parallel),
        workload=Workload(
            phase=phase, batch=micro_batch * _MICRO_BATCHES * count, sequence=sequence, micro_batch=micro_batch
        ),
    )
    times = _timed(model, asked)
    console.print(asked.table(times))
    for line in asked.remarks(times, stages):
        console.print(line)
    if output is not None:
        write_atomically(output, json.dumps(asked.figures(times), indent=1) + "\n")
        console.print(f"written: {output}")


def _timed(model: str, asked: _Asked) -> LayerTimes:
    """The layers on this machine's first GPU, or on a core of its CPU."""
    cuda, profile, workload = torch.cuda.is_available(), asked.profile, asked.workload
    decodes = workload.phase == "decode"
    with _one_thread():
        return time_model_layers(
            read_config(model),
            dtype=profile.dtype,
            device=torch.device("cuda", 0) if cuda else torch.device("cpu"),
            rows=workload.chosen_micro_batch,
            tokens=workload.sequence,
            cache_length=workload.sequence if decodes else 0,
            tensor_parallel=profile.tensor_parallel,
            execution="graphs" if cuda and decodes else "eager",
            granularity=profile.granularity,
            first_tier_bytes=asked.cluster.devices[0].cache_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What is predicted and for what."""

    profile: ModelProfile
    """As one rank of a group holds the layers."""
    cluster: Cluster
    """A device, or group, for each stage."""
    workload: Workload
    """With its micro-batch."""

    @property
    def as_run(self) -> ModelProfile:
        """The layers as generation or scoring runs them."""
        if self.workload.phase == "prefill":
            return self.profile
        return last_logits(on_static_caches(self.profile, 1, self.workload.sequence), 1)

    def table(self, times: LayerTimes) -> Table:
        """A row for each kind of layer."""
        eager = times.execution == "eager"
        device = (self.cluster if eager else replayed(self.cluster, "decode", compiled=False)).devices[0]
        costs = LayerTable(self.as_run, self.workload)
        predicted = costs.seconds(device, len(device.tiers) - 1)
        table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("layer", no_wrap=True)
        for heading in ("predicted", "measured", "off", "in cache", "weights", "measured", "beside them", "measured"):
            table.add_column(heading, justify="right", no_wrap=True)
        for places in self._kinds():
            first = places[0]
            seconds, resident = times.seconds[first], times.resident_seconds[first]
            peak = times.peak_bytes[first]
            names = [self.profile.layers[place].name for place in (first, places[-1])]
            table.add_row(
                names[0] if len(places) == 1 else f"{' .. '.join(names)}, each of {len(places)}",
                format_seconds(float(predicted[first])),
                format_difference(seconds),
                f"{predicted[first] / seconds - 1:+.0%}" if seconds else "",
                "" if resident is None else format_difference(resident),
                format_bytes(float(costs.weights[first])),
                format_bytes(times.weight_bytes[first]),
                format_bytes(float(costs.buffers[first] + costs.cuts[first + 1])),
                "not measured" if peak is None else format_bytes(peak),
            )
        return table

    def remarks(self, times: LayerTimes, stages: int | None) -> list[str]:
        """What the table does not say."""
        lines = [f"{times.execution}; besides, each pass of a stage takes {format_difference(times.pass_seconds)}"]
        if 0.0 in (*times.seconds, *times.resident_seconds, times.pass_seconds):
            lines.append(f"{NOISE}: stages with and without it took the same time, to within what repeats differ by")
        if times.spread > UNSTEADY:
            lines.append(f"warning: repeats differ by up to {times.spread:.0%}. {WHY_UNSTEADY}")
        if times.launch_seconds:
            lines.append(f"launching a block kernel by kernel takes the host {format_seconds(times.launch_seconds)}")
        if stages is not None:
            lines.append(self._moves(times, stages))
        return lines

    def figures(self, times: LayerTimes) -> dict[str, Any]:
        """The times and what was timed, for a file."""
        return {
            "model": self.profile.name,
            "phase": self.workload.phase,
            "sequence": self.workload.sequence,
            "micro_batch": self.workload.chosen_micro_batch,
            "dtype": self.profile.dtype,
            "layers": [layer.name for layer in self.profile.layers],
            "times": dataclasses.asdict(times),
        }

    def _kinds(self) -> list[list[int]]:
        """Positions of the layers of each kind."""
        kinds: dict[object, list[int]] = {}
        for position, layer in enumerate(self.profile.layers):
            kinds.setdefault(layer.anywhere, []).append(position)
        return list(kinds.values())

    def _moves(self, times: LayerTimes, stages: int) -> str:
        """Whether the best boundaries are others with the times measured."""
        predicted = make_plan(self.profile, self.cluster, self.workload, stages)
        timed = self.profile.with_seconds(times.seconds, measured_on=self.cluster.devices[0])
        best = make_plan(timed, self.cluster, self.workload, stages)
        before = evaluate(timed, self.cluster, self.workload, predicted.boundaries)
        loss = before.bottleneck_seconds / best.bottleneck_seconds - 1
        if before.bottleneck_seconds <= best.bottleneck_seconds:
            return (
                f"the cut into {stages} stages stays: {_joined(predicted.boundaries)} is best with the times measured"
            )
        return (
            f"the cut into {stages} stages moves: predicted {_joined(predicted.boundaries)}, with the times measured "
            f"{_joined(best.boundaries)}; the predicted one takes {loss:.1%} longer"
        )


def _cluster(spec: str | None, count: int) -> Cluster:
    """The devices to predict for; without a word about them, as many of this host's kind as it takes."""
    if spec is None:
        return Cluster.homogeneous(detect_device(0, 1), count)
    cluster = Cluster.parse(spec)
    if len(cluster.devices) < count:
        raise WorkloadError(f"--cluster {spec} has {len(cluster.devices)} devices, but {count} are needed; give more.")
    return cluster.subset(count)


def _check_asked(profile: ModelProfile, sequence: int, stages: int | None) -> None:
    most = profile.max_positions
    if most is not None and sequence > most:
        raise WorkloadError(
            f"--sequence is {sequence}, but the model allows {most} positions (max_position_embeddings); lower it."
        )
    if stages is not None and stages > profile.num_layers:
        raise WorkloadError(f"--stages is {stages}; {profile.name} has {profile.num_layers} layers, give at most that.")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A CPU as the catalogue describes it: one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _joined(boundaries: tuple[int, ...]) -> str:
    return ", ".join(map(str, boundaries))
