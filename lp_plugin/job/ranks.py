"""What the ranks of every job do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from deepspeed import comm as dist

from lp_plugin.errors import WorldSizeError
from lp_plugin.integrations.deepspeed.engine import init_distributed
from lp_plugin.job.layout import Layout
from lp_plugin.job.place import at
from lp_plugin.job.watch.timeout import DEFAULT_TIMEOUT_SECONDS
from lp_plugin.job.watch.watch import leave

__all__ = ["agree", "check_processes", "gather", "run_rank"]

Value = TypeVar("Value")
AnyJob = TypeVar("AnyJob")
Outcome = TypeVar("Outcome")


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
    at("agree")
    torch.distributed.broadcast_object_list(box, src=0)
    at("")
    return box[0]


def gather(value: Value) -> tuple[Value, ...]:
    """Every rank's value, in order of ranks, on every rank; collective."""
    values = [value] * dist.get_world_size()
    at("agree")
    torch.distributed.all_gather_object(values, value)
    at("")
    return tuple(values)


def run_rank(
    prepared: Callable[[], AnyJob] | None,
    run: Callable[[AnyJob], Outcome | None],
    *,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> Outcome | None:
    """Runs this process's part of a job; collective over its ranks. torchrun's environment variables are set.

    Args:
        prepared: Makes the job; needed on rank 0, which hands it to the others. Called once the ranks are
            connected: if it raises, the others notice that this one is gone.
        run: Does what there is to do; gives the job's figures on rank 0, None elsewhere.
        timeout_seconds: After which a rank that does not move counts as hung.

    Returns:
        What ``run`` gave.

    Raises:
        LpPluginError: Any of its kinds.
    """
    init_distributed(timeout_seconds)
    job = None
    if prepared is not None:
        at("prepare")
        job = prepared()
    outcome = run(agree(job))
    at("drain")
    dist.barrier()  # Gloo may abort a process that ends while its last message is under way
    torch.distributed.destroy_process_group()
    leave()
    return outcome
