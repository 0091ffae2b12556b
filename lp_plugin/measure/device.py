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

__all__ = ["catalogue_name", "detect_device", "device_name"]

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

    Args:
        index: Position among this host's processes (and GPUs).
        num_local_processes: Processes that share this host's memory when there is no GPU.

    Raises:
        HardwareError: If the GPU is not in the catalogue, or there are fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        cpu = load_device("cpu")
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return _with_memory(cpu, total // num_local_processes)
    if index >= torch.cuda.device_count():
        raise HardwareError(
            f"local process {index} has no GPU: this host shows {torch.cuda.device_count()}. "
            "Start fewer processes per host, or check CUDA_VISIBLE_DEVICES."
        )
    properties = torch.cuda.get_device_properties(index)
    entry = catalogue_name(properties.name)
    if entry is not None:
        return _with_memory(load_device(entry), properties.total_memory)
    raise HardwareError(
        f"GPU {properties.name!r} is not in the catalogue ({', '.join(catalogue())}); "
        'describe it in a cluster file: --cluster FILE.toml, or "device" in the "lp_plugin" section.'
    )


def _with_memory(device: Device, capacity_bytes: int) -> Device:
    memory = dataclasses.replace(device.memory, capacity_bytes=capacity_bytes)
    return dataclasses.replace(device, tiers=(*device.tiers[:-1], memory))
