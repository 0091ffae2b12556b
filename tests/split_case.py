"""What each process of `test_measure_split.py` does: a pipeline of three, a pair that reduces, one alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed

from lp_plugin.measure.split import profile_run
from lp_plugin.measured import TimeSplit

PROCESSES = 3
MICRO_BATCHES = 4
SIZE = 128


def profiled(rank: int, store: str) -> dict[str, list[TimeSplit]]:
    """Profiles three kinds of runs; collective over all processes."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    pair = distributed.new_group([0, 1])
    square = torch.ones(SIZE, SIZE)
    runs: dict[str, tuple[Callable[[], None], list[int]]] = {
        "pipeline": (lambda: _pass_on(rank, square), [0, 1, 2]),
        "tensor": (lambda: _reduce(square, pair), [0, 1]),
        "alone": (lambda: _compute(square), [0]),
    }
    results = {name: list(profile_run(run, ranks)) for name, (run, ranks) in runs.items()}
    distributed.barrier()
    distributed.destroy_process_group()
    return results


def _compute(value: torch.Tensor) -> torch.Tensor:
    return torch.mm(torch.mm(value, value), value)


def _pass_on(rank: int, square: torch.Tensor) -> None:
    sent = []
    for _ in range(MICRO_BATCHES):
        value = torch.zeros_like(square) if rank else square
        if rank:
            distributed.recv(value, rank - 1)
        value = _compute(value)
        if rank < PROCESSES - 1:
            sent.append(distributed.isend(value, rank + 1))
    for work in sent:
        if work is not None:
            work.wait()


def _reduce(square: torch.Tensor, pair: distributed.ProcessGroup) -> None:
    for _ in range(MICRO_BATCHES):
        distributed.all_reduce(_compute(square), group=pair)
