"""Which device this process runs on, as an entry of the catalogue."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
from pathlib import Path

import torch

from lp_plugin.errors import HardwareError
from lp_plugin.hardware.catalogue import catalogue, load_device
from lp_plugin.hardware.device import Device

__all__ = ["catalogue_name", "container_limits", "detect_device", "device_name"]

_NAMES = {
    "H100 PCIe": "h100-pcie",
    "H100": "h100-sxm",
    "H200": "h200",
    "B200": "b200",
    "L40S": "l40s",
    "MI300X": "mi300x",
    "A100-SXM4-80GB": "a100-80g",
    "A100 80GB": "a100-80g",
    "A100-SXM4-40GB": "a100-40g",
    "A100-PCIE-40GB": "a100-40g",
}
"""Part of the driver's name for a device -> its entry in the catalogue; the first that matches counts."""

_CONTEXTS_BYTES = 4_000_000_000
"""Of a GPU, in use beside what torch has reserved, that can be this job's own: CUDA's context and libraries."""


def device_name() -> str:
    """What the driver calls this process's GPU; without one, what the system calls the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "CPU"


def catalogue_name(driver_name: str) -> str | None:
    """The catalogue's name of a GPU that the driver calls so; None if it is not in the catalogue."""
    return next((entry for part, entry in _NAMES.items() if part in driver_name), None)


def detect_device(index: int, num_local_processes: int) -> Device:
    """The device that local process ``index`` uses, with the memory it really has.

    A CPU has what the host has, or less if a container may use less; a GPU what other programs leave free, but for
    their first 4 GB: contexts of the job's own processes, which every plan leaves room for, can't be told from others.

    Args:
        index: Position among this host's processes (and GPUs).
        num_local_processes: Processes that share this host's memory when there is no GPU.

    Raises:
        HardwareError: If the GPU is not in the catalogue, or there are fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        cpu = load_device("cpu")
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return _with_memory(cpu, min([total, *container_limits()]) // num_local_processes)
    if index >= torch.cuda.device_count():
        raise HardwareError(
            f"local process {index} has no GPU: this host shows {torch.cuda.device_count()}. "
            "Start fewer processes per host, or check CUDA_VISIBLE_DEVICES."
        )
    properties = torch.cuda.get_device_properties(index)
    entry = catalogue_name(properties.name)
    if entry is not None:
        return _with_memory(load_device(entry), properties.total_memory - _used_by_others(index))
    raise HardwareError(
        f"GPU {properties.name!r} is not in the catalogue ({', '.join(catalogue())}); "
        'describe it in a cluster file: --cluster FILE.toml, or "device" in the "lp_plugin" section.'
    )


def container_limits(root: Path = Path("/")) -> list[int]:
    """Bytes that this process's control groups, and those around them, allow; none where nothing says so.

    Args:
        root: Of the file system.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")  # version 1, or 2
        own = Path(path.lstrip("/"))
        for folder in (own, *own.parents):  # in a container its own group may be the mount's root, whatever its name
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((root / "sys/fs/cgroup" / mount / folder / name).read_text(encoding="ascii")))
    return limits


def _used_by_others(index: int) -> int:
    free, total = torch.cuda.mem_get_info(index)
    used = total - free - torch.cuda.memory_reserved(index)
    return used if used > _CONTEXTS_BYTES else 0


def _with_memory(device: Device, capacity_bytes: int) -> Device:
    memory = dataclasses.replace(device.memory, capacity_bytes=capacity_bytes)
    return dataclasses.replace(device, tiers=(*device.tiers[:-1], memory))
