"""What clock a GPU runs at while something is measured, and whether its power limit holds it back."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import torch

from lp_plugin.errors import RuntimeEnvironmentError
from lp_plugin.measure.nvml import driver_handle
from lp_plugin.measured import Clock

__all__ = ["ClockLog"]

_EVERY_SECONDS = 0.05
_PATIENCE_SECONDS = 1.0
"""With a driver that does not answer, as when the GPU is lost."""
_HERTZ = 1e6
"""The driver counts in MHz."""

Reading = tuple[float, bool]
"""Hertz, and whether the power limit holds it back."""


class ClockLog:
    """Inside, a thread asks the driver for the clock of a GPU's multiprocessors, 20 times a second.

    Where the driver can't be asked, or there is no GPU, nothing is known, and nothing goes wrong.

    Args:
        device: The GPU.

    Attributes:
        reason: Why nothing is known, or no more; empty if all is.
    """

    def __init__(self, device: torch.device) -> None:
        self.reason = ""
        self._device = device
        self._readings: list[tuple[float, Reading]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="clocks", daemon=True)

    def __enter__(self) -> ClockLog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(_PATIENCE_SECONDS)

    def since(self, start: float) -> Clock | None:
        """What was seen from a moment on until now; None if nothing was.

        Args:
            start: By ``time.perf_counter()``.
        """
        seen = [reading for when, reading in tuple(self._readings) if when >= start]
        if not seen:
            return None
        return Clock(
            hertz=statistics.fmean(hertz for hertz, _ in seen),
            capped_fraction=statistics.fmean(capped for _, capped in seen),
        )

    def _watch(self) -> None:
        try:
            with _reader(self._device) as read:
                while not self._ended.wait(_EVERY_SECONDS):
                    self._readings.append((time.perf_counter(), read()))
        except RuntimeEnvironmentError as error:
            self.reason = str(error)


@contextlib.contextmanager
def _reader(device: torch.device) -> Iterator[Callable[[], Reading]]:
    """Asks the driver.

    Source:
        NVIDIA, NVML API reference: nvmlDeviceGetClockInfo, nvmlDeviceGetCurrentClocksEventReasons, where "SW power
        cap" means that clocks are lowered to stay below the power limit.
    """
    with driver_handle(device, "clocks are not known") as (nvml, handle):

        def read() -> Reading:
            reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
            capped = bool(reasons & nvml.nvmlClocksEventReasonSwPowerCap)
            return _HERTZ * nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM), capped

        yield read
