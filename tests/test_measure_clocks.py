"""The log of a GPU's clocks: what a stand-in for the driver says, and where there is none."""

import contextlib
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from lp_plugin.bench.experiment.entries import Entry
from lp_plugin.bench.experiment.settings import Configuration
from lp_plugin.errors import MissingDependencyError, RuntimeEnvironmentError
from lp_plugin.measure import clocks
from lp_plugin.measured import Clock, RankClocks

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def driver(monkeypatch: pytest.MonkeyPatch, readings: Sequence[tuple[float, bool]]) -> Callable[[], int]:
    """Gives these readings, then fails; returns how many it has given."""
    count = 0

    def read() -> tuple[float, bool]:
        nonlocal count
        count += 1
        if count > len(readings):
            raise RuntimeEnvironmentError("clocks are not known: the driver is gone.")
        return readings[count - 1]

    @contextlib.contextmanager
    def reader(device: torch.device) -> Iterator[Callable[[], tuple[float, bool]]]:
        yield read

    monkeypatch.setattr(clocks, "_reader", reader)
    return lambda: count


def wait_for(count: Callable[[], int], number: int) -> None:
    for _ in range(1000):
        if count() >= number:
            return
        time.sleep(0.01)
    pytest.fail(f"{count()} readings of {number}")


def test_without_a_gpu_nothing_is_known() -> None:
    start = time.perf_counter()
    with clocks.ClockLog(CPU) as log:
        wait_for(lambda: len(log.reason), 1)
    assert log.reason == "clocks are not known: there is no GPU."
    assert log.since(start) is None


def test_the_mean_of_what_was_read_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a driver that fails in the end."""
    count = driver(monkeypatch, [(1.5e9, True), (1.2e9, True), (1.8e9, False)])
    start = time.perf_counter()
    with clocks.ClockLog(CPU) as log:
        wait_for(count, 4)
        assert log.since(start) == Clock(hertz=1.5e9, capped_fraction=pytest.approx(2 / 3))
        assert log.since(time.perf_counter()) is None
    assert log.since(start) == Clock(hertz=1.5e9, capped_fraction=pytest.approx(2 / 3))
    assert log.reason == "clocks are not known: the driver is gone."


def test_readings_from_before_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    count = driver(monkeypatch, [(1e9, True)] * 2 + [(2e9, False)] * 1000)
    with clocks.ClockLog(CPU) as log:
        wait_for(count, 4)
        between = time.perf_counter()
        wait_for(count, count() + 2)
        assert log.since(between) == Clock(hertz=2e9, capped_fraction=0.0)


def test_a_row_has_the_median_turn_of_each_rank() -> None:
    entry = Entry(name="pp=2", configuration=Configuration.parse("pp=2"))
    for hertz, alone in ((1.4e9, 1.6e9), (1.5e9, None), (1.9e9, 1.7e9)):
        first = None if alone is None else Clock(hertz=alone, capped_fraction=0.0)
        entry.clocks.append(((Clock(hertz=hertz, capped_fraction=1.0), first), (None, None)))
    assert entry.row().clocks == (
        RankClocks(
            rank=0, trials=Clock(hertz=1.5e9, capped_fraction=1.0), alone=Clock(hertz=1.65e9, capped_fraction=0.0)
        ),
        RankClocks(rank=1, trials=None, alone=None),
    )


class DriverError(Exception):
    """pynvml's own kind."""


def install(monkeypatch: pytest.MonkeyPatch, reasons: int | None) -> list[int]:
    """A stand-in for pynvml on a machine with one GPU, which is lost if there are no reasons; counts who is in."""
    inside = [0]

    def enter(change: int) -> None:
        inside[0] += change

    def why(handle: str) -> int:
        if reasons is None:
            raise DriverError("GPU is lost")
        return {"handle of GPU-1234": reasons}[handle]

    found = types.SimpleNamespace(
        NVMLError=DriverError,
        NVML_CLOCK_SM=1,
        nvmlClocksEventReasonSwPowerCap=4,
        nvmlInit=lambda: enter(1),
        nvmlShutdown=lambda: enter(-1),
        nvmlDeviceGetHandleByUUID="handle of {}".format,
        nvmlDeviceGetClockInfo=lambda handle, kind: {("handle of GPU-1234", 1): 1485}[handle, kind],
        nvmlDeviceGetCurrentClocksEventReasons=why,
    )
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1234"))
    return inside


@pytest.mark.parametrize(("reasons", "capped"), [(0, False), (4, True), (5, True), (8, False)])
def test_what_the_driver_says(monkeypatch: pytest.MonkeyPatch, reasons: int, capped: bool) -> None:
    inside = install(monkeypatch, reasons)
    with clocks._reader(GPU) as read:
        assert read() == (1.485e9, capped)
        assert inside == [1]
    assert inside == [0]


def test_a_driver_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = install(monkeypatch, None)
    refused = pytest.raises(RuntimeEnvironmentError, match="clocks are not known: the driver says GPU is lost")
    with refused, clocks._reader(GPU) as read:
        read()
    assert inside == [0]


def test_without_its_python_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lp-plugin\[gpu\]'"), clocks._reader(GPU):
        pass
