"""A rank's own passes, to be timed, and whether they can be CUDA graphs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from lp_plugin.errors import UnsupportedModelError
from lp_plugin.integrations.deepspeed.engine import slowest
from lp_plugin.measure.graphs import recorded
from lp_plugin.measure.layers import synchronize

__all__ = ["LonePasses", "check_capturable"]

_ALONE_SECONDS = {"cuda": 0.3, "cpu": 0.1}
"""Over which passes are timed, by type of device: a GPU at its power limit takes a fifth more or less from one
pass of 50 ms to the next."""

_WARM_UP_PASSES = 2
_PASSES, _GRAPH_SECONDS = 8, 30e-3
"""Passes of a graph that is timed: so many, or as many as take so long."""


def check_capturable(stage: Any) -> None:
    """Refuses a `DecoderStage` whose passes can't be CUDA graphs.

    Raises:
        UnsupportedModelError: If they ask the device for values.
    """
    if not stage.capturable:
        raise UnsupportedModelError(
            "this model's passes ask the device for values (rotary frequencies that depend on the longest sequence, or "
            "experts in another precision than bfloat16), so that they can't be CUDA graphs; choose execution 'eager' "
            "or 'auto'."
        )


class LonePasses:
    """A rank's own passes over one micro-batch, back to back, without neighbours; to be timed again and again.

    Args:
        one_pass: Runs a micro-batch through a stage.
        device: Where it runs.
        pool: As for `recorded`.
        replayed: Whether passes are replayed from a CUDA graph, rather than launched.
        group: Ranks that share the stage's layers, or None; they all make one, and call it together.
    """

    def __init__(
        self, one_pass: Callable[[], None], device: torch.device, *, pool: Any, replayed: bool, group: Any = None
    ) -> None:
        self._group, self._launch, self._passes = group, one_pass, 1
        self._usual_seconds = _ALONE_SECONDS[device.type]
        self._seconds = self._warm_seconds()
        if replayed:
            self._passes = min(math.ceil(_GRAPH_SECONDS / self._seconds), _PASSES)
            self._graph = recorded(lambda: self._run(one_pass, self._passes), warm_up=one_pass, pool=pool)
            self._launch = self._graph.replay
            self._seconds = self._warm_seconds()

    def seconds(self, span_seconds: float | None = None) -> float:
        """Seconds of a pass, on the slowest rank of the group: the mean over many.

        Args:
            span_seconds: What they take together, about; left out, 0.3 s (CPU 0.1 s).
        """
        return self._span(math.ceil((span_seconds or self._usual_seconds) / self._seconds / self._passes))

    def _warm_seconds(self) -> float:
        return [self._span(1) for _ in range(_WARM_UP_PASSES)][-1]

    def _span(self, launches: int) -> float:
        synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            self._run(self._launch, launches)
        synchronize()
        return slowest(time.perf_counter() - start, self._group) / (launches * self._passes)

    @staticmethod
    def _run(work: Callable[[], None], times: int) -> None:
        for _ in range(times):
            work()
