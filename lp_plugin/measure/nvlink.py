"""Bytes over NVLink, as the driver counts them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lp_plugin.errors import RuntimeEnvironmentError
from lp_plugin.measure.nvml import driver_handle

__all__ = ["count_nvlink"]

_MISSING = "NVLink is not counted"
_UNIT_BYTES = 1024
"""The driver's counters are in KiB."""


def count_nvlink(run: Callable[[], None], device: torch.device) -> tuple[int | None, str]:
    """Runs something and counts what a GPU sends over NVLink meanwhile, to whomever.

    Args:
        run: Makes the messages; need not wait for the device.
        device: The GPU.

    Returns:
        (bytes of data, empty), or (None, why they can't be counted); ``run`` was called in any case.

    Source:
        NVIDIA, NVML API reference, field NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX: data without protocol, in KiB.
    """
    before, reason = _sent(device)
    run()
    after, later_reason = _sent(device)
    sent = None if before is None or after is None else after - before
    return sent, reason or later_reason


def _sent(device: torch.device) -> tuple[int | None, str]:
    """What `_sent_bytes` gives, or why it can't."""
    try:
        return _sent_bytes(device), ""
    except RuntimeEnvironmentError as error:
        return None, str(error)


def _sent_bytes(device: torch.device) -> int:
    """Since the driver was loaded, over all links."""
    with driver_handle(device, _MISSING) as (nvml, handle):
        torch.cuda.synchronize(device)
        fields = [(nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, link) for link in range(nvml.NVML_NVLINK_MAX_LINKS)]
        values = nvml.nvmlDeviceGetFieldValues(handle, fields)
        counts = [value.value.ullVal for value in values if value.nvmlReturn == nvml.NVML_SUCCESS]
    if not counts:
        raise RuntimeEnvironmentError(f"{_MISSING}: the driver counts no bytes for this GPU, or has no link.")
    return sum(counts) * _UNIT_BYTES
