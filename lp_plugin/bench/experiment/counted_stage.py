"""A process that runs one stage while hardware counters are read: ``python -m ... STAGE.json``, started by ncu."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from lp_plugin.integrations.deepspeed.alone.passes import Shape, make_passes
from lp_plugin.integrations.deepspeed.alone.stages import read_mapping, stage_of_copies
from lp_plugin.measure.counters import CountedStage, say_passes
from lp_plugin.measure.layers import synchronize
from lp_plugin.measure.turns import Runner

__all__ = ["run_passes"]

_PASSES = 4
"""Counted at least, if the cache has room for as many."""


def run_passes(spec: CountedStage, device: torch.device) -> int:
    """Passes of micro-batches one after the other, all of them twice: the second time is marked to be counted.

    They are what the pipeline runs in that execution, launched kernel by kernel: a profiler sees each kernel then, and
    a CUDA graph would replay the same ones.

    Returns:
        Passes that are counted.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, spec.dtype)
    stage = stage_of_copies(
        read_mapping(spec.config),
        spec.start,
        spec.stop,
        halves=False,
        tensor_parallel=spec.tensor_parallel,
        device=device,
        dtype=dtype,
    )
    shape = Shape(rows=spec.rows, tokens=spec.tokens, cache_length=spec.cache_length, dtype=dtype)
    runner = make_passes([stage], shape, spec.execution, device).launched()
    calls = min(-(-_PASSES // runner.passes), runner.most or _PASSES)
    _run(runner, calls, device, counted=False)
    _run(runner, calls, device, counted=True)
    return calls * runner.passes


def _run(runner: Runner, calls: int, device: torch.device, *, counted: bool) -> None:
    marked = counted and device.type == "cuda"
    if runner.prepare is not None:
        runner.prepare()
    synchronize(device)
    if marked:
        torch.cuda.profiler.start()
    for _ in range(calls):
        runner.run()
    synchronize(device)
    if marked:
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    asked = CountedStage(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    say_passes(run_passes(asked, torch.device("cuda")))
