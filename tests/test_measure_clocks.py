"""The log of a GPU's clocks: what a stand-in for the driver says, and where there is none."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from lp_plugin.bench.experiment.entries import Entry
from lp_plugin.bench.experiment.settings import Configuration
from lp_plugin.errors import RuntimeEnvironmentError
from lp_plugin.measure import clocks
from lp_plugin.measured import Clock, RankClocks

CPU = torch.device("cpu")


def driver(monkeypatch: pytest.MonkeyPatch, readings: Sequence[tuple[float, bool]]) -> Callable[[], int]:
    """Gives these readings, then fails; returns how many it has given."""
    given = itertools.count()
    count = 0

    def read() -> tuple[float, bool]:
        nonlocal count
        count = next(given) + 1
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
        pass
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
