"""Bytes over NVLink, as the driver counts them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lp_plugin.errors import MissingDependencyError, RuntimeEnvironmentError

__all__ = ["count_nvlink"]

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
    try:
        before = _sent_bytes(device)
    except RuntimeEnvironmentError as error:
        run()
        return None, str(error)
    run()
    return _sent_bytes(device) - before, ""


def _sent_bytes(device: torch.device) -> int:
    """Since the driver was loaded, over all links."""
    if device.type != "cuda":
        raise RuntimeEnvironmentError("NVLink is not counted: there is no GPU.")
    try:
        import pynvml  # noqa: PLC0415
    except ImportError as error:
        raise MissingDependencyError(
            "NVLink is not counted: nvidia-ml-py is not installed; pip install 'lp-plugin[gpu]'."
        ) from error
    torch.cuda.synchronize(device)
    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            fields = [
                (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, link) for link in range(pynvml.NVML_NVLINK_MAX_LINKS)
            ]
            values = pynvml.nvmlDeviceGetFieldValues(handle, fields)
            counts = [value.value.ullVal for value in values if value.nvmlReturn == pynvml.NVML_SUCCESS]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise RuntimeEnvironmentError(f"NVLink is not counted: the driver says {error}.") from error
    if not counts:
        raise RuntimeEnvironmentError("NVLink is not counted: the driver counts no bytes for this GPU, or has no link.")
    return sum(counts) * _UNIT_BYTES
