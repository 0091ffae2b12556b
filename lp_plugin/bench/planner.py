"""Our exact partition beside DeepSpeed's ``partition_balanced``: time and quality on the same costs."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lp_plugin.cost import stage_tables
from lp_plugin.errors import InvalidInputError
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.partition import partition
from lp_plugin.planfile import write_atomically
from lp_plugin.quantity import format_seconds
from lp_plugin.workload import Workload

__all__ = ["compare_planners"]

SEED = 0


def compare_planners(console: Console, *, layers: int, stages: int, repeats: int, output: Path | None) -> None:
    """Partitions random integer costs 1 .. 99 with both, and prints seconds and bottlenecks.

    Ours is timed from the profile on (tables and solver), after one call to warm up; DeepSpeed's solver once, as it
    takes minutes.

    Raises:
        InvalidInputError: If the output's folder does not exist.
    """
    if output is not None and not output.resolve().parent.is_dir():
        raise InvalidInputError(f"{output} can't be written: folder {output.parent} does not exist.")
    import deepspeed  # noqa: PLC0415 - seconds to import, and an extra
    from deepspeed.runtime.utils import partition_balanced  # noqa: PLC0415

    costs = [int(cost) for cost in np.random.default_rng(SEED).integers(1, 100, layers)]
    ours, boundaries = _ours(costs, stages, repeats)
    console.print(f"ours: {format_seconds(statistics.median(ours))}; now DeepSpeed's partition_balanced ...")
    start = time.perf_counter()
    theirs = [int(bound) for bound in partition_balanced(costs, stages)]
    seconds = time.perf_counter() - start
    figures = {
        "command": f"lp-plugin bench planner --layers {layers} --stages {stages} --repeats {repeats}",
        "costs": f"{layers} integers 1 .. 99, numpy default_rng({SEED})",
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "deepspeed": deepspeed.__version__,
        "ours_seconds": ours,
        "ours_median_seconds": statistics.median(ours),
        "ours_bottleneck": _bottleneck(costs, boundaries),
        "deepspeed_seconds": seconds,
        "deepspeed_bottleneck": _bottleneck(costs, theirs),
        "lower_bound": max(*costs, -(-sum(costs) // stages)),
        "speedup": seconds / statistics.median(ours),
    }
    console.print(_table(figures, layers, stages))
    if output is not None:
        write_atomically(output, json.dumps(figures, indent=2) + "\n")
        console.print(f"figures written to {output}")


def _ours(costs: Sequence[int], stages: int, repeats: int) -> tuple[list[float], Sequence[int]]:
    profile = ModelProfile.from_costs([float(cost) for cost in costs])
    cluster = Cluster.homogeneous("h200", stages)
    workload = Workload(batch=1, sequence=1, micro_batch=1)
    seconds = []
    boundaries: Sequence[int] | None = None
    for _ in range(1 + repeats):
        start = time.perf_counter()
        boundaries = partition(stage_tables(profile, cluster, workload, tier_limit=0), len(costs))
        seconds.append(time.perf_counter() - start)
    return seconds[1:], boundaries or ()


def _bottleneck(costs: Sequence[int], boundaries: Sequence[int]) -> int:
    return max(sum(costs[start:stop]) for start, stop in pairwise(boundaries))


def _table(figures: dict[str, object], layers: int, stages: int) -> Table:
    table = Table(title=f"{layers} layers in {stages} stages", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "seconds", "slowest stage", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    ours, theirs = figures["ours_seconds"], figures["deepspeed_seconds"]
    if isinstance(ours, list) and isinstance(theirs, float):
        spread = (
            f"{format_seconds(statistics.median(ours))} ({format_seconds(min(ours))} .. {format_seconds(max(ours))})"
        )
        table.add_row("lp_plugin (exact)", spread, str(figures["ours_bottleneck"]), "1")
        ratio = f"{figures['speedup']:,.0f} x slower"
        table.add_row(
            "DeepSpeed partition_balanced", format_seconds(theirs), str(figures["deepspeed_bottleneck"]), ratio
        )
    table.add_row("lower bound", "", str(figures["lower_bound"]), "")
    return table
