"""What the ranks of every job do together."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from deepspeed import comm as dist

from lp_plugin.errors import WorldSizeError
from lp_plugin.job.layout import Layout

__all__ = ["agree", "check_processes", "gather", "leave"]

Value = TypeVar("Value")


def check_processes(layout: Layout) -> None:
    """Refuses a job that was started with another number of processes than it has.

    Raises:
        WorldSizeError: Naming both numbers.
    """
    world = dist.get_world_size()
    if world == layout.num_processes:
        return
    stages, rest = divmod(world, layout.tensor_parallel * layout.data_parallel)
    other = f", or pass --stages {stages}" if stages and not rest else ""
    raise WorldSizeError(
        f"{world} processes for {layout}: the job needs one process for each; "
        f"start {layout.num_processes} processes{other}."
    )


def agree(value: Value | None) -> Value:
    """Rank 0's value, on every rank; collective."""
    box: list[Any] = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Value) -> tuple[Value, ...]:
    """Every rank's value, in order of ranks, on every rank; collective."""
    values = [value] * dist.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return tuple(values)


def leave() -> None:
    """Ends the job's communication; collective, and not after an error: its store tells who has reported that."""
    dist.barrier()  # Gloo may abort a process that ends while its last message is under way
    torch.distributed.destroy_process_group()
