"""Where a case ran: devices, versions, variables; nothing that names a host or a user."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import distributed

from lp_plugin.bench.experiment.results import Environment

__all__ = ["describe_environment"]

_PACKAGES = ("torch", "deepspeed", "transformers", "triton", "lp_plugin")
_VARIABLES = ("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_")
_HIDDEN = ("SOCKET_IFNAME", "FILE", "DIR", "ADDR", "HOSTID", "COMM_ID")
"""Parts of names of variables whose values tell of a host."""


def describe_environment(devices: Sequence[str]) -> Environment:
    """What is recorded with a case's figures.

    Args:
        devices: `measure.device.device_name` of every rank.
    """
    cuda = torch.cuda.is_available()
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    if cuda:
        versions |= {
            "cuda": str(torch.version.cuda),
            "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()),
            "driver": _driver(),
        }
    return Environment(
        devices=tuple(devices) if cuda else tuple(devices[:1]),
        backend=distributed.get_backend(),
        host=f"{platform.system()} {platform.machine()}",
        cores=os.cpu_count() or 1,
        versions=versions,
        variables={name: value for name, value in sorted(os.environ.items()) if _matters(name)},
    )


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return next((word for word in text.split() if word[:1].isdigit() and "." in word), "unknown")


def _matters(name: str) -> bool:
    return (name in _VARIABLES or name.startswith(_PREFIXES)) and not any(part in name for part in _HIDDEN)
