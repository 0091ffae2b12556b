"""What has to be the same on all hosts, compared before anything is allocated."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping

import torch
from deepspeed import comm as dist

from lp_plugin.errors import RuntimeEnvironmentError
from lp_plugin.plan import Plan

__all__ = ["check_same", "plan_digest"]

_SHOWN = 12
"""Digits of a digest in a message."""


def check_same(digests: Mapping[str, str], remedy: str) -> None:
    """Refuses a job whose ranks have not the same; collective, all ranks raise.

    Args:
        digests: Name of what has to be the same -> this rank's digest of it; the same names on all ranks.
        remedy: What to do about it.

    Raises:
        RuntimeEnvironmentError: Naming the first rank and host with something else than rank 0.
    """
    mine = (socket.gethostname(), dict(digests))
    found = [mine] * dist.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    wanted_host, wanted = found[0]
    for rank, (host, have) in enumerate(found):
        for name, digest in have.items():
            if digest != wanted[name]:
                raise RuntimeEnvironmentError(
                    f"rank {rank} on {host} has another {name} ({digest[:_SHOWN]}...) than rank 0 on {wanted_host} "
                    f"({wanted[name][:_SHOWN]}...); {remedy}"
                )


def plan_digest(plan: Plan) -> str:
    """SHA-256 of what a plan decides, in hexadecimal: for which model and workload, and where it is cut."""
    decided = [plan.model_digest, plan.workload_digest, plan.dtype, plan.tensor_parallel, plan.boundaries]
    return hashlib.sha256(json.dumps(decided).encode()).hexdigest()
