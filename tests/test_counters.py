"""Counters as ncu prints them, why there are none, the stage that is counted, and NVLink where there is none."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from dense16 import DENSE16
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lp_plugin.bench.experiment import counted_stage
from lp_plugin.bench.experiment.counted_stage import run_passes
from lp_plugin.measure.counters import CountedStage, count_stage
from lp_plugin.measure.nvlink import count_nvlink
from lp_plugin.measured import Counters

CONFIG = json.loads((DENSE16 / "small" / "config.json").read_text()) | {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SPEC = CountedStage(config=CONFIG, dtype="float32", start=1, stop=3, rows=2, tokens=3, execution="eager")
MODULE = counted_stage.__name__
PER_BLOCK = 6
"""Products with weights: queries, keys, values, what attention gives, up, down."""

HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def row(number: int, metric: str, value: str) -> str:
    kernel = '"void at::native::kernel<4, float(float, float)>(int, T3)"'
    place = '"1","7","(128, 1, 1)","(132, 1, 1)","0","9.0","Command line profiler metrics"'
    return f'"{number}","812","python3.12","127.0.0.1",{kernel},{place},"{metric}","byte","{value}"'


PRINTED = "\n".join(
    [
        "==PROF== Connected to process 812 (/usr/bin/python3.12)",
        "something that the stage printed, with a comma",
        "counted passes: 8",
        '==PROF== Profiling "kernel": Application replay pass 1',
        HEADER,
        row(0, "dram__bytes_read.sum", "25,165,824"),
        row(0, "dram__bytes_write.sum", "1,024.5"),
        row(0, "lts__t_sectors_op_read.sum", "1,000,000"),
        row(0, "lts__t_sectors_op_read_lookup_hit.sum", "80,000"),
        row(1, "dram__bytes_read.sum", "0"),
        row(1, "dram__bytes_write.sum", "n/a"),
        row(1, "lts__t_sectors_op_read.sum", "1,000,000"),
        row(1, "lts__t_sectors_op_read_lookup_hit.sum", "920,000"),
    ]
)


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``ncu`` that we write, since there is no GPU; it is taken for one."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path = tmp_path / "ncu"
    path.touch()
    path.chmod(0o755)
    return path


def say(ncu: Path, text: str, end: str = "") -> None:
    ncu.with_suffix(".txt").write_text(text)
    ncu.write_text(
        f'#!/bin/sh\necho "$@" > {ncu}.called\ncp "$(eval echo \\${{$#}})" {ncu}.stage\ncat {ncu}.txt\n{end}\n'
    )


def test_kernels_are_summed_and_shared_out_among_passes(ncu: Path) -> None:
    say(ncu, PRINTED)
    assert count_stage(SPEC, MODULE, stage=3) == Counters(
        stage=3,
        l2_read_hit_fraction=0.5,
        dram_read_bytes=25_165_824 / 8,
        dram_write_bytes=1_024.5 / 8,
    )
    called = Path(f"{ncu}.called").read_text()
    assert "--clock-control none --cache-control none --replay-mode application" in called
    assert f"{sys.executable} -m {MODULE} " in called
    assert CountedStage(**json.loads(Path(f"{ncu}.stage").read_text())) == SPEC


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "no permission to read the GPU's counters"),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded", "can't load the driver's profiling library"),
        ("==PROF== x\ntorch.OutOfMemoryError: CUDA out of memory.", "torch.OutOfMemoryError: CUDA out of memory"),
        (HEADER, "ncu gave no dram__bytes_read.sum"),
        ("", "ncu gave no dram__bytes_read.sum"),
        (PRINTED.replace("counted passes: 8", ""), "ncu gave no counted passes"),
    ],
    ids=["permission", "library", "memory", "no kernel", "nothing", "passes"],
)
def test_the_reason_is_what_ncu_says(ncu: Path, printed: str, reason: str) -> None:
    say(ncu, printed, "exit 1")
    counted = count_stage(SPEC, MODULE, stage=0)
    assert reason in counted.reason
    assert counted.dram_read_bytes is None


def test_an_ncu_that_hangs_is_ended_with_its_children(ncu: Path) -> None:
    ncu.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {ncu}.child\nwait\n")
    assert "did not end within 1 s" in count_stage(SPEC, MODULE, stage=0, timeout_seconds=1).reason
    child = int(Path(f"{ncu}.child").read_text())
    for _ in range(100):
        if not alive(child):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child still ran")


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_ncu_or_gpu_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_stage(SPEC, MODULE, stage=1) == Counters(stage=1, reason="there is no GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", "")
    assert "ncu is not on the PATH" in count_stage(SPEC, MODULE, stage=1).reason


class Products(TorchFunctionMode):
    """Counts products with weights, and the most keys that attention reads."""

    products = keys = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is functional.linear
        if func is functional.scaled_dot_product_attention:
            self.keys = max(self.keys, args[1].shape[-2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache_length", [0, 9], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("start", "stop", "ranks", "products"),
    [(0, 1, 1, 0), (1, 3, 1, 2), (1, 2, 2, 1), (3, 5, 1, None)],
    ids=["embedding", "blocks", "half of a block", "norm and head"],
)
def test_the_passes_of_the_stage_are_counted(
    start: int, stop: int, ranks: int, products: int | None, cache_length: int
) -> None:
    """Four passes are marked, after as many others and what tries the stage out."""
    spec = dataclasses.replace(
        SPEC,
        dtype="bfloat16",
        start=start,
        stop=stop,
        tensor_parallel=ranks,
        tokens=1 if cache_length else 3,
        cache_length=cache_length,
    )
    with Products() as seen:
        assert run_passes(spec, torch.device("cpu")) == 4
    per_pass = 1 if products is None else products * PER_BLOCK
    assert seen.products >= 8 * per_pass
    assert seen.keys == (0 if not products else cache_length or 3)


def test_a_short_cache_has_room_for_fewer_passes() -> None:
    spec = dataclasses.replace(SPEC, tokens=1, cache_length=3)
    assert run_passes(spec, torch.device("cpu")) == 2


def test_nvlink_without_a_gpu_runs_and_says_so() -> None:
    calls: list[int] = []
    sent, reason = count_nvlink(lambda: calls.append(1), torch.device("cpu"))
    assert (calls, sent) == ([1], None)
    assert "there is no GPU" in reason
