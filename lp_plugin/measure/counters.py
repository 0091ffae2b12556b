"""Hardware counters of one stage's passes, read by Nsight Compute."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lp_plugin.measured import Counters

__all__ = ["CountedStage", "count_stage", "say_passes"]

_PASSES = "counted passes:"
"""In the output of the process whose counters are read."""
_READ, _WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
_SECTORS, _HITS = "lts__t_sectors_op_read.sum", "lts__t_sectors_op_read_lookup_hit.sum"
_OPTIONS = (
    *("--clock-control", "none"),
    *("--cache-control", "none"),  # caches stay as the pass before left them
    *("--replay-mode", "application"),  # a kernel repeated by itself would find everything in the cache
    *("--profile-from-start", "off"),
    *("--metrics", ",".join((_READ, _WRITTEN, _SECTORS, _HITS))),
    *("--print-units", "base"),
    "--csv",
)
_REFUSALS = {
    "ERR_NVGPUCTRPERM": "no permission to read the GPU's counters; run as root, or let the driver's option "
    "NVreg_RestrictProfilingToAdminUsers be 0",
    "LibraryNotLoaded": "ncu can't load the driver's profiling library; virtual machines may not offer it",
}
"""What ncu says -> what that means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedStage:
    """A stage whose passes are counted, with random weights."""

    config: Mapping[str, Any]
    """transformers' configuration."""
    dtype: str
    """Precision."""
    start: int
    """First layer."""
    stop: int
    """One past the last."""
    tensor_parallel: int = 1
    """Ranks that share each layer; counted is what the first one does."""
    rows: int
    """Sequences of a micro-batch."""
    tokens: int
    """Of each sequence; 1 for a decode step."""
    cache_length: int = 0
    """Tokens of the static KV cache that a decode step reads; 0 for whole sequences without cache."""
    execution: Literal["eager", "compiled"]
    """What is launched kernel by kernel. CUDA graphs are replays of such kernels: they count as eager, or compiled."""


def say_passes(number: int) -> None:
    """Tells `count_stage`, from the process that it has started, how many passes were marked to be counted."""
    print(_PASSES, number, flush=True)  # noqa: T201 - read by the parent


def count_stage(spec: CountedStage, module: str, *, stage: int, timeout_seconds: float = 600.0) -> Counters:
    """Counts one pass of a stage that runs micro-batch after micro-batch, in a process of its own under ``ncu``.

    Args:
        spec: The stage.
        module: Runs it, as ``python -m module STAGE.json``, where the file holds ``spec``; calls `say_passes`.
        stage: Its position in the pipeline.
        timeout_seconds: Before it is given up; ncu runs the whole process several times.

    Returns:
        Per pass: bytes read and written, and the share of sectors read that L2 had; or the reason why not.
    """
    if not torch.cuda.is_available():
        return Counters(stage=stage, reason="there is no GPU")
    ncu = shutil.which("ncu")
    if ncu is None:
        return Counters(stage=stage, reason="Nsight Compute is not installed (ncu is not on the PATH)")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stage.json")
        path.write_text(json.dumps(dataclasses.asdict(spec) | {"config": dict(spec.config)}), encoding="utf-8")
        command = [ncu, *_OPTIONS, sys.executable, "-m", module, str(path)]
        said = _said(command, os.environ | {"TMPDIR": folder}, timeout_seconds)  # ncu's lock may be another user's
    if said is None:
        return Counters(stage=stage, reason=f"ncu did not end within {timeout_seconds:g} s")
    return _read(said, stage)


def _said(command: Sequence[str], environment: Mapping[str, str], timeout_seconds: float) -> str | None:
    """What a command and its children print; None if they had to be ended."""
    with subprocess.Popen(  # noqa: S603
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            return process.communicate(timeout=timeout_seconds)[0]
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _read(said: str, stage: int) -> Counters:
    """Sums what ncu says of each kernel."""
    sums: dict[str, float] = defaultdict(float)
    lines = said.splitlines()
    header = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    for row in csv.DictReader(line for line in lines[header:] if line.startswith('"')):
        with contextlib.suppress(ValueError):  # such as n/a
            sums[row["Metric Name"]] += float(row["Metric Value"].replace(",", ""))
    passes = [int(line.removeprefix(_PASSES)) for line in lines if line.startswith(_PASSES)]  # of each replay
    missing = [name for name in (_READ, _WRITTEN, _SECTORS, _HITS) if name not in sums]
    if not missing and not passes:
        missing = [_PASSES.strip(":")]
    if missing:
        return Counters(stage=stage, reason=_reason(said, missing[0]))
    return Counters(
        stage=stage,
        l2_read_hit_fraction=sums[_HITS] / sums[_SECTORS] if sums[_SECTORS] else None,
        dram_read_bytes=sums[_READ] / passes[-1],
        dram_write_bytes=sums[_WRITTEN] / passes[-1],
    )


def _reason(said: str, missing: str) -> str:
    """Why a counter is missing."""
    for word, meaning in _REFUSALS.items():
        if word in said:
            return meaning
    errors = [line.strip("= ") for line in said.splitlines() if "error" in line.lower()]
    return f"ncu gave no {missing}: {errors[-1]}" if errors else f"ncu gave no {missing}"
