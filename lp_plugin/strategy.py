"""How to cut the batch: candidates for the micro-batch."""

from __future__ import annotations

from lp_plugin.workload import Workload

__all__ = ["micro_batch_candidates"]


def micro_batch_candidates(workload: Workload) -> list[int]:
    """Micro-batch sizes worth planning, smallest first: powers of two up to the batch, and the batch itself.

    Only the given one if the workload has chosen.
    """
    if workload.micro_batch is not None:
        return [workload.micro_batch]
    powers = [1 << exponent for exponent in range(workload.batch.bit_length())]
    return sorted({*powers, workload.batch})
