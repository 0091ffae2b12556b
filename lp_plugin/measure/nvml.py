"""The driver's own view of a GPU, NVML."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from lp_plugin.errors import MissingDependencyError, RuntimeEnvironmentError

__all__ = ["driver_handle"]


@contextlib.contextmanager
def driver_handle(device: torch.device, missing: str) -> Iterator[tuple[Any, Any]]:
    """The module ``pynvml``, and the driver's handle of a GPU.

    Args:
        device: The GPU.
        missing: What is not known without it, such as ``NVLink is not counted``; errors begin with it.

    Raises:
        RuntimeEnvironmentError: If there is no GPU, or the driver refuses, here or inside.
        MissingDependencyError: If nvidia-ml-py is not installed.
    """
    if device.type != "cuda":
        raise RuntimeEnvironmentError(f"{missing}: there is no GPU.")
    try:
        import pynvml  # noqa: PLC0415
    except ImportError as error:
        raise MissingDependencyError(
            f"{missing}: nvidia-ml-py is not installed; pip install 'lp-plugin[gpu]'."
        ) from error
    try:
        pynvml.nvmlInit()
        try:
            # not by its number, which CUDA_VISIBLE_DEVICES changes for torch alone
            yield pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise RuntimeEnvironmentError(f"{missing}: the driver says {error}.") from error
