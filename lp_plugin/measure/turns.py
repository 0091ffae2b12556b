"""Seconds of things that are compared: many runs between two looks at the clock, in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lp_plugin.measure.graphs import spread_over_streams
from lp_plugin.measure.layers import synchronize
from lp_plugin.quantity import format_seconds

__all__ = [
    "NOISE",
    "UNSTEADY",
    "WHY_UNSTEADY",
    "Repeated",
    "Runner",
    "format_difference",
    "median_of",
    "seconds_in_turns",
]

NOISE = "< noise"
"""In place of a difference that is none."""
UNSTEADY = 0.2
"""Spread from which on figures are doubted."""
WHY_UNSTEADY = "Other programs use the device, or its clocks change with its temperature and power; measure again."
"""Said of them."""
_TURNS = 7
_SPAN_SECONDS = {"cuda": 20e-3, "cpu": 10e-3}
"""A span between two looks at the clock takes at least this long, by type of device."""
_LEAST_CALLS = 3
"""In a span: a GPU at its power limit takes a tenth more or less from one pass of milliseconds to the next."""
_WARM_UP_RUNS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeated:
    """Something timed several times."""

    seconds: float
    """The median."""
    spread: float
    """Between the quartiles, over the median: half of the times differ by no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Something to time."""

    run: Callable[[], Any]
    """Starts the work; need not wait for the device."""
    passes: int = 1
    """That one call makes."""
    most: int | None = None
    """Calls between two preparations; None for any number."""
    prepare: Callable[[], Any] | None = None
    """Called before each span, off the clock."""


def seconds_in_turns(
    runners: Sequence[Runner], device: torch.device, *, warm_up_seconds: float = 0.2
) -> tuple[Repeated, ...]:
    """Seconds of one pass of each, launched back to back, of 7 spans in turns: A B C, A B C, ...

    On a GPU in the state in which jobs replay graphs.

    Args:
        runners: What is compared.
        device: Where it runs.
        warm_up_seconds: On a GPU, all together run at least this long first: clocks fall under sustained load.

    Returns:
        One per runner.
    """
    spread_over_streams(device)
    counts = [1] * len(runners)
    for index, runner in enumerate(runners):
        for _ in range(_WARM_UP_RUNS):
            seconds = _span(runner, 1, device)
        wanted = math.ceil(_SPAN_SECONDS[device.type] / max(seconds, 1e-7))
        wanted = max(wanted, _LEAST_CALLS if device.type == "cuda" else 1)
        counts[index] = min(wanted, runner.most or wanted)
    end = time.perf_counter() + (warm_up_seconds if device.type == "cuda" else 0.0)
    while time.perf_counter() < end:
        for runner, count in zip(runners, counts, strict=True):
            _span(runner, count, device)
    turns = [
        [_span(runner, count, device) / (count * runner.passes) for runner, count in zip(runners, counts, strict=True)]
        for _ in range(_TURNS)
    ]
    return tuple(median_of(column) for column in zip(*turns, strict=True))


def median_of(seconds: Sequence[float]) -> Repeated:
    """What several times of the same thing amount to."""
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return Repeated(seconds=median, spread=(third - first) / median if median else 0.0)


def format_difference(seconds: float) -> str:
    """A difference of two times for reading; it is 0 if the first was not the longer one."""
    return format_seconds(seconds) if seconds else NOISE


def _span(runner: Runner, count: int, device: torch.device) -> float:
    if runner.prepare is not None:
        runner.prepare()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        runner.run()
    synchronize(device)
    return time.perf_counter() - start
