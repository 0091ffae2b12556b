"""Running out of memory, explained by what was planned."""

from __future__ import annotations

import torch

from lp_plugin.errors import OutOfMemoryError
from lp_plugin.job.place import here
from lp_plugin.plan import Plan
from lp_plugin.quantity import format_bytes

__all__ = ["expect", "explained"]

_CPU_WORDS = ("defaultcpuallocator: can't allocate memory", "not enough memory: you tried to allocate")
"""Of torch's error on CPUs, which is no class of its own."""

_expected: str | None = None


def expect(plan: Plan, stage: int) -> None:
    """Notes what a plan predicts for this process's stage."""
    global _expected  # noqa: PLW0603 - one process is one rank
    planned = plan.stages[stage]
    _expected = (
        f"the plan predicted {format_bytes(planned.memory_bytes)} of the {format_bytes(planned.capacity_bytes)} of "
        f"{planned.device}"
    )


def explained(error: BaseException) -> OutOfMemoryError | None:
    """The typed error for one that means that memory ran out; None for any other."""
    on_gpu = isinstance(error, torch.cuda.OutOfMemoryError)
    on_cpu = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _CPU_WORDS)
    )
    if not on_gpu and not on_cpu:
        return None
    reason = next(iter(str(error).splitlines()), "").split(" If reserved")[0]
    compared = f"; {_expected}" if _expected else ""
    return OutOfMemoryError(
        f"out of memory at {here()}{compared}. Give this stage fewer layers or the job smaller micro-batches, shorter "
        f"sequences or more stages, and see that nothing else uses the device. torch says: {reason}"
    )
