"""The planner's own time: plain costs beside DeepSpeed's ``partition_balanced``, large chains, costs with tiers."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lp_plugin.errors import InvalidInputError
from lp_plugin.files import write_atomically
from lp_plugin.hardware import Cluster, Device, Link, MemoryTier
from lp_plugin.model import LayerCost, ModelProfile
from lp_plugin.quantity import format_seconds
from lp_plugin.solver.cost import stage_tables
from lp_plugin.solver.criteria import Seconds, StageLimits
from lp_plugin.solver.partition import partition
from lp_plugin.workload import Workload

__all__ = ["compare_planners"]

SEED = 0
_LARGE = (10_000, 1_024)

Figures = dict[str, Any]


def compare_planners(
    console: Console, *, layers: int, stages: int, repeats: int, model: Path | None, output: Path | None
) -> None:
    """Times four jobs after a warm-up each and prints median, fastest and slowest.

    Plain integer costs 1 .. 99 (ours from the profile on: tables and solver; DeepSpeed's once, as it takes a minute);
    ten times as many; costs with three tiers, full memory and unequal devices and links; and, if a model is given,
    the whole command ``lp-plugin plan`` as a process.

    Raises:
        InvalidInputError: If the output's folder does not exist.
    """
    if output is not None and not output.resolve().parent.is_dir():
        raise InvalidInputError(f"{output} can't be written: folder {output.parent} does not exist.")
    import deepspeed  # noqa: PLC0415 - seconds to import, and an extra
    from deepspeed.runtime.utils import partition_balanced  # noqa: PLC0415

    figures: Figures = {
        "command": f"lp-plugin bench planner --layers {layers} --stages {stages} --repeats {repeats}"
        + (f" --model {model}" if model else ""),
        "costs": f"integers 1 .. 99, numpy default_rng({SEED})",
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "deepspeed": deepspeed.__version__,
        "plain": _plain(layers, stages, repeats),
        "large": _plain(*_LARGE, repeats),
        "tiers": _timed(lambda: _with_tiers(layers, stages), repeats) | {"layers": layers, "stages": stages},
    }
    if model is not None:
        figures["command_line"] = _timed(lambda: _whole_command(model), repeats)
    console.print(f"ours done; now DeepSpeed's partition_balanced for {layers} layers, {stages} stages ...")
    costs = _random_costs(layers)
    start = time.perf_counter()
    theirs = [int(bound) for bound in partition_balanced(costs, stages)]
    seconds = time.perf_counter() - start
    figures["deepspeed_plain"] = {"seconds": seconds, "bottleneck": _bottleneck(costs, theirs)}
    figures["speedup"] = seconds / figures["plain"]["median_seconds"]
    console.print(_table(figures, layers, stages))
    if output is not None:
        write_atomically(output, json.dumps(figures, indent=2) + "\n")
        console.print(f"figures written to {output}")


def _random_costs(layers: int) -> list[int]:
    return [int(cost) for cost in np.random.default_rng(SEED).integers(1, 100, layers)]


def _timed(job: Callable[[], object], repeats: int) -> Figures:
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "median_seconds": statistics.median(seconds[1:])}


def _cut(profile: ModelProfile, cluster: Cluster, workload: Workload) -> tuple[int, ...]:
    tables = stage_tables(profile, cluster, workload)
    kinds = {id(table): Seconds(table, StageLimits()) for table in tables}
    return partition([kinds[id(table)] for table in tables], profile.num_layers) or ()


def _plain(layers: int, stages: int, repeats: int) -> Figures:
    costs = _random_costs(layers)
    profile = ModelProfile.from_costs([float(cost) for cost in costs])
    cluster = Cluster.homogeneous("h200", stages)
    workload = Workload(batch=1, sequence=1, micro_batch=1)
    found: list[tuple[int, ...]] = []
    figures = _timed(lambda: found.append(_cut(profile, cluster, workload)), repeats)
    lower = max(*costs, -(-sum(costs) // stages))
    slowest = _bottleneck(costs, found[-1])
    return figures | {"layers": layers, "stages": stages, "bottleneck": slowest, "lower_bound": lower}


def _with_tiers(layers: int, stages: int) -> tuple[int, ...]:
    """Every layer, device and link different; tiers that stages move between, and memory that is nearly full."""
    random = np.random.default_rng(SEED)
    weights = [int(weight) for weight in random.integers(1, 100, layers)]
    chain = tuple(
        LayerCost(
            name=f"layer {index}",
            parameters=weight,
            weight_bytes=weight,
            weight_traffic_bytes=weight,
            flops_per_token=float(random.integers(1, 10)),
            output_bytes_per_token=float(random.integers(1, 10)),
        )
        for index, weight in enumerate(weights)
    )
    profile = ModelProfile(name="random", layers=chain, dtype="float32")
    share = sum(weights) / stages
    devices = [_device(position, share * random.uniform(1.3, 2.0), random) for position in range(stages)]
    links = [
        Link(name="link", bandwidth_bytes_per_second=random.uniform(1, 9), latency_seconds=random.uniform(0, 2))
        for _ in range(stages - 1)
    ]
    cluster = Cluster(devices=tuple(devices), links=tuple(links))
    return _cut(profile, cluster, Workload(batch=1, sequence=1, micro_batch=1))


def _device(position: int, capacity: float, random: np.random.Generator) -> Device:
    def tier(name: str, share: float, rate: float) -> MemoryTier:
        size = max(int(capacity * share), 1)
        return MemoryTier(name=name, capacity_bytes=size, bandwidth_bytes_per_second=rate * random.uniform(0.5, 1.0))

    return Device(
        name=f"device {position}",
        tiers=(tier("l2", 0.3, 16.0), tier("hbm", 0.6, 4.0), tier("host", 1.0, 1.0)),
        peak_flops=(("float32", 1.0),),
        compute_efficiency=1.0,
        layer_overhead_seconds=0.0,
    )


def _whole_command(model: Path) -> None:
    command = [sys.executable, "-m", "lp_plugin", "plan", str(model), "--cluster", "h100-sxm:16"]
    subprocess.run(  # noqa: S603 - our own command
        [*command, "--batch", "256", "--sequence", "8192"], check=True, stdout=subprocess.DEVNULL
    )


def _bottleneck(costs: Sequence[int], boundaries: Sequence[int]) -> int:
    return max(sum(costs[start:stop]) for start, stop in pairwise(boundaries))


def _table(figures: Figures, layers: int, stages: int) -> Table:
    table = Table(title="planner", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "seconds", "slowest stage", "lower bound", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    size = f"{layers} layers, {stages} stages"
    for name, key in ((f"lp_plugin, {size}", "plain"), ("lp_plugin, {} layers, {} stages".format(*_LARGE), "large")):
        each = figures[key]
        ratio = "1" if key == "plain" else ""
        table.add_row(name, _spread(each), str(each["bottleneck"]), str(each["lower_bound"]), ratio)
    table.add_row(f"lp_plugin, {size}, tiers, memory, unequal devices", _spread(figures["tiers"]), "", "", "")
    if "command_line" in figures:
        table.add_row("lp-plugin plan, whole process", _spread(figures["command_line"]), "", "", "")
    theirs = figures["deepspeed_plain"]
    ratio = f"{figures['speedup']:,.0f} x slower"
    table.add_row(
        f"DeepSpeed partition_balanced, {size}",
        format_seconds(theirs["seconds"]),
        str(theirs["bottleneck"]),
        str(figures["plain"]["lower_bound"]),
        ratio,
    )
    return table


def _spread(figures: Figures) -> str:
    seconds = figures["seconds"]
    median = format_seconds(figures["median_seconds"])
    return f"{median} ({format_seconds(min(seconds))} .. {format_seconds(max(seconds))})"
