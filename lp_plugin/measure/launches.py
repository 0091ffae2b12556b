"""What it takes to start a kernel: one by one, and in a replayed CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lp_plugin.measure.graphs import recorded
from lp_plugin.measure.turns import Runner, seconds_in_turns

__all__ = ["LaunchSeconds", "launch_seconds"]

_KERNELS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSeconds:
    """Of an operation on a single number, launched back to back."""

    eager: float
    """Each from Python."""
    replayed: float | None
    """In a CUDA graph of many; None without a GPU."""
    spread: float = 0.0
    """Of repeats of either, between the quartiles, over the median: the larger."""


def launch_seconds(device: torch.device) -> LaunchSeconds:
    """Measures both."""
    number = torch.zeros(1, device=device)

    def add() -> None:
        for _ in range(_KERNELS):
            number.add_(1.0)

    runners = [Runner(run=add, passes=_KERNELS)]
    if device.type == "cuda":
        add()
        runners.append(Runner(run=recorded(add).replay, passes=_KERNELS))
    eager, *replayed = seconds_in_turns(runners, device)
    return LaunchSeconds(
        eager=eager.seconds,
        replayed=replayed[0].seconds if replayed else None,
        spread=max(each.spread for each in (eager, *replayed)),
    )
